/* Dropout together with what stands beside it, for one instruction set: included after rows.h, once for each.
 *
 * Selects are made on bits, so that loops vectorize and a dropped infinity or NaN is zero.
 */

#define TD_DEFINE_FUSED(dtype, store_t, real_t, word_t, LOAD, STORE, BITS, REAL)                                     \
    /* out = other + (kept ? (in + bias) * scale : 0); bias has an element a column, or is missing. */               \
    TD_TARGET static inline TD_INLINE void TD_NAME(add_chunk_##dtype)(                                               \
        char *out, const char *in, const real_t *biases, const char *other, const uint16_t *draws, uint16_t cut,    \
        real_t scale, int biased, int64_t n) {                                                                       \
        TD_INDEPENDENT                                                                                               \
        for (int64_t j = 0; j < n; j++) {                                                                            \
            store_t value, addend;                                                                                   \
            const word_t mask = (word_t) - (word_t)(draws[j] < cut);                                                 \
            memcpy(&value, in + j * (int64_t)sizeof value, sizeof value);                                            \
            memcpy(&addend, other + j * (int64_t)sizeof addend, sizeof addend);                                      \
            const real_t whole = biased ? LOAD(value) + biases[j] : LOAD(value);                                     \
            value = STORE(LOAD(addend) + REAL(BITS(whole * scale) & mask));                                          \
            memcpy(out + j * (int64_t)sizeof value, &value, sizeof value);                                           \
        }                                                                                                            \
    }                                                                                                                \
    TD_TARGET static void TD_NAME(add_##dtype)(char *out, const char *in, const char *bias, int64_t columns,        \
                                               const char *other, int64_t index, int64_t n, td_key key,             \
                                               const td_law *law) {                                                 \
        const real_t scale = (real_t)law->scale;                                                                     \
        uint16_t draws[TD_CHUNK];                                                                                    \
        real_t biases[TD_CHUNK];                                                                                     \
        const int64_t end = index + n;                                                                               \
        while (index < end) {                                                                                        \
            const int64_t skip = index % 8, take = td_min(TD_CHUNK - skip, end - index);                             \
            const char *from = in + index * (int64_t)sizeof(store_t), *with = other + index * (int64_t)sizeof(store_t); \
            char *to = out + index * (int64_t)sizeof(store_t);                                                       \
            if (take == TD_CHUNK)                                                                                    \
                for (int64_t b = 0; b < TD_CHUNK * (int64_t)sizeof(store_t); b += 64) {                              \
                    TD_PREFETCH(from + b, 0);                                                                        \
                    TD_PREFETCH(with + b, 0);                                                                        \
                    TD_PREFETCH(to + b, 1);                                                                          \
                }                                                                                                    \
            const uint16_t cut = TD_NAME(decide)((uint64_t)index / 8, key, law, draws, skip + take);                 \
            if (bias) {                                                                                              \
                for (int64_t j = 0, column = index % columns; j < take; column = 0) {                                \
                    const int64_t run = td_min(columns - column, take - j);                                          \
                    for (int64_t i = 0; i < run; i++) {                                                              \
                        store_t value;                                                                               \
                        memcpy(&value, bias + (column + i) * (int64_t)sizeof value, sizeof value);                   \
                        biases[j + i] = LOAD(value);                                                                 \
                    }                                                                                                \
                    j += run;                                                                                        \
                }                                                                                                    \
                TD_NAME(add_chunk_##dtype)(to, from, biases, with, draws + skip, cut, scale, 1, take);               \
            } else {                                                                                                 \
                TD_NAME(add_chunk_##dtype)(to, from, biases, with, draws + skip, cut, scale, 0, take);               \
            }                                                                                                        \
            index += take;                                                                                           \
        }                                                                                                            \
    }                                                                                                                \
    /* out = kept and not in <= 0 ? in * scale : 0. */                                                               \
    TD_TARGET static void TD_NAME(relu_##dtype)(char *out, const char *in, uint64_t index, int64_t n, td_key key,   \
                                                const td_law *law) {                                                \
        const real_t scale = (real_t)law->scale;                                                                     \
        uint16_t draws[TD_CHUNK];                                                                                    \
        while (n > 0) {                                                                                              \
            const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n);                            \
            if (take == TD_CHUNK)                                                                                    \
                for (int64_t b = 0; b < TD_CHUNK * (int64_t)sizeof(store_t); b += 64) {                              \
                    TD_PREFETCH(in + b, 0);                                                                          \
                    TD_PREFETCH(out + b, 1);                                                                         \
                }                                                                                                    \
            const uint16_t cut = TD_NAME(decide)(index / 8, key, law, draws, skip + take);                           \
            TD_INDEPENDENT                                                                                           \
            for (int64_t j = 0; j < take; j++) {                                                                     \
                store_t value;                                                                                       \
                memcpy(&value, in + j * (int64_t)sizeof value, sizeof value);                                        \
                const store_t mask = (store_t) - (store_t)(draws[skip + j] < cut);                                   \
                const store_t positive = (store_t) - (store_t) !(LOAD(value) <= 0);                                  \
                value = STORE(LOAD(value) * scale) & mask & positive;                                                \
                memcpy(out + j * (int64_t)sizeof value, &value, sizeof value);                                       \
            }                                                                                                        \
            out += take * (int64_t)sizeof(store_t);                                                                  \
            in += take * (int64_t)sizeof(store_t);                                                                   \
            index += (uint64_t)take;                                                                                 \
            n -= take;                                                                                               \
        }                                                                                                            \
    }                                                                                                                \
    /* out = not other <= 0 ? in * scale : 0: the gradient of the above where `other` is what it gave. */            \
    TD_TARGET static void TD_NAME(relu_backward_##dtype)(char *out, const char *in, const char *bias,               \
                                                         int64_t columns, const char *other, int64_t index,         \
                                                         int64_t n, td_key key, const td_law *law) {                \
        const real_t scale = (real_t)law->scale;                                                                     \
        (void)bias;                                                                                                  \
        (void)columns;                                                                                               \
        (void)key;                                                                                                   \
        TD_INDEPENDENT                                                                                               \
        for (int64_t j = index; j < index + n; j++) {                                                                \
            store_t value, output;                                                                                   \
            memcpy(&value, in + j * (int64_t)sizeof value, sizeof value);                                            \
            memcpy(&output, other + j * (int64_t)sizeof output, sizeof output);                                      \
            value = STORE(LOAD(value) * scale) & ((store_t) - (store_t) !(LOAD(output) <= 0));                       \
            memcpy(out + j * (int64_t)sizeof value, &value, sizeof value);                                           \
        }                                                                                                            \
    }

TD_DEFINE_FUSED(f32, uint32_t, float, uint32_t, td_float, td_bits, td_bits, td_float)
TD_DEFINE_FUSED(f64, uint64_t, double, uint64_t, td_double, td_double_bits, td_double_bits, td_double)
TD_DEFINE_FUSED(bf16, uint16_t, float, uint32_t, td_from_bf16, td_to_bf16, td_bits, td_float)
TD_DEFINE_FUSED(f16, uint16_t, float, uint32_t, td_from_f16, td_to_f16, td_bits, td_float)
#undef TD_DEFINE_FUSED

/* What is done with the draws, for one instruction set: included after philox.h, once for each.
 *
 * An element's draw is 32 bits: upper 16 from plane 0, lower 16 from plane 1, and it is kept when the draw is
 * below the threshold. The upper 16 decide unless they equal the threshold's own, once in 65,536, and only then
 * is plane 1 looked at. The planes live in the top bits of the block number, which no index reaches.
 */

/* The 16-bit draws of the first n elements of a chunk, or somewhat more. */
TD_TARGET static inline TD_INLINE void TD_NAME(draw_chunk)(uint64_t block, td_key key, uint16_t *draws, int64_t n) {
    uint32_t words[4 * TD_STEP];
    for (int b = 0; 8 * b < n; b += TD_STEP) {
        TD_NAME(philox_step)(block + (uint64_t)b, key, words);
        td_store_halves(draws + 8 * b, words, 4 * TD_STEP);
    }
}

/* Fills `draws` for the first n elements of a chunk and returns the cut: an element is kept when its draw is below it. */
TD_TARGET static inline TD_INLINE uint16_t TD_NAME(decide)(uint64_t block, td_key key, const td_law *law, uint16_t *draws,
                                                           int64_t n) {
    if (law->threshold >= TD_ONE) {
        memset(draws, 0, TD_CHUNK * sizeof *draws);
        return 1;
    }
    const uint16_t upper = (uint16_t)(law->threshold >> 16), lower = (uint16_t)(law->threshold & 0xffff);
    TD_NAME(draw_chunk)(block, key, draws, n);
    if (lower == 0) return upper;
    uint16_t tie = 0;
    for (int64_t j = 0; j < n; j++) tie |= (uint16_t)(draws[j] == upper);
    if (!tie) return upper;
    uint16_t second[TD_CHUNK];
    TD_NAME(draw_chunk)(block + TD_PLANE, key, second, n);
    for (int64_t j = 0; j < n; j++)
        draws[j] = (uint16_t)-(uint16_t)!(draws[j] < upper || (draws[j] == upper && second[j] < lower));
    return 1;
}

/* out = kept ? in * scale : 0, for one chunk or a part of one. */
#define TD_DEFINE_APPLY(dtype, store_t, real_t, LOAD, STORE)                                                         \
    TD_TARGET static inline TD_INLINE void TD_NAME(apply_##dtype)(char *out, const char *in, const uint16_t *draws, \
                                                                  uint16_t cut, const td_law *law, int64_t n) {     \
        const real_t scale = (real_t)law->scale;                                                                     \
        TD_INDEPENDENT                                                                                               \
        for (int64_t j = 0; j < n; j++) {                                                                            \
            store_t value, mask = (store_t) - (store_t)(draws[j] < cut);                                             \
            memcpy(&value, in + j * (int64_t)sizeof value, sizeof value);                                            \
            value = STORE(LOAD(value) * scale) & mask;                                                               \
            memcpy(out + j * (int64_t)sizeof value, &value, sizeof value);                                           \
        }                                                                                                            \
    }

/* The same with a shift and a fill, and the loops over chunks and over rows. The shift is left out where it is zero,
 * because adding it would turn -0 into 0. */
#define TD_DEFINE_DTYPE(dtype, store_t, real_t, LOAD, STORE)                                                         \
    TD_TARGET static inline TD_INLINE void TD_NAME(shifted_##dtype)(                                                 \
        char *out, const char *in, const uint16_t *draws, uint16_t cut, const td_law *law, int64_t n) {             \
        const real_t scale = (real_t)law->scale, shift = (real_t)law->shift;                                         \
        const store_t fill = STORE((real_t)law->fill);                                                               \
        TD_INDEPENDENT                                                                                               \
        for (int64_t j = 0; j < n; j++) {                                                                            \
            store_t value, mask = (store_t) - (store_t)(draws[j] < cut);                                             \
            memcpy(&value, in + j * (int64_t)sizeof value, sizeof value);                                            \
            value = (store_t)((STORE(LOAD(value) * scale + shift) & mask) | (fill & (store_t)~mask));                \
            memcpy(out + j * (int64_t)sizeof value, &value, sizeof value);                                           \
        }                                                                                                            \
    }                                                                                                                \
    TD_TARGET static void TD_NAME(masked_##dtype)(char *out, const char *in, uint64_t index, int64_t n, td_key key, \
                                                  const td_law *law) {                                              \
        const int shifted = law->shift != 0 || law->fill != 0;                                                       \
        uint16_t draws[TD_CHUNK];                                                                                    \
        while (n > 0) {                                                                                              \
            const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n);                            \
            if (take == TD_CHUNK && !shifted) {                                                                      \
                for (int64_t b = 0; b < TD_CHUNK * (int64_t)sizeof(store_t); b += 64) {                              \
                    TD_PREFETCH(in + b, 0);                                                                          \
                    TD_PREFETCH(out + b, 1);                                                                         \
                }                                                                                                    \
                const uint16_t cut = TD_NAME(decide)(index / 8, key, law, draws, TD_CHUNK);                          \
                TD_NAME(apply_##dtype)(out, in, draws, cut, law, TD_CHUNK);                                          \
            } else {                                                                                                 \
                const uint16_t cut = TD_NAME(decide)(index / 8, key, law, draws, skip + take);                       \
                if (shifted)                                                                                         \
                    TD_NAME(shifted_##dtype)(out, in, draws + skip, cut, law, take);                                 \
                else                                                                                                 \
                    TD_NAME(apply_##dtype)(out, in, draws + skip, cut, law, take);                                   \
            }                                                                                                        \
            out += take * (int64_t)sizeof(store_t);                                                                  \
            in += take * (int64_t)sizeof(store_t);                                                                   \
            index += (uint64_t)take;                                                                                 \
            n -= take;                                                                                               \
        }                                                                                                            \
    }                                                                                                                \
    /* A row of a tensor with any strides, counted in elements; `kept` holds a byte an element of the mask. */       \
    TD_TARGET static void TD_NAME(spread_##dtype)(char *out, const char *in, const uint8_t *kept, int64_t n,        \
                                                  int64_t out_stride, int64_t in_stride, int64_t kept_stride,       \
                                                  const td_law *law) {                                              \
        const int shifted = law->shift != 0 || law->fill != 0;                                                       \
        const real_t scale = (real_t)law->scale, shift = (real_t)law->shift;                                         \
        const store_t fill = STORE((real_t)law->fill);                                                               \
        if (kept_stride == 0 && !kept[0]) {                                                                          \
            for (int64_t j = 0; j < n; j++) memcpy(out + j * out_stride * (int64_t)sizeof fill, &fill, sizeof fill); \
        } else if (out_stride == 1 && in_stride == 1 && kept_stride == 0 && !shifted) {                              \
            TD_INDEPENDENT                                                                                           \
            for (int64_t j = 0; j < n; j++) {                                                                        \
                store_t value;                                                                                       \
                memcpy(&value, in + j * (int64_t)sizeof value, sizeof value);                                        \
                value = STORE(LOAD(value) * scale);                                                                  \
                memcpy(out + j * (int64_t)sizeof value, &value, sizeof value);                                       \
            }                                                                                                        \
        } else {                                                                                                     \
            TD_INDEPENDENT                                                                                           \
            for (int64_t j = 0; j < n; j++) {                                                                        \
                store_t value, mask = (store_t) - (store_t)kept[j * kept_stride];                                    \
                memcpy(&value, in + j * in_stride * (int64_t)sizeof value, sizeof value);                            \
                value = shifted ? STORE(LOAD(value) * scale + shift) : STORE(LOAD(value) * scale);                   \
                value = (store_t)((value & mask) | (fill & (store_t)~mask));                                         \
                memcpy(out + j * out_stride * (int64_t)sizeof value, &value, sizeof value);                          \
            }                                                                                                        \
        }                                                                                                            \
    }

TD_DEFINE_APPLY(f32, uint32_t, float, td_float, td_bits)
TD_DEFINE_APPLY(f64, uint64_t, double, td_double, td_double_bits)
TD_DEFINE_APPLY(bf16, uint16_t, float, td_from_bf16, td_to_bf16)
#ifdef TD_SCALE_HALVES
/* float16 with the processor's own conversions. */
TD_TARGET static inline TD_INLINE void TD_NAME(apply_f16)(char *out, const char *in, const uint16_t *draws, uint16_t cut,
                                                          const td_law *law, int64_t n) {
    const float scale = (float)law->scale;
    uint16_t scaled[TD_CHUNK];
    int64_t j = 0;
    for (; j + TD_HALVES_AT_ONCE <= n; j += TD_HALVES_AT_ONCE) TD_SCALE_HALVES(scaled + j, in + 2 * j, scale);
    for (; j < n; j++) {
        uint16_t value;
        memcpy(&value, in + 2 * j, sizeof value);
        scaled[j] = td_to_f16(td_from_f16(value) * scale);
    }
    for (j = 0; j < n; j++) scaled[j] &= (uint16_t) - (uint16_t)(draws[j] < cut);
    memcpy(out, scaled, (size_t)n * sizeof *scaled);
}
#else
TD_DEFINE_APPLY(f16, uint16_t, float, td_from_f16, td_to_f16)
#endif
#undef TD_DEFINE_APPLY

TD_DEFINE_DTYPE(f32, uint32_t, float, td_float, td_bits)
TD_DEFINE_DTYPE(f64, uint64_t, double, td_double, td_double_bits)
TD_DEFINE_DTYPE(bf16, uint16_t, float, td_from_bf16, td_to_bf16)
TD_DEFINE_DTYPE(f16, uint16_t, float, td_from_f16, td_to_f16)
#undef TD_DEFINE_DTYPE

/* One byte an element: 1 kept, 0 dropped. */
TD_TARGET static void TD_NAME(keep)(char *out, const char *in, uint64_t index, int64_t n, td_key key, const td_law *law) {
    uint16_t draws[TD_CHUNK];
    (void)in;
    while (n > 0) {
        const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n);
        const uint16_t cut = TD_NAME(decide)(index / 8, key, law, draws, skip + take);
        for (int64_t j = 0; j < take; j++) out[j] = (char)(draws[skip + j] < cut);
        out += take;
        index += (uint64_t)take;
        n -= take;
    }
}

/* The 32-bit draws themselves, as int64. */
TD_TARGET static void TD_NAME(draws)(char *out, const char *in, uint64_t index, int64_t n, td_key key, const td_law *law) {
    uint16_t upper[TD_CHUNK], lower[TD_CHUNK];
    (void)in;
    (void)law;
    while (n > 0) {
        const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n);
        TD_NAME(draw_chunk)(index / 8, key, upper, skip + take);
        TD_NAME(draw_chunk)(index / 8 + TD_PLANE, key, lower, skip + take);
        for (int64_t j = 0; j < take; j++) {
            int64_t draw = (int64_t)((uint32_t)upper[skip + j] << 16 | lower[skip + j]);
            memcpy(out + 8 * j, &draw, 8);
        }
        out += 8 * take;
        index += (uint64_t)take;
        n -= take;
    }
}

/* The mask of `samples` samples whose draws are strata of one draw: one byte an element, sample s from out + s * step on.
 * An element's draw in sample s is (shift + offsets[s][choice scaled to the family]) mod 2^32. */
TD_TARGET static void TD_NAME(stratified)(char *out, int64_t step, int64_t samples, uint64_t index, int64_t n, td_key shift,
                                          td_key choice, const uint32_t *offsets, int64_t family, uint64_t threshold) {
    uint64_t shifts[TD_CHUNK], choices[TD_CHUNK];
    uint32_t first[TD_CHUNK];
    int32_t member[TD_CHUNK];
    while (n > 0) {
        const int64_t take = td_min(TD_CHUNK, n);
        TD_NAME(draws)((char *)shifts, NULL, index, take, shift, NULL);
        TD_NAME(draws)((char *)choices, NULL, index, take, choice, NULL);
        for (int64_t j = 0; j < take; j++) {
            first[j] = (uint32_t)shifts[j];
            member[j] = (int32_t)(choices[j] * (uint64_t)family >> 32);
        }
        for (int64_t s = 0; s < samples; s++) {
            const uint32_t *row = offsets + s * family;
            char *to = out + s * step;
            TD_INDEPENDENT
            for (int64_t j = 0; j < take; j++) to[j] = (char)((uint64_t)(uint32_t)(first[j] + row[member[j]]) < threshold);
        }
        out += take;
        index += (uint64_t)take;
        n -= take;
    }
}

/* Standard normal variates in double precision by Box and Muller, two words to a pair, four values to a block. */
TD_TARGET static void TD_NAME(normal)(char *out, const char *in, uint64_t index, int64_t n, td_key key, const td_law *law) {
    uint32_t words[4 * TD_STEP];
    double radius[2 * TD_STEP], cosine[2 * TD_STEP], sine[2 * TD_STEP], values[4 * TD_STEP];
    (void)in;
    (void)law;
    while (n > 0) {
        const int64_t skip = (int64_t)(index % 4), take = td_min(4 * TD_STEP - skip, n);
        TD_NAME(philox_step)(index / 4 + 2 * TD_PLANE, key, words);
        for (int j = 0; j < 2 * TD_STEP; j++) {
            const double square = -2.0 * td_log(((double)words[2 * j] + 0.5) * 0x1p-32);
            radius[j] = square * (1.0 / sqrt(square));
            td_circle(words[2 * j + 1], &cosine[j], &sine[j]);
        }
        for (int j = 0; j < 2 * TD_STEP; j++) {
            values[2 * j] = radius[j] * cosine[j];
            values[2 * j + 1] = radius[j] * sine[j];
        }
        memcpy(out, values + skip, (size_t)take * 8);
        out += 8 * take;
        index += (uint64_t)take;
        n -= take;
    }
}

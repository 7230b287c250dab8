/* The kernels for one element type under one instruction set. This file is included once for each pair of them.
 *
 * The file that includes it defines
 *
 *     TD_ELEMENT          the suffix of this type's functions
 *     TD_STORED           an unsigned integer type of the element's size: elements are moved as bits
 *     TD_REAL             the floating-point type in which elements are computed
 *     TD_REAL_BITS        an unsigned integer type of the size of TD_REAL
 *     TD_LOAD             a function from TD_STORED to TD_REAL, which is exact
 *     TD_ROUND            a function from TD_REAL to TD_STORED, which rounds to nearest even
 *     TD_TO_BITS          the bits of a TD_REAL, as TD_REAL_BITS
 *     TD_FROM_BITS        the inverse of TD_TO_BITS
 *     TD_SCALE_MANY       optional: scales TD_MANY elements by the processor's own conversions
 *     TD_MANY             defined together with TD_SCALE_MANY
 *
 * and this file takes the definitions back at its end. Selects are made on bits, without branches, so that loops become
 * vector instructions and a dropped infinity or NaN is replaced. Elements need not be aligned, so they are read and
 * written by memcpy.
 */

#define TD_JOIN_(f, element) f##_##element
#define TD_JOIN(f, element) TD_JOIN_(f, element)
#define TD_NAME_OF(f) TD_NAME(f)
#define TD_TYPED(f) TD_NAME_OF(TD_JOIN(f, TD_ELEMENT))
#define TD_SIZE ((int64_t)sizeof(TD_STORED))

/* All bits of a TD_STORED are set where a condition is 1, and none where it is 0. */
#define TD_MASK(condition) ((TD_STORED) - (TD_STORED)(condition))

/* Brings a chunk of `in` and of `out` into the cache while its random bits are made. */
TD_TARGET static inline TD_INLINE void TD_TYPED(prefetch)(const char *out, const char *in) {
    for (int64_t b = 0; b < TD_CHUNK * TD_SIZE; b += 64) {
        TD_PREFETCH(in + b, 0);
        TD_PREFETCH(out + b, 1);
    }
}

/* out = kept ? in * scale : 0, for up to TD_CHUNK elements. */
TD_TARGET static inline TD_INLINE void TD_TYPED(scale)(char *out, const char *in, const uint16_t *bits, uint16_t limit,
                                                       const td_params *params, int64_t n) {
    const TD_REAL scale = (TD_REAL)params->scale;
#ifdef TD_SCALE_MANY
    TD_STORED scaled[TD_CHUNK];
    int64_t j = 0;
    for (; j + TD_MANY <= n; j += TD_MANY) TD_SCALE_MANY(scaled + j, in + j * TD_SIZE, scale);
    for (; j < n; j++) {
        TD_STORED value;
        memcpy(&value, in + j * TD_SIZE, sizeof value);
        scaled[j] = TD_ROUND(TD_LOAD(value) * scale);
    }
    for (j = 0; j < n; j++) scaled[j] &= TD_MASK(bits[j] < limit);
    memcpy(out, scaled, (size_t)n * sizeof *scaled);
#else
    TD_INDEPENDENT
    for (int64_t j = 0; j < n; j++) {
        TD_STORED value, mask = TD_MASK(bits[j] < limit);
        memcpy(&value, in + j * TD_SIZE, sizeof value);
        value = TD_ROUND(TD_LOAD(value) * scale) & mask;
        memcpy(out + j * TD_SIZE, &value, sizeof value);
    }
#endif
}

/* out = kept ? in * scale + shift : fill, for up to TD_CHUNK elements. */
TD_TARGET static inline TD_INLINE void TD_TYPED(scale_and_shift)(char *out, const char *in, const uint16_t *bits,
                                                                 uint16_t limit, const td_params *params, int64_t n) {
    const TD_REAL scale = (TD_REAL)params->scale, shift = (TD_REAL)params->shift;
    const TD_STORED fill = TD_ROUND((TD_REAL)params->fill);
    TD_INDEPENDENT
    for (int64_t j = 0; j < n; j++) {
        TD_STORED value, mask = TD_MASK(bits[j] < limit);
        memcpy(&value, in + j * TD_SIZE, sizeof value);
        const TD_REAL scaled = TD_LOAD(value) * scale; /* a name, because an expression may have excess precision */
        value = (TD_STORED)((TD_ROUND(scaled + shift) & mask) | (fill & (TD_STORED)~mask));
        memcpy(out + j * TD_SIZE, &value, sizeof value);
    }
}

/* TD_DROPOUT. The shift is left out where it is zero, because adding it would turn -0 into 0. */
TD_TARGET static void TD_TYPED(dropout)(char *out, const char *in, uint64_t index, int64_t n, td_key key,
                                        const td_params *params) {
    const int shifted = params->shift != 0 || params->fill != 0;
    uint16_t bits[TD_CHUNK];
    while (n > 0) {
        const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n);
        if (take == TD_CHUNK) TD_TYPED(prefetch)(out, in);
        const uint16_t limit = TD_NAME(decide)(index / 8, key, params, bits, skip + take);
        if (shifted)
            TD_TYPED(scale_and_shift)(out, in, bits + skip, limit, params, take);
        else
            TD_TYPED(scale)(out, in, bits + skip, limit, params, take);
        out += take * TD_SIZE;
        in += take * TD_SIZE;
        index += (uint64_t)take;
        n -= take;
    }
}

/* TD_DROPOUT for a row of a tensor of any strides, under a mask that holds a byte for each element. */
TD_TARGET static void TD_TYPED(select)(char *out, const char *in, const uint8_t *kept, int64_t n, int64_t out_stride,
                                       int64_t in_stride, int64_t kept_stride, const td_params *params) {
    const int shifted = params->shift != 0 || params->fill != 0;
    const TD_REAL scale = (TD_REAL)params->scale, shift = (TD_REAL)params->shift;
    const TD_STORED fill = TD_ROUND((TD_REAL)params->fill);
    if (kept_stride == 0 && !kept[0]) {
        for (int64_t j = 0; j < n; j++) memcpy(out + j * out_stride * TD_SIZE, &fill, sizeof fill);
    } else if (out_stride == 1 && in_stride == 1 && kept_stride == 0 && !shifted) {
        TD_INDEPENDENT
        for (int64_t j = 0; j < n; j++) {
            TD_STORED value;
            memcpy(&value, in + j * TD_SIZE, sizeof value);
            value = TD_ROUND(TD_LOAD(value) * scale);
            memcpy(out + j * TD_SIZE, &value, sizeof value);
        }
    } else {
        TD_INDEPENDENT
        for (int64_t j = 0; j < n; j++) {
            TD_STORED value, mask = TD_MASK(kept[j * kept_stride]);
            memcpy(&value, in + j * in_stride * TD_SIZE, sizeof value);
            const TD_REAL scaled = TD_LOAD(value) * scale;
            value = shifted ? TD_ROUND(scaled + shift) : TD_ROUND(scaled);
            value = (TD_STORED)((value & mask) | (fill & (TD_STORED)~mask));
            memcpy(out + j * out_stride * TD_SIZE, &value, sizeof value);
        }
    }
}

/* TD_DROPOUT_ADD for up to TD_CHUNK elements, with a bias for each of them if `biased`. */
TD_TARGET static inline TD_INLINE void TD_TYPED(add_chunk)(char *out, const char *in, const TD_REAL *biases,
                                                           const char *other, const uint16_t *bits, uint16_t limit,
                                                           TD_REAL scale, int biased, int64_t n) {
    TD_INDEPENDENT
    for (int64_t j = 0; j < n; j++) {
        TD_STORED value, addend;
        const TD_REAL_BITS mask = (TD_REAL_BITS) - (TD_REAL_BITS)(bits[j] < limit);
        memcpy(&value, in + j * TD_SIZE, sizeof value);
        memcpy(&addend, other + j * TD_SIZE, sizeof addend);
        const TD_REAL sum = biased ? TD_LOAD(value) + biases[j] : TD_LOAD(value);
        value = TD_ROUND(TD_LOAD(addend) + TD_FROM_BITS(TD_TO_BITS(sum * scale) & mask));
        memcpy(out + j * TD_SIZE, &value, sizeof value);
    }
}

TD_TARGET static void TD_TYPED(dropout_add)(char *out, const char *in, const char *bias, int64_t columns,
                                            const char *other, int64_t index, int64_t n, td_key key,
                                            const td_params *params) {
    const TD_REAL scale = (TD_REAL)params->scale;
    uint16_t bits[TD_CHUNK];
    TD_REAL biases[TD_CHUNK];
    const int64_t end = index + n;
    while (index < end) {
        const int64_t skip = index % 8, take = td_min(TD_CHUNK - skip, end - index);
        const char *from = in + index * TD_SIZE, *with = other + index * TD_SIZE;
        char *to = out + index * TD_SIZE;
        if (take == TD_CHUNK)
            for (int64_t b = 0; b < TD_CHUNK * TD_SIZE; b += 64) {
                TD_PREFETCH(from + b, 0);
                TD_PREFETCH(with + b, 0);
                TD_PREFETCH(to + b, 1);
            }
        const uint16_t limit = TD_NAME(decide)((uint64_t)index / 8, key, params, bits, skip + take);
        if (bias) {
            for (int64_t j = 0, column = index % columns; j < take; column = 0) {
                const int64_t run = td_min(columns - column, take - j);
                for (int64_t i = 0; i < run; i++) {
                    TD_STORED value;
                    memcpy(&value, bias + (column + i) * TD_SIZE, sizeof value);
                    biases[j + i] = TD_LOAD(value);
                }
                j += run;
            }
            TD_TYPED(add_chunk)(to, from, biases, with, bits + skip, limit, scale, 1, take);
        } else {
            TD_TYPED(add_chunk)(to, from, biases, with, bits + skip, limit, scale, 0, take);
        }
        index += take;
    }
}

TD_TARGET static void TD_TYPED(relu_dropout)(char *out, const char *in, uint64_t index, int64_t n, td_key key,
                                             const td_params *params) {
    const TD_REAL scale = (TD_REAL)params->scale;
    uint16_t bits[TD_CHUNK];
    while (n > 0) {
        const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n);
        if (take == TD_CHUNK) TD_TYPED(prefetch)(out, in);
        const uint16_t limit = TD_NAME(decide)(index / 8, key, params, bits, skip + take);
        TD_INDEPENDENT
        for (int64_t j = 0; j < take; j++) {
            TD_STORED value;
            memcpy(&value, in + j * TD_SIZE, sizeof value);
            const TD_STORED mask = TD_MASK(bits[skip + j] < limit), positive = TD_MASK(!(TD_LOAD(value) <= 0));
            value = TD_ROUND(TD_LOAD(value) * scale) & mask & positive;
            memcpy(out + j * TD_SIZE, &value, sizeof value);
        }
        out += take * TD_SIZE;
        in += take * TD_SIZE;
        index += (uint64_t)take;
        n -= take;
    }
}

/* TD_RELU_DROPOUT_BACKWARD, where `other` is the output of TD_RELU_DROPOUT. */
TD_TARGET static void TD_TYPED(relu_dropout_backward)(char *out, const char *in, const char *bias, int64_t columns,
                                                      const char *other, int64_t index, int64_t n, td_key key,
                                                      const td_params *params) {
    const TD_REAL scale = (TD_REAL)params->scale;
    (void)bias;
    (void)columns;
    (void)key;
    TD_INDEPENDENT
    for (int64_t j = index; j < index + n; j++) {
        TD_STORED value, output;
        memcpy(&value, in + j * TD_SIZE, sizeof value);
        memcpy(&output, other + j * TD_SIZE, sizeof output);
        value = TD_ROUND(TD_LOAD(value) * scale) & TD_MASK(!(TD_LOAD(output) <= 0));
        memcpy(out + j * TD_SIZE, &value, sizeof value);
    }
}

#undef TD_JOIN_
#undef TD_JOIN
#undef TD_NAME_OF
#undef TD_TYPED
#undef TD_SIZE
#undef TD_MASK
#undef TD_ELEMENT
#undef TD_STORED
#undef TD_REAL
#undef TD_REAL_BITS
#undef TD_LOAD
#undef TD_ROUND
#undef TD_TO_BITS
#undef TD_FROM_BITS
#undef TD_SCALE_MANY
#undef TD_MANY

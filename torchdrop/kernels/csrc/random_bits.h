/* Masks, random bits and normal variates for one instruction set. This file is included after philox.h.
 *
 * An element has 32 random bits: the upper 16 are in plane 0 and the lower 16 in plane 1. It is kept where the number
 * that they make is below the threshold. The upper 16 bits decide that unless they are equal to those of the threshold,
 * which happens once in 65,536 times, and only then is plane 1 looked at. Planes differ in the top bits of the block
 * number, which no index reaches.
 */

/* Makes 16 random bits for each of the first n elements of a chunk, or for somewhat more. */
TD_TARGET static inline TD_INLINE void TD_NAME(fill_bits)(uint64_t block, td_key key, uint16_t *bits, int64_t n) {
    uint32_t words[4 * TD_STEP];
    for (int b = 0; 8 * b < n; b += TD_STEP) {
        TD_NAME(philox_step)(block + (uint64_t)b, key, words);
        td_store_halves(bits + 8 * b, words, 4 * TD_STEP);
    }
}

/* Decides a chunk in which bits of plane 0 are equal to the upper half of the threshold, and returns the limit of the bits
 * that it leaves. That is rare, so its code is there once and not in every kernel. */
TD_TARGET static TD_NOINLINE uint16_t TD_NAME(decide_ties)(uint64_t block, td_key key, uint16_t upper, uint16_t lower,
                                                           uint16_t *bits, int64_t n) {
    uint16_t second[TD_CHUNK];
    TD_NAME(fill_bits)(block + TD_PLANE, key, second, n);
    for (int64_t j = 0; j < n; j++)
        bits[j] = (uint16_t)-(uint16_t)!(bits[j] < upper || (bits[j] == upper && second[j] < lower));
    return 1;
}

/* Fills `bits` for the first n elements of a chunk, and returns a limit. An element is kept where its bits are below
 * the limit. */
TD_TARGET static inline TD_INLINE uint16_t TD_NAME(decide)(uint64_t block, td_key key, const td_params *params,
                                                           uint16_t *bits, int64_t n) {
    if (params->threshold >= TD_ONE) {
        memset(bits, 0, TD_CHUNK * sizeof *bits);
        return 1;
    }
    const uint16_t upper = (uint16_t)(params->threshold >> 16), lower = (uint16_t)(params->threshold & 0xffff);
    TD_NAME(fill_bits)(block, key, bits, n);
    if (lower == 0) return upper;
    uint16_t tie = 0;
    for (int64_t j = 0; j < n; j++) tie |= (uint16_t)(bits[j] == upper);
    return tie ? TD_NAME(decide_ties)(block, key, upper, lower, bits, n) : upper;
}

/* Returns the bits of the elements from `index` on, and lowers n to the number of those that are there. */
TD_TARGET static inline TD_INLINE const uint16_t *TD_NAME(decided_from)(td_decided *decided, uint64_t index, td_key key,
                                                                       const td_params *params, int64_t *n) {
    if (!decided->filled || index - decided->first >= TD_CHUNK) {
        decided->first = index / 8 * 8;
        decided->limit = TD_NAME(decide)(index / 8, key, params, decided->bits, TD_CHUNK);
        decided->filled = 1;
    }
    const int64_t skip = (int64_t)(index - decided->first);
    *n = td_min(*n, TD_CHUNK - skip);
    return decided->bits + skip;
}

/* TD_KEEP_MASK: the byte is 1 where the element is kept, and 0 where it is dropped. */
TD_TARGET static void TD_NAME(keep_mask)(char *out, const char *in, uint64_t index, int64_t n, td_key key,
                                         const td_params *params) {
    uint16_t bits[TD_CHUNK];
    (void)in;
    while (n > 0) {
        const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n);
        const uint16_t limit = TD_NAME(decide)(index / 8, key, params, bits, skip + take);
        for (int64_t j = 0; j < take; j++) out[j] = (char)(bits[skip + j] < limit);
        out += take;
        index += (uint64_t)take;
        n -= take;
    }
}

/* TD_RANDOM_BITS */
TD_TARGET static void TD_NAME(random_bits)(char *out, const char *in, uint64_t index, int64_t n, td_key key,
                                           const td_params *params) {
    uint16_t upper[TD_CHUNK], lower[TD_CHUNK];
    (void)in;
    (void)params;
    while (n > 0) {
        const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n);
        TD_NAME(fill_bits)(index / 8, key, upper, skip + take);
        TD_NAME(fill_bits)(index / 8 + TD_PLANE, key, lower, skip + take);
        for (int64_t j = 0; j < take; j++) {
            int64_t both = (int64_t)((uint32_t)upper[skip + j] << 16 | lower[skip + j]);
            memcpy(out + 8 * j, &both, 8);
        }
        out += 8 * take;
        index += (uint64_t)take;
        n -= take;
    }
}

/* The masks of several samples, one byte for each element. Sample s begins at out + s * step.
 *
 * The number that is compared with the threshold is (shift + offsets[s][choice scaled to the family]) mod 2^32. The
 * shift and the choice are the element's random bits under the two keys. `family` is below 2^31. */
TD_TARGET static void TD_NAME(stratified)(char *out, int64_t step, int64_t samples, uint64_t index, int64_t n,
                                          td_key shift, td_key choice, const uint32_t *offsets, int64_t family,
                                          uint64_t threshold) {
    uint64_t shifts[TD_CHUNK], choices[TD_CHUNK];
    uint32_t first[TD_CHUNK];
    int32_t member[TD_CHUNK];
    while (n > 0) {
        const int64_t take = td_min(TD_CHUNK, n);
        TD_NAME(random_bits)((char *)shifts, NULL, index, take, shift, NULL);
        TD_NAME(random_bits)((char *)choices, NULL, index, take, choice, NULL);
        for (int64_t j = 0; j < take; j++) {
            first[j] = (uint32_t)shifts[j];
            member[j] = (int32_t)(choices[j] * (uint64_t)family >> 32);
        }
        for (int64_t s = 0; s < samples; s++) {
            const uint32_t *row = offsets + s * family;
            char *to = out + s * step;
            TD_INDEPENDENT
            for (int64_t j = 0; j < take; j++)
                to[j] = (char)((uint64_t)(uint32_t)(first[j] + row[member[j]]) < threshold);
        }
        out += take;
        index += (uint64_t)take;
        n -= take;
    }
}

/* TD_STANDARD_NORMAL: two words make a pair of variates by the method of Box and Muller, so a block makes four. */
TD_TARGET static void TD_NAME(standard_normal)(char *out, const char *in, uint64_t index, int64_t n, td_key key,
                                               const td_params *params) {
    uint32_t words[4 * TD_STEP];
    double radius[2 * TD_STEP], cosine[2 * TD_STEP], sine[2 * TD_STEP], values[4 * TD_STEP];
    (void)in;
    (void)params;
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

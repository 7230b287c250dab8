/* Conversions of numbers to their bits and back, and between float32 and the half types.
 *
 * Those round to nearest even. They have no branches, so that loops over them become vector instructions. A NaN becomes
 * what the processors' own conversions and PyTorch's make of it. */

static inline TD_INLINE double td_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline TD_INLINE uint64_t td_double_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline TD_INLINE float td_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline TD_INLINE uint32_t td_float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline TD_INLINE uint32_t td_select_bits(uint32_t mask, uint32_t yes, uint32_t no) {
    return (yes & mask) | (no & ~mask);
}

static inline TD_INLINE float td_from_bf16(uint16_t h) { return td_float((uint32_t)h << 16); }

static inline TD_INLINE uint16_t td_to_bf16(float value) {
    uint32_t u = td_float_bits(value);
    uint32_t nan = -(uint32_t)((u & 0x7fffffffu) > 0x7f800000u);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)td_select_bits(nan, 0x7fc0u, rounded);
}

static inline TD_INLINE float td_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t special = -(uint32_t)(magnitude >= 0x0f800000u), small = -(uint32_t)(magnitude < 0x00800000u);
    uint32_t normal = magnitude + (112u << 23) + (special & (112u << 23));
    uint32_t subnormal = td_float_bits(td_float(magnitude + (113u << 23)) - td_float(113u << 23));
    return td_float(td_select_bits(small, subnormal, normal) | sign);
}

static inline TD_INLINE uint16_t td_to_f16(float value) {
    uint32_t u = td_float_bits(value), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    uint32_t nan = -(uint32_t)(a > 0x7f800000u);
    uint32_t large = -(uint32_t)(a >= (143u << 23)), small = -(uint32_t)(a < (113u << 23));
    uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
    /* The addition of 1/2 leaves the subnormal half in the low bits of the sum, and rounds it. */
    uint32_t subnormal = td_float_bits(td_float(td_select_bits(small, a, 0)) + 0.5f) - 0x3f000000u;
    uint32_t finite = td_select_bits(small, subnormal, normal);
    return (uint16_t)(sign | td_select_bits(nan, 0x7e00u | (a >> 13 & 0x1ffu), td_select_bits(large, 0x7c00u, finite)));
}

/* Stores 32-bit words as pairs of 16-bit numbers, the lower half of a word first. */
static inline TD_INLINE void td_store_halves(uint16_t *halves, const uint32_t *words, int n) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    memcpy(halves, words, (size_t)n * sizeof *words);
#else
    for (int j = 0; j < n; j++) {
        halves[2 * j] = (uint16_t)words[j];
        halves[2 * j + 1] = (uint16_t)(words[j] >> 16);
    }
#endif
}

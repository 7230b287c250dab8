/* Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) for many blocks at a time.
 *
 * This file is included once for each instruction set: TD_ISA names it, and TD_NAME(f) gives f its suffix. A block is
 * four 32-bit words, a function of
 *
 *     counter = (block number: 64 bits, stream: 64 bits)      key = seed: 64 bits
 *
 * The vector forms keep a 32-bit word in each 64-bit lane. A widening multiplication reads only the lower half of a
 * lane, so what is left in the upper half does no harm until the words are packed at the end. The upper half of a
 * product is brought down by a shuffle and not by a shift, because shifts and multiplications use the same execution
 * port.
 */

#if TD_ISA == 512
#define TD_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define TD_NAME(f) f##_avx512
#define TD_LANES 8
#define TD_VECTORS 4
#define TD_VEC __m512i
#define TD_SPLAT(a) _mm512_set1_epi64((long long)(a))
#define TD_MUL(a, m) _mm512_mul_epu32(a, _mm512_set1_epi64((long long)(m)))
#define TD_HIGH(a) _mm512_shuffle_epi32(a, _MM_PERM_DDBB)
#define TD_XOR3(a, b, c) _mm512_ternarylogic_epi64(a, b, c, 0x96)
#define TD_PACK(lo, hi) _mm512_mask_shuffle_epi32(lo, 0xAAAA, hi, _MM_PERM_CCAA)
#define TD_COUNT _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)
#define TD_ADD _mm512_add_epi64
#define TD_SHIFT(a) _mm512_srli_epi64(a, 32)
#define TD_STORE(to, a, b)                                                                                           \
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(a, _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), b));           \
    _mm512_storeu_si512((to) + 16, _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4), b))
#define TD_HALVES_AT_ONCE 16
#define TD_SCALE_HALVES(to, from, scale)                                                                             \
    _mm256_storeu_si256((__m256i *)(to),                                                                             \
                        _mm512_cvtps_ph(_mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from))), \
                                                      _mm512_set1_ps(scale)),                                        \
                                        _MM_FROUND_TO_NEAREST_INT))
#elif TD_ISA == 2
#define TD_TARGET __attribute__((target("avx2,f16c")))
#define TD_NAME(f) f##_avx2
#define TD_LANES 4
#define TD_VECTORS 4
#define TD_VEC __m256i
#define TD_SPLAT(a) _mm256_set1_epi64x((long long)(a))
#define TD_MUL(a, m) _mm256_mul_epu32(a, _mm256_set1_epi64x((long long)(m)))
#define TD_HIGH(a) _mm256_shuffle_epi32(a, 0xF5)
#define TD_XOR3(a, b, c) _mm256_xor_si256(_mm256_xor_si256(a, b), c)
#define TD_PACK(lo, hi) _mm256_blend_epi32(lo, _mm256_shuffle_epi32(hi, 0xA0), 0xAA)
#define TD_COUNT _mm256_set_epi64x(3, 2, 1, 0)
#define TD_ADD _mm256_add_epi64
#define TD_SHIFT(a) _mm256_srli_epi64(a, 32)
#define TD_WEAVE(a, b, which) _mm256_permute2x128_si256(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b), which)
#define TD_STORE(to, a, b)                                                                                           \
    _mm256_storeu_si256((__m256i *)(to), TD_WEAVE(a, b, 0x20));                                                     \
    _mm256_storeu_si256((__m256i *)((to) + 8), TD_WEAVE(a, b, 0x31))
#define TD_HALVES_AT_ONCE 8
#define TD_SCALE_HALVES(to, from, scale)                                                                             \
    _mm_storeu_si128((__m128i *)(to),                                                                                \
                     _mm256_cvtps_ph(_mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from))),       \
                                                   _mm256_set1_ps(scale)),                                           \
                                     _MM_FROUND_TO_NEAREST_INT))
#else
#define TD_TARGET
#define TD_NAME(f) f##_plain
#define TD_LANES 32
#define TD_VECTORS 1
#endif

#define TD_STEP (TD_LANES * TD_VECTORS) /* so many blocks are made at a time */

/* Makes TD_STEP consecutive blocks: four words for each, in order. */
TD_TARGET static inline TD_INLINE void TD_NAME(philox_step)(uint64_t block, td_key key, uint32_t *words) {
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
#ifdef TD_VEC
    TD_VEC c0[TD_VECTORS], c1[TD_VECTORS], c2[TD_VECTORS], c3[TD_VECTORS];
    TD_UNROLL(4)
    for (int v = 0; v < TD_VECTORS; v++) {
        c0[v] = TD_ADD(TD_SPLAT(block + (uint64_t)v * TD_LANES), TD_COUNT);
        c1[v] = TD_SHIFT(c0[v]);
        c2[v] = TD_SPLAT(key.stream);
        c3[v] = TD_SPLAT(key.stream >> 32);
    }
    TD_UNROLL(10)
    for (int r = 0; r < TD_ROUNDS; r++) {
        TD_UNROLL(4)
        for (int v = 0; v < TD_VECTORS; v++) {
            TD_VEC p0 = TD_MUL(c0[v], TD_M0), p1 = TD_MUL(c2[v], TD_M1);
            c0[v] = TD_XOR3(TD_HIGH(p1), c1[v], TD_SPLAT(k0));
            c2[v] = TD_XOR3(TD_HIGH(p0), c3[v], TD_SPLAT(k1));
            c1[v] = p1;
            c3[v] = p0;
        }
        k0 += TD_W0;
        k1 += TD_W1;
    }
    TD_UNROLL(4)
    for (int v = 0; v < TD_VECTORS; v++) {
        TD_VEC a = TD_PACK(c0[v], c1[v]), b = TD_PACK(c2[v], c3[v]);
        TD_STORE(words + v * 4 * TD_LANES, a, b);
    }
#else
    uint32_t c0[TD_STEP], c1[TD_STEP], c2[TD_STEP], c3[TD_STEP];
    for (int j = 0; j < TD_STEP; j++) {
        uint64_t number = block + (uint64_t)j;
        c0[j] = (uint32_t)number;
        c1[j] = (uint32_t)(number >> 32);
        c2[j] = (uint32_t)key.stream;
        c3[j] = (uint32_t)(key.stream >> 32);
    }
    for (int r = 0; r < TD_ROUNDS; r++) {
        for (int j = 0; j < TD_STEP; j++) {
            uint64_t p0 = (uint64_t)TD_M0 * c0[j], p1 = (uint64_t)TD_M1 * c2[j];
            c0[j] = (uint32_t)(p1 >> 32) ^ c1[j] ^ k0;
            c2[j] = (uint32_t)(p0 >> 32) ^ c3[j] ^ k1;
            c1[j] = (uint32_t)p1;
            c3[j] = (uint32_t)p0;
        }
        k0 += TD_W0;
        k1 += TD_W1;
    }
    for (int j = 0; j < TD_STEP; j++) {
        words[4 * j] = c0[j];
        words[4 * j + 1] = c1[j];
        words[4 * j + 2] = c2[j];
        words[4 * j + 3] = c3[j];
    }
#endif
}

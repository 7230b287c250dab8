/* The native backend: masked linear maps whose mask is a function of (seed, stream, index).
 *
 * Plain C with no link to Python or to libtorch: addresses, sizes and keys come in, nothing is kept between calls.
 * Addresses need not be aligned. Elements are counted in 64 bits. One function table for each instruction set is
 * compiled in and the best that the processor has is taken; all give the same bits.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__) && !defined(TD_PLAIN)
#define TD_X86 1
#include <immintrin.h>
#endif

#ifdef _WIN32
#define TD_EXPORT __declspec(dllexport)
#else
#define TD_EXPORT __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define TD_INLINE __attribute__((always_inline))
#else
#define TD_INLINE
#endif
#define TD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TD_UNROLL(n) TD_PRAGMA(unroll n)
#define TD_INDEPENDENT TD_PRAGMA(clang loop vectorize(assume_safety))
#elif defined(__GNUC__)
#define TD_UNROLL(n) TD_PRAGMA(GCC unroll n)
#define TD_INDEPENDENT TD_PRAGMA(GCC ivdep)
#else
#define TD_UNROLL(n)
#define TD_INDEPENDENT
#endif

#if defined(__GNUC__)
#define TD_PREFETCH(address, write) __builtin_prefetch(address, write)
#else
#define TD_PREFETCH(address, write) ((void)0)
#endif

#define TD_M0 0xD2511F53u
#define TD_M1 0xCD9E8D57u
#define TD_W0 0x9E3779B9u
#define TD_W1 0xBB67AE85u
#define TD_ROUNDS 10

#define TD_CHUNK 256                    /* elements decided at a time */
#define TD_GRAIN 16384                  /* elements that are worth a thread */
#define TD_BRIEF 2048                   /* elements up to which 256-bit vectors are the faster ones */
#define TD_BLANK 512                    /* bytes from which on a group is set to zero by memset */
#define TD_ONE (UINT64_C(1) << 32)      /* the threshold of keep_prob 1 */
#define TD_PLANE (UINT64_C(1) << 61)

typedef struct {
    uint64_t seed, stream;
} td_key;

typedef struct {
    uint64_t threshold;
    double scale, shift, fill;
} td_law;

typedef void (*td_masked_fn)(char *out, const char *in, uint64_t index, int64_t n, td_key key, const td_law *law);
typedef void (*td_spread_fn)(char *out, const char *in, const uint8_t *kept, int64_t n, int64_t out_stride,
                             int64_t in_stride, int64_t kept_stride, const td_law *law);

typedef void (*td_stratified_fn)(char *out, int64_t step, int64_t samples, uint64_t index, int64_t n, td_key shift,
                                 td_key choice, const uint32_t *offsets, int64_t family, uint64_t threshold);

typedef void (*td_fused_fn)(char *out, const char *in, const char *bias, int64_t columns, const char *other, int64_t index,
                            int64_t n, td_key key, const td_law *law);

/* Kinds 0 to 3 are element types, float32, float64, bfloat16 and float16; 4 to 6 make something from the mask; 7 to 10
 * are the element types again, rectified first. */
enum { TD_KEEP = 4, TD_DRAWS = 5, TD_NORMAL = 6, TD_KINDS = 11 };
static const int64_t td_item_size[TD_KINDS] = {4, 8, 2, 2, 1, 8, 8, 4, 8, 2, 2};

typedef struct {
    td_masked_fn masked[TD_KINDS];
    td_spread_fn spread[4];
    td_stratified_fn stratified;
    td_fused_fn fused[2][4];
} td_kernels;

static inline int64_t td_min(int64_t a, int64_t b) { return a < b ? a : b; }

/* Words as pairs of 16-bit draws, the lower half first. */
static inline TD_INLINE void td_store_halves(uint16_t *draws, const uint32_t *words, int n) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    memcpy(draws, words, (size_t)n * sizeof *words);
#else
    for (int j = 0; j < n; j++) {
        draws[2 * j] = (uint16_t)words[j];
        draws[2 * j + 1] = (uint16_t)(words[j] >> 16);
    }
#endif
}

#include "numbers.h"
#include "normal.h"

#define TD_ISA 0
#include "kernels.h"
#ifdef TD_X86
#define TD_ISA 2
#include "kernels.h"
#define TD_ISA 512
#include "kernels.h"
#endif

static const td_kernels *td_best(void) {
#ifdef TD_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return &kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return &kernels_avx2;
#endif
    return &kernels_plain;
}

/* The widest set allowed by `width` (0 plain, 2 AVX2, 512 AVX-512); negative means any. */
static const td_kernels *td_table(int width) {
#ifdef TD_X86
    const td_kernels *best = td_best();
    if (width < 0 || width >= 512) return best;
    if (width >= 2 && best != &kernels_plain) return &kernels_avx2;
    return &kernels_plain;
#else
    (void)width;
    return td_best();
#endif
}

static td_law td_read_law(const double *p) {
    double scale, threshold;
    td_law law;
    memcpy(&threshold, p, sizeof threshold);
    memcpy(&scale, p + 1, sizeof scale);
    law.threshold = !(threshold > 0) ? 0 : threshold >= 4294967296.0 ? TD_ONE : (uint64_t)threshold;
    law.scale = scale;
    memcpy(&law.shift, p + 2, sizeof law.shift);
    memcpy(&law.fill, p + 3, sizeof law.fill);
    return law;
}

static td_key td_read_key(const void *p) {
    td_key key;
    memcpy(&key.seed, p, sizeof key.seed);
    memcpy(&key.stream, (const char *)p + sizeof key.seed, sizeof key.stream);
    return key;
}

/* Elements [from, to) of `rows` rows laid end to end. Row r belongs to key r / rows_per_key and starts at index
 * start + (r % rows_per_key) * pitch of that key's mask. */
static void td_span(const td_kernels *kernels, int kind, char *out, const char *in, int64_t from, int64_t to, int64_t length,
                    int64_t rows_per_key, uint64_t start, int64_t pitch, const int64_t *keys, const double *laws,
                    int64_t law_step) {
    const int64_t size = td_item_size[kind];
    while (from < to) {
        const int64_t row = from / length, column = from % length, take = td_min(length - column, to - from);
        const td_law law = td_read_law(laws + row * law_step);
        const uint64_t index = start + (uint64_t)(row % rows_per_key) * (uint64_t)pitch + (uint64_t)column;
        kernels->masked[kind](out + from * size, in ? in + from * size : NULL, index, take,
                              td_read_key(keys + 2 * (row / rows_per_key)), &law);
        from += take;
    }
}

/* out[i] = kept(i) ? in[i] * scale + shift : fill for contiguous `out` and `in`, or what the kind makes of the draws.
 *
 * Rows of `length` elements that share a key are `pitch` apart in its mask, and the first begins at `start`.
 * keys: two words for every rows_per_key rows. laws: threshold, scale, shift and fill, one set for all rows
 * (law_step 0) or one a row (law_step 4). out may be in.
 */
TD_EXPORT void td_masked(int kind, void *out, const void *in, int64_t rows, int64_t length, int64_t rows_per_key,
                         uint64_t start, int64_t pitch, const int64_t *keys, const double *laws, int64_t law_step,
                         int threads, int width) {
    const td_kernels *kernels = td_table(width);
    const int64_t total = rows * length;
    if (total <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && total >= 2 * TD_GRAIN) {
        const int64_t grains = (total + TD_GRAIN - 1) / TD_GRAIN;
        const int team = (int)td_min(threads, grains);
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t g = 0; g < grains; g++)
            td_span(kernels, kind, out, in, g * TD_GRAIN, td_min((g + 1) * TD_GRAIN, total), length, rows_per_key, start,
                    pitch, keys, laws, law_step);
        return;
    }
#endif
    (void)threads;
    td_span(kernels, kind, out, in, 0, total, length, rows_per_key, start, pitch, keys, laws, law_step);
}

/* One row, one key, from index 0, with fewer arguments: small tensors feel each of them. A short burst of 512-bit
 * instructions costs more than it saves. The key need not be aligned. */
TD_EXPORT void td_masked_row(int kind, void *out, const void *in, int64_t length, const void *key, const double *law,
                             int threads) {
    if (threads > 1 && length >= 2 * TD_GRAIN) {
        int64_t words[2];
        memcpy(words, key, sizeof words);
        td_masked(kind, out, in, 1, length, 1, 0, length, words, law, 0, threads, -1);
    } else if (length > 0) {
        const td_law read = td_read_law(law);
        td_table(length <= TD_BRIEF ? 2 : -1)->masked[kind](out, in, 0, length, td_read_key(key), &read);
    }
}

/* Groups [from, to) of `size` neighbors that share a draw. */
static void td_groups(const td_kernels *kernels, int kind, char *out, const char *in, int64_t from, int64_t to, int64_t size,
                      td_key key, const td_law *law) {
    const int64_t step = size * td_item_size[kind];
    const int blank = law->fill == 0.0 && step >= TD_BLANK;
    char kept[TD_CHUNK];
    while (from < to) {
        const int64_t take = td_min(TD_CHUNK, to - from);
        kernels->masked[TD_KEEP](kept, NULL, (uint64_t)from, take, key, law);
        for (int64_t g = 0; g < take; g++) {
            if (!kept[g] && blank) {
                memset(out + (from + g) * step, 0, (size_t)step); /* what is dropped need not be read */
                continue;
            }
            kernels->spread[kind](out + (from + g) * step, in + (from + g) * step, (const uint8_t *)kept + g, size, 1, 1, 0,
                                  law);
        }
        from += take;
    }
}

/* out = kept ? in * scale + shift : fill for contiguous tensors in which every `size` neighbors share a draw. */
TD_EXPORT void td_grouped(int kind, void *out, const void *in, int64_t groups, int64_t size, const void *key,
                          const double *laws, int threads) {
    const td_kernels *kernels = td_best();
    const td_law law = td_read_law(laws);
    const td_key read = td_read_key(key);
    if (groups <= 0 || size <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && groups > 1 && groups * size >= 2 * TD_GRAIN) {
        const int64_t pieces = td_min(groups, threads);
#pragma omp parallel for num_threads((int)pieces) schedule(static)
        for (int64_t p = 0; p < pieces; p++)
            td_groups(kernels, kind, out, in, groups * p / pieces, groups * (p + 1) / pieces, size, read, &law);
        return;
    }
#endif
    (void)threads;
    td_groups(kernels, kind, out, in, 0, groups, size, read, &law);
}

/* Elements [from, to) of the rows of one sample, for all samples. */
static void td_strata(const td_kernels *kernels, char *out, int64_t from, int64_t to, int64_t samples, int64_t rows,
                      int64_t length, const int64_t *shifts, const int64_t *choices, const uint32_t *offsets, int64_t family,
                      uint64_t threshold) {
    while (from < to) {
        const int64_t row = from / length, column = from % length, take = td_min(length - column, to - from);
        kernels->stratified(out + from, rows * length, samples, (uint64_t)column, take, td_read_key(shifts + 2 * row),
                            td_read_key(choices + 2 * row), offsets, family, threshold);
        from += take;
    }
}

/* A byte for each element of (samples, rows, length): whether it is kept in that sample.
 *
 * shifts, choices: two words of key a row. offsets: (samples, family), aligned; family is below 2^31. */
TD_EXPORT void td_stratified(void *out, int64_t samples, int64_t rows, int64_t length, const int64_t *shifts,
                             const int64_t *choices, const uint32_t *offsets, int64_t family, const double *laws, int threads,
                             int width) {
    const td_kernels *kernels = td_table(width);
    const int64_t total = rows * length;
    const uint64_t threshold = td_read_law(laws).threshold;
    if (total <= 0 || samples <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && total > TD_CHUNK && total * samples >= 2 * TD_GRAIN) {
        const int64_t pieces = td_min((total + TD_CHUNK - 1) / TD_CHUNK, 4 * (int64_t)threads);
        const int team = (int)td_min(threads, pieces);
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t p = 0; p < pieces; p++)
            td_strata(kernels, out, total * p / pieces, total * (p + 1) / pieces, samples, rows, length, shifts, choices,
                      offsets, family, threshold);
        return;
    }
#endif
    (void)threads;
    td_strata(kernels, out, 0, total, samples, rows, length, shifts, choices, offsets, family, threshold);
}

/* Operation 0: out = other + (kept ? (in + bias) * scale : 0). Operation 1: out = not other <= 0 ? in * scale : 0.
 *
 * n contiguous elements under one key, from index 0; `bias` has `columns` elements, or is NULL. Operation 1 draws
 * nothing. */
TD_EXPORT void td_fused(int operation, int kind, void *out, const void *in, const void *bias, int64_t columns,
                        const void *other, int64_t n, const void *key, const double *laws, int threads, int width) {
    const td_fused_fn kernel = td_table(width)->fused[operation][kind];
    const td_law law = td_read_law(laws);
    const td_key read = td_read_key(key);
    if (n <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && n >= 2 * TD_GRAIN) {
        const int64_t grains = (n + TD_GRAIN - 1) / TD_GRAIN;
        const int team = (int)td_min(threads, grains);
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t g = 0; g < grains; g++)
            kernel(out, in, bias, columns, other, g * TD_GRAIN, td_min(TD_GRAIN, n - g * TD_GRAIN), read, &law);
        return;
    }
#endif
    (void)threads;
    kernel(out, in, bias, columns, other, 0, n, read, &law);
}

#define TD_MAX_DIMS 64

/* Rows [from, to) of a tensor whose last dimension is a row; strides are in elements. */
static void td_spread_rows(const td_kernels *kernels, int kind, char *out, const char *in, const uint8_t *kept, int64_t from,
                           int64_t to, int dims, const int64_t *sizes, const int64_t *out_strides,
                           const int64_t *in_strides, const int64_t *kept_strides, const td_law *law) {
    const int64_t size = td_item_size[kind];
    const int last = dims - 1;
    int64_t at[TD_MAX_DIMS], rest = from, o = 0, i = 0, k = 0;
    for (int d = last - 1; d >= 0; d--) {
        at[d] = rest % sizes[d];
        rest /= sizes[d];
        o += at[d] * out_strides[d];
        i += at[d] * in_strides[d];
        k += at[d] * kept_strides[d];
    }
    for (int64_t row = from; row < to; row++) {
        kernels->spread[kind](out + o * size, in + i * size, kept + k, sizes[last], out_strides[last], in_strides[last],
                              kept_strides[last], law);
        for (int d = last - 1; d >= 0; d--) {
            o += out_strides[d];
            i += in_strides[d];
            k += kept_strides[d];
            if (++at[d] < sizes[d]) break;
            o -= sizes[d] * out_strides[d];
            i -= sizes[d] * in_strides[d];
            k -= sizes[d] * kept_strides[d];
            at[d] = 0;
        }
    }
}

/* out = kept ? in * scale + shift : fill for tensors of any strides and a mask of bytes that may be broadcast
 * (stride 0). One law for all. Returns 0, or 1 where there are too many dimensions. */
TD_EXPORT int td_spread(int kind, void *out, const void *in, const uint8_t *kept, int dims, const int64_t *sizes,
                        const int64_t *out_strides, const int64_t *in_strides, const int64_t *kept_strides,
                        const double *laws, int threads, int width) {
    const td_kernels *kernels = td_table(width);
    const td_law law = td_read_law(laws);
    int64_t rows = 1;
    if (dims < 1 || dims > TD_MAX_DIMS) return 1;
    for (int d = 0; d < dims - 1; d++) rows *= sizes[d];
    if (rows <= 0 || sizes[dims - 1] <= 0) return 0;
#ifdef _OPENMP
    if (threads > 1 && rows > 1 && rows * sizes[dims - 1] >= 2 * TD_GRAIN) {
        const int64_t pieces = td_min(rows, 4 * (int64_t)threads), step = (rows + pieces - 1) / pieces;
        const int team = (int)td_min(threads, pieces);
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t p = 0; p < pieces; p++)
            td_spread_rows(kernels, kind, out, in, kept, td_min(p * step, rows), td_min((p + 1) * step, rows), dims, sizes,
                           out_strides, in_strides, kept_strides, &law);
        return 0;
    }
#endif
    (void)threads;
    td_spread_rows(kernels, kind, out, in, kept, 0, rows, dims, sizes, out_strides, in_strides, kept_strides, &law);
    return 0;
}

/* Four Philox words of one block, for tests against published answers. */
TD_EXPORT void td_philox_block(uint64_t block, const int64_t *key, uint32_t *words) {
    uint32_t made[4 * 32];
    philox_step_plain(block, td_read_key(key), made);
    memcpy(words, made, 4 * sizeof *words);
}

/* 512, 2 or 0: the vector instructions that this processor's kernels use. */
TD_EXPORT int td_width(void) {
#ifdef TD_X86
    if (td_best() == &kernels_avx512) return 512;
    if (td_best() == &kernels_avx2) return 2;
#endif
    return 0;
}

TD_EXPORT int td_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

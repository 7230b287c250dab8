/* The functions that Python calls, and the numbers by which it names element types and operations.
 *
 * Python has the same two enumerations in torchdrop/kernels/native.py, and a test compares them with these.
 *
 * Addresses need not be aligned, but for those whose type says otherwise. Sizes and strides are counted in elements.
 * `key` is 16 bytes: the seed and the stream. `params` is four numbers: threshold, scale, shift and fill. `width` is
 * the widest instruction set that may be used: 0 for plain C, 2 for AVX2, 512 for AVX-512, and a negative number for
 * whatever the processor has. Results depend neither on `width` nor on `threads`.
 */

#ifndef TD_ENTRY_POINTS_H
#define TD_ENTRY_POINTS_H

#include <stdint.h>

#include "platform.h"

enum td_element_type {
    TD_FLOAT32 = 0,
    TD_FLOAT64 = 1,
    TD_BFLOAT16 = 2,
    TD_FLOAT16 = 3,
    TD_ELEMENT_TYPES = 4 /* how many there are */
};

/* `kept` says whether the element's random bits are below the threshold. */
enum td_operation {
    TD_DROPOUT = 0,               /* out = kept ? in * scale + shift : fill */
    TD_RELU_DROPOUT = 1,          /* out = kept and not in <= 0 ? in * scale : 0 */
    TD_KEEP_MASK = 2,             /* out = kept, as a byte; `in` is not read */
    TD_RANDOM_BITS = 3,           /* out = the element's 32 random bits, as int64; `in` is not read */
    TD_STANDARD_NORMAL = 4,       /* out = a standard normal variate, as float64; `in` is not read */
    TD_DROPOUT_ADD = 5,           /* out = other + (kept ? (in + bias) * scale : 0) */
    TD_RELU_DROPOUT_BACKWARD = 6, /* out = not other <= 0 ? in * scale : 0; no random bits are made */
    TD_OPERATIONS = 7             /* how many there are */
};

/* An operation from TD_DROPOUT to TD_STANDARD_NORMAL on rows that lie end to end in `out` and `in`. `out` may be `in`.
 *
 * A row has `length` elements. Every rows_per_key rows share a key; they start `pitch` elements apart in its mask, and
 * the first of them starts at the index `start`. `keys` holds a key for every rows_per_key rows. All rows have the same
 * parameters where params_step is 0; where it is 4, each has its own. Operations other than TD_DROPOUT and
 * TD_RELU_DROPOUT have an output type of their own, and ignore the element type. */
TD_EXPORT void td_rows(int operation, int element_type, void *out, const void *in, int64_t rows, int64_t length,
                       int64_t rows_per_key, uint64_t start, int64_t pitch, const int64_t *keys, const double *params,
                       int64_t params_step, int threads, int width);

/* What td_rows does for one row that starts at index 0. It has fewer arguments, because small tensors feel each. */
TD_EXPORT void td_row(int operation, int element_type, void *out, const void *in, int64_t length, const void *key,
                      const double *params, int threads);

/* TD_DROPOUT for `groups` groups of `size` neighbors. The elements of a group share their random bits. */
TD_EXPORT void td_groups(int element_type, void *out, const void *in, int64_t groups, int64_t size, const void *key,
                         const double *params, int threads);

/* TD_DROPOUT_ADD or TD_RELU_DROPOUT_BACKWARD on n contiguous elements, the first of which has index 0.
 *
 * `bias` has `columns` elements, which are repeated, or is NULL. Only TD_DROPOUT_ADD reads it, and the key. */
TD_EXPORT void td_fused(int operation, int element_type, void *out, const void *in, const void *bias, int64_t columns,
                        const void *other, int64_t n, const void *key, const double *params, int threads, int width);

/* The masks of several samples whose random bits are strata of the same random bits (Latin hypercube sampling).
 *
 * `out` has a byte for each element of (samples, rows, length): whether it is kept in that sample. `shifts` and
 * `choices` hold a key for each row. `offsets` has the shape (samples, family) and is aligned. */
TD_EXPORT void td_stratified(void *out, int64_t samples, int64_t rows, int64_t length, const int64_t *shifts,
                             const int64_t *choices, const uint32_t *offsets, int64_t family, const double *params,
                             int threads, int width);

/* out = kept ? in * scale + shift : fill for tensors of any strides. `kept` has a byte for each element, and a stride
 * of 0 where it is shared. Returns 0, or 1 where there are no dimensions or more than 64. */
TD_EXPORT int td_select(int element_type, void *out, const void *in, const uint8_t *kept, int dims,
                        const int64_t *sizes, const int64_t *out_strides, const int64_t *in_strides,
                        const int64_t *kept_strides, const double *params, int threads, int width);

/* What is added to the scores of attention. */
enum td_bias_type {
    TD_BIAS_NONE = 0,
    TD_BIAS_SEEN = 1, /* bytes: 0 where a key may not be seen */
    TD_BIAS_ADDED = 2 /* numbers of the scores' type */
};

/* One call of attention. A bias has these strides for samples, heads and queries; its keys are neighbors. `logsumexp`
 * and `inner` have an element of the scores' type for each query of each head, and are contiguous. */
typedef struct {
    int64_t heads, queries, keys; /* of one sample */
    int64_t is_causal;            /* whether query i may see only the keys 0 ... i */
    double scale;                 /* of the scores */
    int64_t bias_type;
    const void *bias;
    int64_t bias_strides[3];
    void *logsumexp;
    const void *inner; /* rowsum(gradient * output); NULL in forward */
    const void *mask_key;
    const double *params;
} td_attention;

/* The rows of some heads and queries of it, and their first columns. Heads are counted through all samples. All arrays
 * have the shape (heads, rows, columns). Their rows begin `score_pitch` or `pitch` elements apart. */
typedef struct {
    int64_t first_head, heads, first_query, rows, columns, score_pitch, pitch;
    void *scores;    /* query @ key', in float32 for the half types; they are overwritten */
    void *weights;   /* the result, dropped and scaled; may be `scores` */
    void *gradients; /* of weights, and then of the raw scores; NULL in forward */
} td_attention_block;

/* Scores become weights. Their logsumexp is written. TD_FLOAT16 is not served. */
TD_EXPORT void td_attention_weights(int element_type, const td_attention *call, const td_attention_block *block,
                                    int threads, int width);

/* Scores become weights, and gradients of weights become gradients of scores. TD_FLOAT16 is not served. */
TD_EXPORT void td_attention_gradients(int element_type, const td_attention *call, const td_attention_block *block,
                                      int threads, int width);

/* The four 32-bit words of one Philox block, for tests against published answers. */
TD_EXPORT void td_philox_block(uint64_t block, const int64_t *key, uint32_t *words);

/* The widest instruction set that this processor has kernels for: 512, 2 or 0. */
TD_EXPORT int td_width(void);

/* Whether the kernels were compiled with OpenMP. */
TD_EXPORT int td_openmp(void);

#endif

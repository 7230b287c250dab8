/* The native backend: dropout whose mask is a function of (seed, stream, index).
 *
 * This is plain C with no link to Python or to libtorch: addresses, sizes and keys come in, and nothing is kept between
 * calls. The library has a table of kernels for each instruction set, and takes the best one that the processor has.
 * All of them give the same bits.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "entry_points.h"
#include "kernel_table.h"
#include "numbers.h"
#include "normal.h"
#include "exponential.h"

#define TD_ISA 0
#include "instruction_set.h"
#ifdef TD_X86
#define TD_ISA 2
#include "instruction_set.h"
#define TD_ISA 512
#include "instruction_set.h"
#endif

static const td_kernels *td_best_kernels(void) {
#ifdef TD_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return &kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return &kernels_avx2;
#endif
    return &kernels_plain;
}

static const td_kernels *td_kernels_for(int width) {
#ifdef TD_X86
    const td_kernels *best = td_best_kernels();
    if (width < 0 || width >= 512) return best;
    if (width >= 2 && best != &kernels_plain) return &kernels_avx2;
    return &kernels_plain;
#else
    (void)width;
    return td_best_kernels();
#endif
}

static td_row_kernel td_row_kernel_for(const td_kernels *kernels, int operation, int element_type) {
    switch (operation) {
    case TD_KEEP_MASK: return kernels->keep_mask;
    case TD_RANDOM_BITS: return kernels->random_bits;
    case TD_STANDARD_NORMAL: return kernels->standard_normal;
    case TD_RELU_DROPOUT: return kernels->elements[element_type].relu_dropout;
    default: return kernels->elements[element_type].dropout;
    }
}

static int64_t td_element_size(int element_type) {
    static const int64_t sizes[TD_ELEMENT_TYPES] = {
        [TD_FLOAT32] = 4, [TD_FLOAT64] = 8, [TD_BFLOAT16] = 2, [TD_FLOAT16] = 2};
    return sizes[element_type];
}

static int64_t td_output_size(int operation, int element_type) {
    switch (operation) {
    case TD_KEEP_MASK: return 1;
    case TD_RANDOM_BITS:
    case TD_STANDARD_NORMAL: return 8;
    default: return td_element_size(element_type);
    }
}

static td_params td_read_params(const double *p) {
    double scale, threshold;
    td_params params;
    memcpy(&threshold, p, sizeof threshold);
    memcpy(&scale, p + 1, sizeof scale);
    params.threshold = !(threshold > 0) ? 0 : threshold >= 4294967296.0 ? TD_ONE : (uint64_t)threshold;
    params.scale = scale;
    memcpy(&params.shift, p + 2, sizeof params.shift);
    memcpy(&params.fill, p + 3, sizeof params.fill);
    return params;
}

static td_key td_read_key(const void *p) {
    td_key key;
    memcpy(&key.seed, p, sizeof key.seed);
    memcpy(&key.stream, (const char *)p + sizeof key.seed, sizeof key.stream);
    return key;
}

/* The arguments of td_rows, with what was found for its operation and element type. */
typedef struct {
    td_row_kernel kernel;
    int64_t item_size; /* bytes of an element of `out`, and of `in` where it is read */
    char *out;
    const char *in;
    int64_t length, rows_per_key;
    uint64_t start;
    int64_t pitch;
    const int64_t *keys;
    const double *params;
    int64_t params_step;
} td_rows_call;

/* Serves the elements [from, to) of all rows laid end to end. */
static void td_rows_range(const td_rows_call *call, int64_t from, int64_t to) {
    while (from < to) {
        const int64_t row = from / call->length, column = from % call->length;
        const int64_t take = td_min(call->length - column, to - from), offset = from * call->item_size;
        const int64_t of_key = row / call->rows_per_key, within_key = row % call->rows_per_key;
        const td_params params = td_read_params(call->params + row * call->params_step);
        const uint64_t index = call->start + (uint64_t)within_key * (uint64_t)call->pitch + (uint64_t)column;
        call->kernel(call->out + offset, call->in ? call->in + offset : NULL, index, take,
                     td_read_key(call->keys + 2 * of_key), &params);
        from += take;
    }
}

void td_rows(int operation, int element_type, void *out, const void *in, int64_t rows, int64_t length,
             int64_t rows_per_key, uint64_t start, int64_t pitch, const int64_t *keys, const double *params,
             int64_t params_step, int threads, int width) {
    const td_rows_call call = {
        .kernel = td_row_kernel_for(td_kernels_for(width), operation, element_type),
        .item_size = td_output_size(operation, element_type),
        .out = out,
        .in = in,
        .length = length,
        .rows_per_key = rows_per_key,
        .start = start,
        .pitch = pitch,
        .keys = keys,
        .params = params,
        .params_step = params_step,
    };
    const int64_t total = rows * length;
    if (total <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && total >= 2 * TD_GRAIN) {
        const int64_t grains = (total + TD_GRAIN - 1) / TD_GRAIN;
        const int team = (int)td_min(threads, grains);
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t g = 0; g < grains; g++)
            td_rows_range(&call, g * TD_GRAIN, td_min((g + 1) * TD_GRAIN, total));
        return;
    }
#endif
    (void)threads;
    td_rows_range(&call, 0, total);
}

/* A short burst of 512-bit instructions costs more than it saves. */
void td_row(int operation, int element_type, void *out, const void *in, int64_t length, const void *key,
            const double *params, int threads) {
    if (threads > 1 && length >= 2 * TD_GRAIN) {
        int64_t aligned_key[2];
        memcpy(aligned_key, key, sizeof aligned_key);
        td_rows(operation, element_type, out, in, 1, length, 1, 0, length, aligned_key, params, 0, threads, -1);
    } else if (length > 0) {
        const td_kernels *kernels = td_kernels_for(length <= TD_SHORT_ROW ? 2 : -1);
        const td_params read = td_read_params(params);
        td_row_kernel_for(kernels, operation, element_type)(out, in, 0, length, td_read_key(key), &read);
    }
}

/* Serves the groups [from, to). What is dropped need not be read, so long groups are set to zero by memset. */
static void td_groups_range(const td_kernels *kernels, int element_type, char *out, const char *in, int64_t from,
                            int64_t to, int64_t size, td_key key, const td_params *params) {
    const td_select_kernel select = kernels->elements[element_type].select;
    const int64_t step = size * td_element_size(element_type);
    const int by_memset = params->fill == 0.0 && step >= TD_MEMSET_BYTES;
    char kept[TD_CHUNK];
    while (from < to) {
        const int64_t take = td_min(TD_CHUNK, to - from);
        kernels->keep_mask(kept, NULL, (uint64_t)from, take, key, params);
        for (int64_t g = 0; g < take; g++) {
            char *to_group = out + (from + g) * step;
            if (!kept[g] && by_memset)
                memset(to_group, 0, (size_t)step);
            else
                select(to_group, in + (from + g) * step, (const uint8_t *)kept + g, size, 1, 1, 0, params);
        }
        from += take;
    }
}

void td_groups(int element_type, void *out, const void *in, int64_t groups, int64_t size, const void *key,
               const double *params, int threads) {
    const td_kernels *kernels = td_best_kernels();
    const td_params read = td_read_params(params);
    const td_key read_key = td_read_key(key);
    if (groups <= 0 || size <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && groups > 1 && groups * size >= 2 * TD_GRAIN) {
        const int64_t pieces = td_min(groups, threads);
#pragma omp parallel for num_threads((int)pieces) schedule(static)
        for (int64_t p = 0; p < pieces; p++)
            td_groups_range(kernels, element_type, out, in, groups * p / pieces, groups * (p + 1) / pieces, size,
                            read_key, &read);
        return;
    }
#endif
    (void)threads;
    td_groups_range(kernels, element_type, out, in, 0, groups, size, read_key, &read);
}

/* Serves the elements [from, to) of the rows of one sample, for all samples. */
static void td_stratified_range(const td_kernels *kernels, char *out, int64_t from, int64_t to, int64_t samples,
                                int64_t rows, int64_t length, const int64_t *shifts, const int64_t *choices,
                                const uint32_t *offsets, int64_t family, uint64_t threshold) {
    while (from < to) {
        const int64_t row = from / length, column = from % length, take = td_min(length - column, to - from);
        kernels->stratified(out + from, rows * length, samples, (uint64_t)column, take, td_read_key(shifts + 2 * row),
                            td_read_key(choices + 2 * row), offsets, family, threshold);
        from += take;
    }
}

void td_stratified(void *out, int64_t samples, int64_t rows, int64_t length, const int64_t *shifts,
                   const int64_t *choices, const uint32_t *offsets, int64_t family, const double *params, int threads,
                   int width) {
    const td_kernels *kernels = td_kernels_for(width);
    const int64_t total = rows * length;
    const uint64_t threshold = td_read_params(params).threshold;
    if (total <= 0 || samples <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && total > TD_CHUNK && total * samples >= 2 * TD_GRAIN) {
        const int64_t pieces = td_min((total + TD_CHUNK - 1) / TD_CHUNK, 4 * (int64_t)threads);
        const int team = (int)td_min(threads, pieces);
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t p = 0; p < pieces; p++)
            td_stratified_range(kernels, out, total * p / pieces, total * (p + 1) / pieces, samples, rows, length,
                                shifts, choices, offsets, family, threshold);
        return;
    }
#endif
    (void)threads;
    td_stratified_range(kernels, out, 0, total, samples, rows, length, shifts, choices, offsets, family, threshold);
}

void td_fused(int operation, int element_type, void *out, const void *in, const void *bias, int64_t columns,
              const void *other, int64_t n, const void *key, const double *params, int threads, int width) {
    const td_element_kernels *kernels = &td_kernels_for(width)->elements[element_type];
    const td_fused_kernel kernel =
        operation == TD_RELU_DROPOUT_BACKWARD ? kernels->relu_dropout_backward : kernels->dropout_add;
    const td_params read = td_read_params(params);
    const td_key read_key = td_read_key(key);
    if (n <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && n >= 2 * TD_GRAIN) {
        const int64_t grains = (n + TD_GRAIN - 1) / TD_GRAIN;
        const int team = (int)td_min(threads, grains);
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t g = 0; g < grains; g++)
            kernel(out, in, bias, columns, other, g * TD_GRAIN, td_min(TD_GRAIN, n - g * TD_GRAIN), read_key, &read);
        return;
    }
#endif
    (void)threads;
    kernel(out, in, bias, columns, other, 0, n, read_key, &read);
}

/* Serves the rows [from, to) of a tensor whose last dimension is a row. */
static void td_select_range(td_select_kernel select, int64_t element_size, char *out, const char *in,
                            const uint8_t *kept, int64_t from, int64_t to, int dims, const int64_t *sizes,
                            const int64_t *out_strides, const int64_t *in_strides, const int64_t *kept_strides,
                            const td_params *params) {
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
        select(out + o * element_size, in + i * element_size, kept + k, sizes[last], out_strides[last],
               in_strides[last], kept_strides[last], params);
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

int td_select(int element_type, void *out, const void *in, const uint8_t *kept, int dims, const int64_t *sizes,
              const int64_t *out_strides, const int64_t *in_strides, const int64_t *kept_strides, const double *params,
              int threads, int width) {
    const td_select_kernel select = td_kernels_for(width)->elements[element_type].select;
    const int64_t element_size = td_element_size(element_type);
    const td_params read = td_read_params(params);
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
            td_select_range(select, element_size, out, in, kept, td_min(p * step, rows), td_min((p + 1) * step, rows),
                            dims, sizes, out_strides, in_strides, kept_strides, &read);
        return 0;
    }
#endif
    (void)threads;
    td_select_range(select, element_size, out, in, kept, 0, rows, dims, sizes, out_strides, in_strides, kept_strides,
                    &read);
    return 0;
}

#include "attention_calls.h"

void td_philox_block(uint64_t block, const int64_t *key, uint32_t *words) {
    uint32_t blocks[4 * 32];
    philox_step_plain(block, td_read_key(key), blocks);
    memcpy(words, blocks, 4 * sizeof *words);
}

int td_width(void) {
#ifdef TD_X86
    if (td_best_kernels() == &kernels_avx512) return 512;
    if (td_best_kernels() == &kernels_avx2) return 2;
#endif
    return 0;
}

int td_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

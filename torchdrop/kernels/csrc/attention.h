/* Rows of attention weights for one element type under one instruction set. This file is included once for each pair.
 *
 * The file that includes it defines
 *
 *     TD_ELEMENT          the suffix of this type's functions
 *     TD_STORED           an unsigned integer type of the size of a weight: weights are moved as bits
 *     TD_REAL             the floating-point type of scores, which may be the weights'
 *     TD_REAL_BITS        an unsigned integer type of the size of TD_REAL
 *     TD_LOAD             a function from TD_STORED to TD_REAL, which is exact
 *     TD_ROUND            a function from TD_REAL to TD_STORED, which rounds to nearest even
 *     TD_TO_BITS          the bits of a TD_REAL, as TD_REAL_BITS
 *     TD_FROM_BITS        the inverse of TD_TO_BITS
 *     TD_EXP              exp for a TD_REAL that is not much larger than 0
 *
 * and this file takes the definitions back at its end. A row is short enough to stay in the first cache, so it is passed
 * over several times. Sums are made in TD_SUMS lanes under every instruction set, so that their roundings are the same.
 */

#define TD_JOIN_(f, element) f##_##element
#define TD_JOIN(f, element) TD_JOIN_(f, element)
#define TD_NAME_OF(f) TD_NAME(f)
#define TD_TYPED(f) TD_NAME_OF(TD_JOIN(f, TD_ELEMENT))
#define TD_WIDTH ((int64_t)sizeof(TD_REAL))
#define TD_SIZE ((int64_t)sizeof(TD_STORED))

/* All bits of a TD_REAL are set where a condition is 1, and none where it is 0. */
#define TD_MASK(condition) ((TD_REAL_BITS) - (TD_REAL_BITS)(condition))
#define TD_WHERE(condition, value) TD_FROM_BITS(TD_TO_BITS(value) & TD_MASK(condition))

TD_TARGET static inline TD_INLINE TD_REAL TD_TYPED(get)(const char *from, int64_t j) {
    TD_REAL value;
    memcpy(&value, from + j * TD_WIDTH, sizeof value);
    return value;
}

TD_TARGET static inline TD_INLINE void TD_TYPED(put)(char *to, int64_t j, TD_REAL value) {
    memcpy(to + j * TD_WIDTH, &value, sizeof value);
}

/* score = score * scale + bias, or -inf where a key may not be seen. */
TD_TARGET static void TD_TYPED(add_bias)(const td_attention_row *row) {
    const TD_REAL scale = (TD_REAL)row->scale;
    const int64_t n = row->visible;
    char *scores = row->scores;
    const char *bias = row->bias;
    if (row->bias_type == TD_BIAS_SEEN) {
        TD_INDEPENDENT
        for (int64_t j = 0; j < n; j++) {
            const TD_REAL x = TD_TYPED(get)(scores, j) * scale;
            const TD_REAL_BITS seen = TD_MASK(bias[j] != 0), hidden = TD_TO_BITS((TD_REAL)-INFINITY);
            TD_TYPED(put)(scores, j, TD_FROM_BITS((TD_TO_BITS(x) & seen) | (hidden & ~seen)));
        }
    } else {
        TD_INDEPENDENT
        for (int64_t j = 0; j < n; j++) {
            const TD_REAL x = TD_TYPED(get)(scores, j) * scale;
            TD_TYPED(put)(scores, j, x + TD_TYPED(get)(bias, j));
        }
    }
}

/* Writes zeros from column `from` on. */
TD_TARGET static inline TD_INLINE void TD_TYPED(clear)(const td_attention_row *row, int64_t from) {
    const size_t n = (size_t)((row->columns - from) * TD_SIZE);
    if (n == 0) return;
    memset(row->weights + from * TD_SIZE, 0, n);
    if (row->gradients) memset(row->gradients + from * TD_SIZE, 0, n);
}

/* The loops below take n elements, which must be a multiple of TD_SUMS. */

TD_TARGET static inline TD_INLINE void TD_TYPED(highest)(const char *scores, TD_REAL scale, TD_REAL *lanes, int64_t n) {
    for (int64_t j = 0; j < n; j += TD_SUMS)
        for (int l = 0; l < TD_SUMS; l++) {
            const TD_REAL x = TD_TYPED(get)(scores, j + l) * scale;
            lanes[l] = x < lanes[l] ? lanes[l] : x;
        }
}

TD_TARGET static inline TD_INLINE void TD_TYPED(exponentials)(char *scores, TD_REAL scale, TD_REAL top, TD_REAL *lanes,
                                                              int64_t n) {
    for (int64_t j = 0; j < n; j += TD_SUMS)
        for (int l = 0; l < TD_SUMS; l++) {
            const TD_REAL scaled = TD_TYPED(get)(scores, j + l) * scale, e = TD_EXP(scaled - top);
            TD_TYPED(put)(scores, j + l, e);
            lanes[l] += e;
        }
}

TD_TARGET static inline TD_INLINE void TD_TYPED(drop)(char *weights, const char *scores, TD_REAL factor,
                                                      const uint16_t *bits, uint16_t limit, int64_t n) {
    TD_INDEPENDENT
    for (int64_t j = 0; j < n; j++) {
        const TD_REAL weight = TD_TYPED(get)(scores, j) * factor;
        const TD_STORED value = TD_ROUND(TD_WHERE(bits[j] < limit, weight));
        memcpy(weights + j * TD_SIZE, &value, sizeof value);
    }
}

/* What attention_gradients needs beside a row's columns. */
typedef struct {
    TD_REAL scale, lse, inner, mask_scale, gradient_scale;
} TD_TYPED(td_numbers);

TD_TARGET static inline TD_INLINE void TD_TYPED(derive)(char *weights, char *gradients, const char *scores,
                                                        const TD_TYPED(td_numbers) * with, const uint16_t *bits,
                                                        uint16_t limit, int64_t n) {
    const TD_REAL scale = with->scale, lse = with->lse, inner = with->inner, mask_scale = with->mask_scale;
    const TD_REAL gradient_scale = with->gradient_scale;
    TD_INDEPENDENT
    for (int64_t j = 0; j < n; j++) {
        TD_STORED value;
        const TD_REAL scaled = TD_TYPED(get)(scores, j) * scale, p = TD_EXP(scaled - lse);
        memcpy(&value, gradients + j * TD_SIZE, sizeof value);
        const TD_REAL of_weight = TD_WHERE(bits[j] < limit, TD_LOAD(value) * mask_scale);
        value = TD_ROUND(p * (of_weight - inner) * gradient_scale);
        memcpy(gradients + j * TD_SIZE, &value, sizeof value);
        value = TD_ROUND(TD_WHERE(bits[j] < limit, p * mask_scale));
        memcpy(weights + j * TD_SIZE, &value, sizeof value);
    }
}

/* Scores become weights, dropped and scaled. Their logsumexp is written, -inf where no key may be seen. */
TD_TARGET static void TD_TYPED(attention_weights)(const td_attention_row *row, td_key key, const td_params *params,
                                                  td_decided *decided) {
    TD_REAL lanes[TD_SUMS], last[TD_SUMS], top = (TD_REAL)-INFINITY, sum = 0, scale = (TD_REAL)row->scale;
    const int64_t n = row->visible, rest = n % TD_SUMS, whole = n - rest;
    char *scores = row->scores, *scores_last = scores + whole * TD_WIDTH;
    const size_t rest_bytes = (size_t)(rest * TD_WIDTH);
    if (row->bias_type != TD_BIAS_NONE) {
        TD_TYPED(add_bias)(row);
        scale = 1;
    }
    for (int l = 0; l < TD_SUMS; l++) lanes[l] = last[l] = (TD_REAL)-INFINITY;
    memcpy(last, scores_last, rest_bytes);
    for (int l = 0; l < rest; l++) last[l] *= scale;
    TD_TYPED(highest)(scores, scale, lanes, whole);
    TD_TYPED(highest)((const char *)last, 1, lanes, TD_SUMS);
    for (int l = 0; l < TD_SUMS; l++) top = lanes[l] < top ? top : lanes[l];
    if (top == (TD_REAL)-INFINITY) {
        memcpy(row->logsumexp, &top, sizeof top);
        TD_TYPED(clear)(row, 0);
        return;
    }
    for (int l = 0; l < TD_SUMS; l++) lanes[l] = 0;
    TD_TYPED(exponentials)(scores, scale, top, lanes, whole);
    if (rest) {
        TD_TYPED(exponentials)((char *)last, 1, top, lanes, TD_SUMS);
        memcpy(scores_last, last, rest_bytes);
    }
    for (int l = 0; l < TD_SUMS; l++) sum += lanes[l];
    const TD_REAL lse = top + (TD_REAL)log(sum), factor = (TD_REAL)(params->scale / sum);
    memcpy(row->logsumexp, &lse, sizeof lse);
    for (int64_t from = 0; from < n;) {
        int64_t take = n - from;
        const uint16_t *bits = TD_NAME(decided_from)(decided, row->index + (uint64_t)from, key, params, &take);
        const int64_t most = take - take % TD_SUMS;
        char *weights = row->weights + from * TD_SIZE;
        TD_TYPED(drop)(weights, scores + from * TD_WIDTH, factor, bits, decided->limit, most);
        if (most < take) {
            TD_STORED out[TD_SUMS];
            const int64_t left = take - most;
            memcpy(last, scores + (from + most) * TD_WIDTH, (size_t)(left * TD_WIDTH));
            TD_TYPED(drop)((char *)out, (const char *)last, factor, bits + most, decided->limit, TD_SUMS);
            memcpy(weights + most * TD_SIZE, out, (size_t)(left * TD_SIZE));
        }
        from += take;
    }
    TD_TYPED(clear)(row, n);
}

/* Scores become weights again, dropped and scaled, and gradients of weights become those of scores. */
TD_TARGET static void TD_TYPED(attention_gradients)(const td_attention_row *row, td_key key, const td_params *params,
                                                    td_decided *decided) {
    TD_TYPED(td_numbers) with = {
        .scale = (TD_REAL)row->scale, .mask_scale = (TD_REAL)params->scale, .gradient_scale = (TD_REAL)row->scale};
    memcpy(&with.lse, row->logsumexp, sizeof with.lse);
    memcpy(&with.inner, row->inner, sizeof with.inner);
    const int64_t n = with.lse == (TD_REAL)-INFINITY ? 0 : row->visible;
    if (row->bias_type != TD_BIAS_NONE && n > 0) {
        TD_TYPED(add_bias)(row);
        with.scale = 1;
    }
    for (int64_t from = 0; from < n;) {
        int64_t take = n - from;
        const uint16_t *bits = TD_NAME(decided_from)(decided, row->index + (uint64_t)from, key, params, &take);
        const int64_t most = take - take % TD_SUMS;
        char *weights = row->weights + from * TD_SIZE, *gradients = row->gradients + from * TD_SIZE;
        TD_TYPED(derive)(weights, gradients, row->scores + from * TD_WIDTH, &with, bits, decided->limit, most);
        if (most < take) {
            TD_STORED out[TD_SUMS], of_out[TD_SUMS] = {0};
            TD_REAL last[TD_SUMS] = {0};
            const int64_t left = take - most;
            const size_t bytes = (size_t)(left * TD_SIZE);
            memcpy(last, row->scores + (from + most) * TD_WIDTH, (size_t)(left * TD_WIDTH));
            memcpy(of_out, gradients + most * TD_SIZE, bytes);
            TD_TYPED(derive)((char *)out, (char *)of_out, (const char *)last, &with, bits + most, decided->limit, TD_SUMS);
            memcpy(weights + most * TD_SIZE, out, bytes);
            memcpy(gradients + most * TD_SIZE, of_out, bytes);
        }
        from += take;
    }
    TD_TYPED(clear)(row, n);
}

#undef TD_JOIN_
#undef TD_JOIN
#undef TD_NAME_OF
#undef TD_TYPED
#undef TD_WIDTH
#undef TD_SIZE
#undef TD_MASK
#undef TD_WHERE
#undef TD_ELEMENT
#undef TD_STORED
#undef TD_REAL
#undef TD_REAL_BITS
#undef TD_LOAD
#undef TD_ROUND
#undef TD_TO_BITS
#undef TD_FROM_BITS
#undef TD_EXP

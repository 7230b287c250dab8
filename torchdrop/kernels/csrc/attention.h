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

/* x = score * scale + bias, -inf where a key may not be seen, for up to TD_CHUNK elements from `from` on. */
TD_TARGET static inline TD_INLINE void TD_TYPED(biased)(const td_attention_row *row, int64_t from, int64_t n,
                                                        TD_REAL *x) {
    const TD_REAL scale = (TD_REAL)row->scale;
    memcpy(x, row->scores + from * TD_WIDTH, (size_t)n * sizeof *x);
    for (int64_t j = 0; j < n; j++) x[j] *= scale;
    if (row->bias_type == TD_BIAS_SEEN) {
        const uint8_t *seen = (const uint8_t *)row->bias + from;
        for (int64_t j = 0; j < n; j++) x[j] = seen[j] ? x[j] : (TD_REAL)-INFINITY;
    } else if (row->bias_type == TD_BIAS_ADDED) {
        TD_REAL added[TD_CHUNK];
        memcpy(added, row->bias + from * TD_WIDTH, (size_t)n * sizeof *added);
        for (int64_t j = 0; j < n; j++) x[j] += added[j];
    }
}

/* Fills the last lanes of n scores with -inf, and returns how many there are then. */
TD_TARGET static inline TD_INLINE int64_t TD_TYPED(padded)(TD_REAL *x, int64_t n) {
    const int64_t whole = (n + TD_SUMS - 1) / TD_SUMS * TD_SUMS;
    for (int64_t j = n; j < whole; j++) x[j] = (TD_REAL)-INFINITY;
    return whole;
}

/* Writes zeros from column `from` on. */
TD_TARGET static inline void TD_TYPED(clear)(const td_attention_row *row, int64_t from) {
    memset(row->weights + from * TD_SIZE, 0, (size_t)((row->columns - from) * TD_SIZE));
    if (row->gradients) memset(row->gradients + from * TD_SIZE, 0, (size_t)((row->columns - from) * TD_SIZE));
}

/* Scores become weights, dropped and scaled. Their logsumexp is written, -inf where no key may be seen. */
TD_TARGET static void TD_TYPED(attention_weights)(const td_attention_row *row, td_key key, const td_params *params) {
    TD_REAL x[TD_CHUNK], lanes[TD_SUMS], top = (TD_REAL)-INFINITY, sum = 0, lse;
    uint16_t bits[TD_CHUNK];
    const int64_t n = row->visible;
    for (int l = 0; l < TD_SUMS; l++) lanes[l] = (TD_REAL)-INFINITY;
    for (int64_t from = 0; from < n; from += TD_CHUNK) {
        const int64_t take = td_min(TD_CHUNK, n - from);
        TD_TYPED(biased)(row, from, take, x);
        memcpy(row->scores + from * TD_WIDTH, x, (size_t)take * sizeof *x);
        const int64_t whole = TD_TYPED(padded)(x, take);
        for (int64_t j = 0; j < whole; j += TD_SUMS)
            for (int l = 0; l < TD_SUMS; l++) lanes[l] = x[j + l] < lanes[l] ? lanes[l] : x[j + l];
    }
    for (int l = 0; l < TD_SUMS; l++) top = lanes[l] < top ? top : lanes[l];
    if (top == (TD_REAL)-INFINITY) {
        memcpy(row->logsumexp, &top, sizeof top);
        TD_TYPED(clear)(row, 0);
        return;
    }
    for (int l = 0; l < TD_SUMS; l++) lanes[l] = 0;
    for (int64_t from = 0; from < n; from += TD_CHUNK) {
        const int64_t take = td_min(TD_CHUNK, n - from);
        memcpy(x, row->scores + from * TD_WIDTH, (size_t)take * sizeof *x);
        const int64_t whole = TD_TYPED(padded)(x, take);
        for (int64_t j = 0; j < whole; j++) x[j] = TD_EXP(x[j] - top);
        memcpy(row->scores + from * TD_WIDTH, x, (size_t)take * sizeof *x);
        for (int64_t j = 0; j < whole; j += TD_SUMS)
            for (int l = 0; l < TD_SUMS; l++) lanes[l] += x[j + l];
    }
    for (int l = 0; l < TD_SUMS; l++) sum += lanes[l];
    lse = top + (TD_REAL)log(sum);
    memcpy(row->logsumexp, &lse, sizeof lse);
    const TD_REAL factor = (TD_REAL)(params->scale / sum);
    for (int64_t from = 0; from < n;) {
        const uint64_t index = row->index + (uint64_t)from;
        const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n - from);
        const uint16_t limit = TD_NAME(decide)(index / 8, key, params, bits, skip + take);
        TD_STORED out[TD_CHUNK];
        memcpy(x, row->scores + from * TD_WIDTH, (size_t)take * sizeof *x);
        for (int64_t j = 0; j < take; j++) out[j] = TD_ROUND(TD_WHERE(bits[skip + j] < limit, x[j] * factor));
        memcpy(row->weights + from * TD_SIZE, out, (size_t)take * sizeof *out);
        from += take;
    }
    TD_TYPED(clear)(row, n);
}

/* Scores become weights again, dropped and scaled, and gradients of weights become those of scores. */
TD_TARGET static void TD_TYPED(attention_gradients)(const td_attention_row *row, td_key key, const td_params *params) {
    TD_REAL x[TD_CHUNK], lse, inner;
    uint16_t bits[TD_CHUNK];
    const TD_REAL scale = (TD_REAL)row->scale, mask_scale = (TD_REAL)params->scale;
    memcpy(&lse, row->logsumexp, sizeof lse);
    memcpy(&inner, row->inner, sizeof inner);
    const int64_t n = lse == (TD_REAL)-INFINITY ? 0 : row->visible;
    for (int64_t from = 0; from < n;) {
        const uint64_t index = row->index + (uint64_t)from;
        const int64_t skip = (int64_t)(index % 8), take = td_min(TD_CHUNK - skip, n - from);
        const uint16_t limit = TD_NAME(decide)(index / 8, key, params, bits, skip + take);
        TD_STORED weights[TD_CHUNK], gradients[TD_CHUNK];
        TD_TYPED(biased)(row, from, take, x);
        for (int64_t j = 0; j < take; j++) x[j] = TD_EXP(x[j] - lse);
        memcpy(gradients, row->gradients + from * TD_SIZE, (size_t)take * sizeof *gradients);
        for (int64_t j = 0; j < take; j++) {
            const TD_REAL_BITS kept = TD_MASK(bits[skip + j] < limit);
            const TD_REAL of_weight = TD_FROM_BITS(TD_TO_BITS(TD_LOAD(gradients[j]) * mask_scale) & kept);
            weights[j] = TD_ROUND(TD_FROM_BITS(TD_TO_BITS(x[j] * mask_scale) & kept));
            gradients[j] = TD_ROUND(x[j] * (of_weight - inner) * scale);
        }
        memcpy(row->weights + from * TD_SIZE, weights, (size_t)take * sizeof *weights);
        memcpy(row->gradients + from * TD_SIZE, gradients, (size_t)take * sizeof *gradients);
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

/* td_attention_weights and td_attention_gradients: the rows of a block of attention. */

/* Fills in what the row at `at` of a block has of its own. */
static td_attention_row td_attention_row_at(const td_attention *call, const td_attention_block *block, int64_t at,
                                            int64_t real_size, int64_t size) {
    const int64_t head = block->first_head + at / block->rows, query = block->first_query + at % block->rows;
    const int64_t sample = head / call->heads, of_row = head * call->queries + query;
    td_attention_row row = {
        .scores = (char *)block->scores + at * block->score_pitch * real_size,
        .weights = (char *)block->weights + at * block->pitch * size,
        .gradients = block->gradients ? (char *)block->gradients + at * block->pitch * size : NULL,
        .bias = NULL,
        .bias_type = (int)call->bias_type,
        .logsumexp = (char *)call->logsumexp + of_row * real_size,
        .inner = call->inner ? (const char *)call->inner + of_row * real_size : NULL,
        .index = (uint64_t)of_row * (uint64_t)call->keys,
        .columns = block->columns,
        .visible = call->is_causal ? td_min(query + 1, block->columns) : block->columns,
        .scale = call->scale,
    };
    if (call->bias_type != TD_BIAS_NONE) {
        const int64_t offset = sample * call->bias_strides[0] + (head % call->heads) * call->bias_strides[1] +
                               query * call->bias_strides[2];
        row.bias = (const char *)call->bias + offset * (call->bias_type == TD_BIAS_SEEN ? 1 : real_size);
    }
    return row;
}

static void td_attention_rows(td_attention_kernel kernel, int element_type, const td_attention *call,
                              const td_attention_block *block, int threads) {
    const int64_t rows = block->heads * block->rows;
    const int64_t size = td_element_size(element_type), real_size = element_type == TD_FLOAT64 ? 8 : 4;
    const td_key key = td_read_key(call->mask_key);
    const td_params params = td_read_params(call->params);
    int team = 1;
#ifdef _OPENMP
    if (threads > 1 && rows * block->columns >= TD_GRAIN) team = (int)td_min(threads, rows);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
#endif
    for (int64_t piece = 0; piece < team; piece++) {
        td_decided decided = {0};
        for (int64_t r = rows * piece / team; r < rows * (piece + 1) / team; r++) {
            const td_attention_row row = td_attention_row_at(call, block, r, real_size, size);
            kernel(&row, key, &params, &decided);
        }
    }
    (void)threads;
}

static const td_attention_kernels *td_attention_kernels_for(int element_type, int width) {
    return &td_kernels_for(width)->attention[element_type];
}

void td_attention_weights(int element_type, const td_attention *call, const td_attention_block *block, int threads,
                          int width) {
    td_attention_rows(td_attention_kernels_for(element_type, width)->weights, element_type, call, block, threads);
}

void td_attention_gradients(int element_type, const td_attention *call, const td_attention_block *block, int threads,
                            int width) {
    td_attention_rows(td_attention_kernels_for(element_type, width)->gradients, element_type, call, block, threads);
}

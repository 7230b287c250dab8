/* What all instruction sets share: constants, types, and the table of kernels that each of them fills. */

#define TD_CHUNK 256                    /* so many elements are decided at a time */
#define TD_GRAIN 16384                  /* so many elements are worth a thread */
#define TD_SHORT_ROW 2048               /* up to so many elements, 256-bit vectors are the fastest */
#define TD_SUMS 32                      /* so many partial sums of a row are made */
#define TD_MEMSET_BYTES 512             /* groups of so many bytes or more are set to zero by memset */
#define TD_MAX_DIMS 64                  /* td_select takes tensors of so many dimensions */
#define TD_ONE (UINT64_C(1) << 32)      /* the threshold of keep probability 1 */
#define TD_PLANE (UINT64_C(1) << 61)    /* the distance of the block numbers of two planes of random bits */

/* The multipliers, the steps of the key and the rounds of Philox4x32-10. */
#define TD_M0 0xD2511F53u
#define TD_M1 0xCD9E8D57u
#define TD_W0 0x9E3779B9u
#define TD_W1 0xBB67AE85u
#define TD_ROUNDS 10

typedef struct {
    uint64_t seed, stream;
} td_key;

typedef struct {
    uint64_t threshold;
    double scale, shift, fill;
} td_params;

/* n neighbors of one row. The first of them has this index in the mask; `out` and `in` point at it. */
typedef void (*td_row_kernel)(char *out, const char *in, uint64_t index, int64_t n, td_key key,
                              const td_params *params);

/* n elements of a row of any strides, under a mask that is given. */
typedef void (*td_select_kernel)(char *out, const char *in, const uint8_t *kept, int64_t n, int64_t out_stride,
                                 int64_t in_stride, int64_t kept_stride, const td_params *params);

/* n neighbors from an index on. `out`, `in` and `other` point at index 0. */
typedef void (*td_fused_kernel)(char *out, const char *in, const char *bias, int64_t columns, const char *other,
                                int64_t index, int64_t n, td_key key, const td_params *params);

/* n neighbors of one row in each of several samples, which are `step` bytes apart. */
typedef void (*td_stratified_kernel)(char *out, int64_t step, int64_t samples, uint64_t index, int64_t n, td_key shift,
                                     td_key choice, const uint32_t *offsets, int64_t family, uint64_t threshold);

/* One row of attention weights. */
typedef struct {
    char *scores, *weights, *gradients;
    const char *bias;
    int bias_type;
    char *logsumexp;
    const char *inner;
    uint64_t index;           /* of the first column in the mask */
    int64_t columns, visible; /* the columns from `visible` on are zero */
    double scale;
} td_attention_row;

/* TD_CHUNK elements of a mask that were decided last, from index `first` on. Short rows share them. The bits beyond them
 * are zero and count for nothing: loops over whole lanes read them. */
typedef struct {
    uint64_t first;
    uint16_t bits[TD_CHUNK + TD_SUMS], limit;
    int filled;
} td_decided;

typedef void (*td_attention_kernel)(const td_attention_row *row, td_key key, const td_params *params,
                                    td_decided *decided);

typedef struct {
    td_attention_kernel weights, gradients;
} td_attention_kernels;

typedef struct {
    td_row_kernel dropout, relu_dropout;
    td_select_kernel select;
    td_fused_kernel dropout_add, relu_dropout_backward;
} td_element_kernels;

typedef struct {
    td_element_kernels elements[TD_ELEMENT_TYPES];
    td_row_kernel keep_mask, random_bits, standard_normal;
    td_stratified_kernel stratified;
    td_attention_kernels attention[TD_ELEMENT_TYPES];
} td_kernels;

static inline int64_t td_min(int64_t a, int64_t b) { return a < b ? a : b; }

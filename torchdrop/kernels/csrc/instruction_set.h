/* All kernels for one instruction set, and the table of them. This file is included once for each; TD_ISA names it. */

#include "philox.h"
#include "random_bits.h"

#define TD_ELEMENT f32
#define TD_STORED uint32_t
#define TD_REAL float
#define TD_REAL_BITS uint32_t
#define TD_LOAD(stored) td_float(stored)
#define TD_ROUND(real) td_float_bits(real)
#define TD_TO_BITS(real) td_float_bits(real)
#define TD_FROM_BITS(bits) td_float(bits)
#include "element.h"

#define TD_ELEMENT f64
#define TD_STORED uint64_t
#define TD_REAL double
#define TD_REAL_BITS uint64_t
#define TD_LOAD(stored) td_double(stored)
#define TD_ROUND(real) td_double_bits(real)
#define TD_TO_BITS(real) td_double_bits(real)
#define TD_FROM_BITS(bits) td_double(bits)
#include "element.h"

#define TD_ELEMENT bf16
#define TD_STORED uint16_t
#define TD_REAL float
#define TD_REAL_BITS uint32_t
#define TD_LOAD(stored) td_from_bf16(stored)
#define TD_ROUND(real) td_to_bf16(real)
#define TD_TO_BITS(real) td_float_bits(real)
#define TD_FROM_BITS(bits) td_float(bits)
#include "element.h"

#define TD_ELEMENT f16
#define TD_STORED uint16_t
#define TD_REAL float
#define TD_REAL_BITS uint32_t
#define TD_LOAD(stored) td_from_f16(stored)
#define TD_ROUND(real) td_to_f16(real)
#define TD_TO_BITS(real) td_float_bits(real)
#define TD_FROM_BITS(bits) td_float(bits)
#ifdef TD_SCALE_HALVES
#define TD_SCALE_MANY TD_SCALE_HALVES
#define TD_MANY TD_HALVES_AT_ONCE
#endif
#include "element.h"

#define TD_ELEMENT f32
#define TD_STORED uint32_t
#define TD_REAL float
#define TD_REAL_BITS uint32_t
#define TD_LOAD(stored) td_float(stored)
#define TD_ROUND(real) td_float_bits(real)
#define TD_TO_BITS(real) td_float_bits(real)
#define TD_FROM_BITS(bits) td_float(bits)
#define TD_EXP(real) td_expf(real)
#include "attention.h"

#define TD_ELEMENT f64
#define TD_STORED uint64_t
#define TD_REAL double
#define TD_REAL_BITS uint64_t
#define TD_LOAD(stored) td_double(stored)
#define TD_ROUND(real) td_double_bits(real)
#define TD_TO_BITS(real) td_double_bits(real)
#define TD_FROM_BITS(bits) td_double(bits)
#define TD_EXP(real) td_exp(real)
#include "attention.h"

#define TD_ELEMENT bf16
#define TD_STORED uint16_t
#define TD_REAL float
#define TD_REAL_BITS uint32_t
#define TD_LOAD(stored) td_from_bf16(stored)
#define TD_ROUND(real) td_to_bf16(real)
#define TD_TO_BITS(real) td_float_bits(real)
#define TD_FROM_BITS(bits) td_float(bits)
#define TD_EXP(real) td_expf(real)
#include "attention.h"

#define TD_ELEMENT_KERNELS(element)                                                                                  \
    {                                                                                                                \
        TD_NAME(dropout_##element), TD_NAME(relu_dropout_##element), TD_NAME(select_##element),                      \
            TD_NAME(dropout_add_##element), TD_NAME(relu_dropout_backward_##element),                                \
    }

#define TD_ATTENTION_KERNELS(element)                                                                                \
    { TD_NAME(attention_weights_##element), TD_NAME(attention_gradients_##element) }

static const td_kernels TD_NAME(kernels) = {
    .elements = {[TD_FLOAT32] = TD_ELEMENT_KERNELS(f32),
                 [TD_FLOAT64] = TD_ELEMENT_KERNELS(f64),
                 [TD_BFLOAT16] = TD_ELEMENT_KERNELS(bf16),
                 [TD_FLOAT16] = TD_ELEMENT_KERNELS(f16)},
    .keep_mask = TD_NAME(keep_mask),
    .random_bits = TD_NAME(random_bits),
    .standard_normal = TD_NAME(standard_normal),
    .stratified = TD_NAME(stratified),
    .attention = {[TD_FLOAT32] = TD_ATTENTION_KERNELS(f32),
                  [TD_FLOAT64] = TD_ATTENTION_KERNELS(f64),
                  [TD_BFLOAT16] = TD_ATTENTION_KERNELS(bf16)},
};

#undef TD_ELEMENT_KERNELS
#undef TD_ATTENTION_KERNELS
#undef TD_ISA
#undef TD_TARGET
#undef TD_NAME
#undef TD_LANES
#undef TD_VECTORS
#undef TD_STEP
#undef TD_VEC
#undef TD_SPLAT
#undef TD_MUL
#undef TD_HIGH
#undef TD_XOR3
#undef TD_PACK
#undef TD_COUNT
#undef TD_ADD
#undef TD_SHIFT
#undef TD_WEAVE
#undef TD_STORE
#undef TD_SCALE_HALVES
#undef TD_HALVES_AT_ONCE

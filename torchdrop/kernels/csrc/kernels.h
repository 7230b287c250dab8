/* All kernels for one instruction set, which TD_ISA names, and the table of them. */

#include "philox.h"
#include "rows.h"
#include "fused.h"

static const td_kernels TD_NAME(kernels) = {
    {TD_NAME(masked_f32), TD_NAME(masked_f64), TD_NAME(masked_bf16), TD_NAME(masked_f16), TD_NAME(keep), TD_NAME(draws),
     TD_NAME(normal), TD_NAME(relu_f32), TD_NAME(relu_f64), TD_NAME(relu_bf16), TD_NAME(relu_f16)},
    {TD_NAME(spread_f32), TD_NAME(spread_f64), TD_NAME(spread_bf16), TD_NAME(spread_f16)},
    TD_NAME(stratified),
    {{TD_NAME(add_f32), TD_NAME(add_f64), TD_NAME(add_bf16), TD_NAME(add_f16)},
     {TD_NAME(relu_backward_f32), TD_NAME(relu_backward_f64), TD_NAME(relu_backward_bf16), TD_NAME(relu_backward_f16)}},
};

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

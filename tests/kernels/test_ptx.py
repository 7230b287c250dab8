"""The interpreter of PTX: it computes what the language says, and what a GPU would not forgive is an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels import ptx

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2
)
.reqntid 32
{
	.reg .pred 	%p<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	ld.param.b32 	%r1, [kernel_param_2];
	mov.u32 	%r2, %tid.x;
	mul.wide.u32 	%rd3, %r2, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	ld.global.b32 	{ %r3 }, [ %rd4 + 0 ];
"""

TAIL = """
	st.global.b32 	[ %rd5 + 0 ], { %r9 };
	ret;
}
"""


def run(body: str, x: Tensor, number: int = 0, out: Tensor | None = None) -> Tensor:
    """What the body makes of x, of which each of 32 threads has an element in %r3, and of a number in %r1: %r9."""
    out = torch.empty(32, dtype=x.dtype) if out is None else out
    ptx.launch(HEAD + body + TAIL, 1, [("*i32", x), ("*i32", out), ("i32", number)])
    return out


INTEGERS = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
NUMBERS = torch.randn(32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mul.wide.u32 %rd9, %r3, -7; cvt.u32.u64 %r9, %rd9;", lambda i: i * -7),
        ("mul.hi.u32 %r9, %r3, %r1;", lambda i: i % 2**32 * 1000003 >> 32),
        ("mul.hi.s32 %r9, %r3, -1000003;", lambda i: i * -1000003 >> 32),
        ("shr.s32 %r8, %r3, 3; shr.u32 %r9, %r8, 1;", lambda i: (i >> 3) % 2**32 >> 1),
        ("shl.b32 %r9, %r3, 32;", lambda i: i * 0),
        ("shr.s32 %r9, %r3, 40;", lambda i: i >> 63),
        ("rem.s32 %r9, %r3, %r1;", lambda i: torch.fmod(i, 1000003)),
        ("div.s32 %r9, %r3, -1000;", lambda i: torch.div(i, -1000, rounding_mode="trunc")),
        ("bfe.u32 %r9, %r3, 4, 9;", lambda i: i >> 4 & 511),
        ("bfe.s32 %r9, %r3, 4, 1;", lambda i: -(i >> 4 & 1)),
        ("prmt.b32 %r9, %r3, %r1, 0x5130U;", lambda i: i & 255 | (i >> 16 & 0xFF00) | (i << 8 & 0xFF0000) | 0x42000000),
        ("{ .reg .b16 t; mov.b32 {t, %rs1}, %r3; mov.b32 %r9, {%rs1, t}; }", lambda i: i << 16 | (i >> 16 & 0xFFFF)),
        ("setp.lt.u32 %p1, %r3, %r1; selp.b32 %r9, 1, 2, %p1;", lambda i: torch.where(i % 2**32 < 1000003, 1, 2)),
        ("redux.sync.max.u32 %r9, %r3, -1;", lambda i: (i % 2**32).max() + i * 0),
        ("shfl.sync.bfly.b32 %r9, %r3, 5, 31, -1;", lambda i: i[torch.arange(32) ^ 5]),
    ],
)
def test_operations_on_integers(body: str, expected: Any) -> None:
    whole = expected(INTEGERS.long())
    assert torch.equal(run(body, INTEGERS, 1000003).long() % 2**32, whole % 2**32)


def test_numbers_are_rounded_as_pytorch_rounds_them() -> None:
    x = torch.cat([NUMBERS[:28], torch.tensor([1.00390625, 1.01171875, 3.4e38, float("inf")])])
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        body = f"cvt.rn.{kind}.f32 %rs1, %r3; cvt.f32.{kind} %r9, %rs1;"
        assert torch.equal(run(body, x), x.to(dtype).float())
        body = f"cvt.rn.{kind}x2.f32 %r9, %r3, 0f3F800000;"
        upper = run(body, x).view(torch.int32)
        assert torch.equal((upper >> 16).to(torch.int16).view(dtype), x.to(dtype))
        assert (upper & 0xFFFF == torch.ones(1, dtype=dtype).view(torch.int16).item()).all()
    assert ptx.rounded(np.array([np.nan], np.float32)).tolist() == [0x7FFF]
    body = "mul.rn.f32 %r8, %r3, 0f40400000; fma.rn.f32 %r9, %r8, %r3, 0f3F000000;"
    assert torch.allclose(run(body, NUMBERS), 3 * NUMBERS**2 + 0.5)


def test_numbers_are_clipped_between_0_and_1() -> None:
    assert torch.equal(run("cvt.sat.ftz.f32.f32 %r9, %r3;", NUMBERS), NUMBERS.clamp(0.0, 1.0))


def test_threads_that_part_meet_again() -> None:
    body = """
	setp.gt.s32 	%p1, %r3, 0;
	mov.b32 	%r9, 5;
	@%p1 bra 	$L__BB0_2;
	add.s32 	%r9, %r9, 1;
	@!%p1 bra 	$L__BB0_3;
$L__BB0_2:
	add.s32 	%r9, %r9, %r1;
$L__BB0_3:
	bar.sync 	0;
	add.s32 	%r9, %r9, 100;
"""
    assert torch.equal(run(body, INTEGERS, 20), torch.where(INTEGERS > 0, 125, 106).to(torch.int32))


def test_shared_memory_and_matrices() -> None:
    body = """
	mov.b32 	%r4, global_smem;
	shl.b32 	%r5, %r2, 4;
	add.s32 	%r6, %r4, %r5;
	stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6], {%r3};
	bar.sync 	0;
	shl.b32 	%r7, %r2, 2;
	ld.shared.b32 	{ %r9 }, [ %r7 + 0 ];
"""
    assert torch.equal(run(body, INTEGERS), INTEGERS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 {%r9}, [%rd4 + 4];", "behind the tensor"),
        ("add.s64 %rd8, %rd4, -4; ld.global.b32 {%r9}, [%rd8 + 0];", "in no tensor"),
        ("add.s64 %rd8, %rd4, %rd3; ld.global.b32 {%r9}, [%rd8 + 0];", "behind the tensor"),
        ("ld.global.v2.b32 {%r9, %r8}, [%rd4 + 0];", "no multiple of 8"),
        ("mov.b32 %r9, 1; @%p7 bra $L;", "read before it is written"),
        ("add.s32 %r9, %r8, 1;", "read before it is written"),
        ("div.s32 %r9, %r3, 0;", "division by zero"),
        ("setp.eq.b32 %p1, %r2, 0; @%p1 shfl.sync.idx.b32 %r9, %r3, 1, 31, -1;", "elsewhere"),
    ],
)
def test_what_a_gpu_would_not_forgive_is_an_error(body: str, message: str) -> None:
    x = torch.zeros(48, dtype=torch.int32)[8:40]
    with pytest.raises(AssertionError, match=message):
        run(body, x)


def test_unknown_instructions_and_arguments_that_do_not_fit_are_errors() -> None:
    with pytest.raises(KeyError, match="brev"):
        run("brev.b32 %r9, %r3;", INTEGERS)
    with pytest.raises(AssertionError, match="kernel_param_2 is a u32"):
        ptx.launch(HEAD + TAIL, 1, [("*i32", INTEGERS), ("*i32", INTEGERS), ("i64", 1)])
    with pytest.raises(AssertionError):
        ptx.launch(HEAD + TAIL, 1, [("*i32", INTEGERS), ("*i32", INTEGERS), ("i32", 1), ("i32", 1)])

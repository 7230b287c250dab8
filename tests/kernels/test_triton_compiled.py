"""The Triton kernels as they are compiled for NVIDIA's GPUs, run by an interpreter of their machine language.

Triton's own interpreter runs the kernels' Python, so it shows nothing of what the compiler makes of it. Here a stand-in
for the driver of a GPU gives each launch to `ptx`, which also sees to it that no address is outside a tensor. It all
happens in a process of its own, where Triton's interpreter is off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import ptx
from tests.kernels.test_triton_build import Driver, apart, cache, missing  # noqa: F401 (a fixture)
from tests.kernels.triton_kernels import KEY, added, identical
from torchdrop.kernels import reference
from torchdrop.kernels import triton as backend
from torchdrop.kernels.mask_params import ONE, MaskParams, alpha, mask_params, params_tensor
from torchdrop.kernels.masking import WHOLE, MaskSlice
from torchdrop.ops import fused

pytestmark = [pytest.mark.skipif(bool(missing), reason=missing), pytest.mark.slow]

Case = tuple[Callable[[], Tensor | None], Callable[[], Tensor]]

KEYS = torch.arange(6).reshape(3, 2) * 7919

BRIEF = ("whole", "affine", "groups", "add bias", "relu", "relu backward", "gelu", "gelu backward")
"""What is compiled for float16 and float64, too, whose vectors are as those of bfloat16 and float32, or shorter."""

assembly: dict[bytes, str] = {}
"""Kernels' PTX by their machine code, which is all that a driver is given."""


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = source.signature

    def __call__(self, x: int, y: int, z: int, stream: Any, function: str, *rest: Any) -> None:
        arguments = zip(self.signature.values(), rest[4:], strict=True)
        ptx.launch(function, x * y * z, [(kind, value) for kind, value in arguments if kind != "constexpr"])


class Interpreted(Driver):
    launcher_cls = Launcher  # type: ignore[assignment]

    def load_binary(self, name: str, binary: bytes, *_: Any) -> tuple[Any, ...]:
        return 1, assembly[bytes(binary)], 32, 0, 1024


def masked(x: Tensor, key: Tensor, given_params: Any, shape: Any, part: MaskSlice = WHOLE) -> Case:
    return (
        lambda: backend.masked(x, key, given_params, shape, part),
        lambda: reference.masked(x, key, given_params, shape, part),
    )


def in_memory(x: Tensor, given_params: MaskParams, shape: Any, linear: bool = False) -> Case:
    """As if the parameters were in a device's memory."""

    def call() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "params_by_value", lambda one: one)
            return backend.masked(x, KEY, given_params.tensor(), shape, linear=linear)

    return call, lambda: reference.masked(x, KEY, given_params.linear() if linear else given_params, shape)


def exact_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Every kernel, in each of its forms, and what it has to give bit for bit."""
    shape, some, affine = (3, 40, 33), mask_params(0.37), mask_params(0.6, alpha)
    x, residual, bias = (torch.randn(size).to(dtype) for size in (shape, shape, shape[-1:]))
    x[0, 0, :8], x[0, 0, 8:10] = -0.0, torch.tensor([torch.inf, -torch.inf])
    yield "whole", masked(x, KEY, some, shape)
    yield "several programs", masked(*[torch.randn(5001).to(dtype), KEY, mask_params(0.5), (5001,)])
    yield "affine", masked(x, KEY, affine, shape)
    yield "keys", masked(x, KEYS, some, shape[1:])
    yield "keys, affine, unaligned", masked(x, KEYS, affine, shape[1:], MaskSlice(5))
    yield "runs", masked(x.reshape(3, 1320), KEYS, some, (1320,), MaskSlice(11, 33, 70))
    yield "far away", masked(x, KEY, some, shape, MaskSlice(2**33 + 3))
    yield "groups", masked(x, KEY, some, (3, 40, 1))
    yield "groups, affine, unaligned", masked(x, KEY, affine, (3, 40, 1), MaskSlice(3))
    yield "groups of 24", masked(x.reshape(165, 24), KEY, some, (165, 1))
    yield "groups of 3", masked(x.reshape(-1, 3), KEY, some, (1320, 1))
    yield "large groups", masked(x.reshape(3, 1320), KEY, some, (3, 1))
    yield "groups, keys", masked(x, KEYS, some, (40, 1))
    yield "parameters in memory", in_memory(x, some, shape)
    yield "affine parameters in memory", in_memory(x, affine, shape)
    yield "their linear part in memory", in_memory(x, affine, shape, linear=True)
    yield "groups, parameters in memory", in_memory(x, some, (3, 40, 1))
    for name, given in (("add", None), ("add bias", bias)):
        yield (
            name,
            (
                lambda given=given: backend.dropout_add(x, given, residual, KEY, some),
                lambda given=given: added(x, given, residual, some),
            ),
        )
    wide = x[..., :32].contiguous()
    yield (
        "add aligned bias",
        (
            lambda: backend.dropout_add(wide, bias[:32].clone(), wide, KEY, some),
            lambda: added(wide, bias[:32], wide, some),
        ),
    )


def equal_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Where the reference adds a shift of 0, or PyTorch rectifies: there zeros have other signs."""
    shape, some = (3, 40, 33), mask_params(0.37)
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x[0, 0, :8] = -0.0
    yield "sets of parameters by key", masked(x, KEYS, params_tensor(torch.rand(3, 1, 1)), (40, 33))
    yield "sets of parameters by row", masked(x.reshape(40, 99), KEY, params_tensor(torch.rand(40, 1)), (40, 99))
    y = reference.masked(torch.relu(x), KEY, some, shape)
    yield "relu", (lambda: backend.activation_dropout(x, KEY, some, "relu"), lambda: y)
    yield (
        "relu backward",
        (
            lambda: backend.activation_dropout_backward(residual, y, KEY, some, "relu"),
            lambda: torch.where(y > 0, reference.masked(residual, KEY, MaskParams(ONE, some.scale), shape), 0),
        ),
    )


def close_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    x, g, some = torch.randn(3, 40, 33).to(dtype), torch.randn(3, 40, 33).to(dtype), mask_params(0.37)

    def drop(value: Tensor) -> Tensor:
        return reference.masked(value, KEY, some, x.shape)

    for name in ("gelu", "gelu_tanh"):
        yield (
            name,
            (
                lambda name=name: backend.activation_dropout(x, KEY, some, name),
                lambda name=name: fused.composed_activation(x.double(), name, drop),
            ),
        )
        yield (
            f"{name} backward",
            (
                lambda name=name: backend.activation_dropout_backward(g, x, KEY, some, name),
                lambda name=name: fused._composed_gradient(g.double(), x.double(), name, drop),
            ),
        )


def other_cases() -> Iterator[tuple[str, Case]]:
    """Masks and draws themselves, and thresholds that draws are equal to, whose upper halves decide nothing."""
    found = reference.random_bits((2100,), KEY)
    yield "random bits", (lambda: backend.random_bits((2100,), KEY), lambda: found)
    yield "random bits of keys", (lambda: backend.random_bits((70,), KEYS), lambda: reference.random_bits((70,), KEYS))
    yield (
        "mask",
        (
            lambda: backend.keep_mask((2100,), KEY, mask_params(0.3)),
            lambda: reference.keep_mask((2100,), KEY, mask_params(0.3)),
        ),
    )
    x = torch.randn(2100)
    thresholds = [int(found[i]) + more for i in (0, 777, 2099) for more in (0, 1)]
    for below in (0, 1, *thresholds, 2**31 - 1, 2**31 + 1, ONE - 1, ONE):
        yield f"below {below}", masked(x, KEY, MaskParams(below, 1.25), x.shape)


def verdict(case: Case, agrees: Callable[[Tensor, Tensor], bool]) -> str:
    call, expected = case
    try:
        got = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if got is not None and agrees(got, expected()) else "another result"


def close(got: Tensor, expected: Tensor) -> bool:
    allowed = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 3e-6, torch.float64: 1e-14}[got.dtype]
    return torch.allclose(got.double(), expected, rtol=allowed, atol=allowed)


def main(architecture: int, dtypes: list[torch.dtype]) -> None:
    """In the child: the names of all cases, and what is wrong with them."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    compiled = CompiledKernel.__init__

    def noted(self: Any, *arguments: Any) -> None:
        compiled(self, *arguments)
        assembly[bytes(self.kernel)] = self.asm["ptx"]

    CompiledKernel.__init__ = noted
    driver.set_active(Interpreted(architecture))
    torch.manual_seed(5)
    found = {}
    if torch.float32 in dtypes:
        found = {name: verdict(case, identical) for name, case in other_cases()}
    for dtype in dtypes:
        for cases, agrees in ((exact_cases, identical), (equal_cases, torch.equal), (close_cases, close)):
            for name, case in cases(dtype):
                if name in BRIEF or dtype in (torch.bfloat16, torch.float32):
                    found[f"{name}, {dtype}"] = verdict(case, agrees)
    print(json.dumps(found))


@pytest.mark.parametrize(("dtypes", "count"), [(("bfloat16", "float16"), 36), (("float32", "float64"), 51)])
def test_compiled_kernels_give_the_references_bits(dtypes: tuple[str, ...], count: int, cache: Path) -> None:  # noqa: F811
    found = apart("tests.kernels.test_triton_compiled", cache, "90", *dtypes)
    assert len(found) == count
    assert {name: why for name, why in found.items() if why} == {}


if __name__ == "__main__":
    main(int(sys.argv[1]), [getattr(torch, name) for name in sys.argv[2:]])

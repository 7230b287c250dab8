"""Masks in kernels that Inductor generates: eager's, bit for bit, in one kernel with what is around them.

Code for CUDA is generated, compiled for sm_90, and run by an interpreter of PTX. That happens in a process of its own,
where Triton's interpreter is off. The same expressions in Inductor's C++ run on the CPU, where only tests ask for them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.kernels.test_triton_build import apart, cache, missing  # noqa: F401 (a fixture)
from torchdrop.kernels import inductor, reference
from torchdrop.kernels.mask_params import ONE
from torchdrop.kernels.masking import MaskSlice

KEY = torch.tensor([-3, 2**62 + 5])
WORDS = {torch.uint32: np.uint32, torch.uint64: np.uint64, torch.int64: np.int64, torch.float64: np.float64}


def of_numbers(first: int, n: int, threshold: float, small: bool) -> Any:
    """The graph of a mask whose values are numbers: elements `first` to ``first + n - 1`` of a larger one."""

    def index_expr(place: int, dtype: torch.dtype) -> Any:
        return np.arange(place, place + n, dtype=np.uint64).astype(WORDS[dtype])

    ops = types.SimpleNamespace(
        index_expr=index_expr, constant=lambda value, dtype: WORDS[dtype](value),
        to_dtype=lambda value, dtype: np.asarray(value).astype(WORDS[dtype]),
        mul=np.multiply, add=np.add, sub=np.subtract, bitwise_and=np.bitwise_and, bitwise_or=np.bitwise_or,
        bitwise_xor=np.bitwise_xor, bitwise_left_shift=np.left_shift, bitwise_right_shift=np.right_shift,
        lt=np.less, gt=np.greater, where=np.where,
    )  # fmt: skip
    memory = {"key": KEY.numpy(), "params": np.array([threshold, 2.0, 0.0, 0.0])}
    return types.SimpleNamespace(
        ops=ops, numbers=lambda name: memory[name].__getitem__, fits=lambda shape, limit: small,
        place=lambda shape: lambda index: first,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "small"), [(0, True), (0, False), (2**31 - 40, True), (2**32 - 24, False), (2**40 + 8, False)]
)
def test_random_bits_are_the_references_wherever_an_element_is(first: int, small: bool) -> None:
    with np.errstate(over="ignore"):
        found = inductor._Mask(of_numbers(first, 48, 0.0, small), None, "key", "params", ()).random_bits(())
    assert found.dtype == np.uint32
    assert found.tolist() == reference.random_bits((48,), KEY, MaskSlice(first)).tolist()


def test_thresholds_are_compared_as_the_reference_compares_them() -> None:
    bits = reference.random_bits((48,), KEY)
    equal = [float(bits[i]) + more for i in (0, 47) for more in (0.0, 1.0)]
    for threshold in (0.0, 1.0, *equal, 2.0**31, ONE - 1.0, float(ONE), 2.0 * ONE, -1.0, float("inf"), float("nan")):
        with np.errstate(over="ignore"):
            found = inductor._Mask(of_numbers(0, 48, threshold, True), None, "key", "params", ()).kept(())
        assert found.tolist() == (bits.double() < threshold).tolist(), threshold


class Several(nn.Module):
    """Layers that each have an operand of their own."""

    def __init__(self, layers: dict[str, Callable[..., Tensor]]) -> None:
        super().__init__()
        self.layers = list(layers.values())

    def forward(self, x: list[Tensor], bias: Tensor, residual: Tensor) -> list[Tensor]:
        more = {torchdrop.BiasDropoutAdd: (bias, residual), torchdrop.DropoutAdd: (residual,)}
        return [f(each, *more.get(type(f), ())) for f, each in zip(self.layers, x, strict=True)]


def exact_layers() -> dict[str, Callable[..., Tensor]]:
    return {
        "dropout": torchdrop.Dropout(0.3),
        "shared axes": torchdrop.Dropout(0.3, shared_axes=0),
        "channels": torchdrop.Dropout1d(0.3),
        "transposed": lambda x: torchdrop.functional.dropout(x.transpose(1, 2), 0.3),
        "none": torchdrop.Dropout(keep_prob=1.0),
        "alpha": torchdrop.AlphaDropout(0.3),
        "relu": torchdrop.ReLUDropout(0.3),
        "add": torchdrop.DropoutAdd(0.3),
        "bias and add": torchdrop.BiasDropoutAdd(0.3),
    }


ROUNDED = {"alpha", "add", "bias and add"}
"""On CUDA a product and a sum are one step."""


def outcomes(function: Callable[..., Any], dtype: torch.dtype, count: int, rows: int = 3) -> list[Tensor]:
    """Outputs and the gradients of the first operands."""
    torch.manual_seed(2)
    xs = [torch.randn(rows, 5, 24).to(dtype).requires_grad_() for _ in range(count)]
    bias, residual = torch.randn(24).to(dtype), torch.randn(rows, 5, 24).to(dtype)
    torch.manual_seed(3)
    ys = function(xs, bias, residual)
    return [*ys, *torch.autograd.grad(ys, xs, [torch.ones_like(y) for y in ys])]


def twice(layer: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """For ones, the gradient is twice the output if both have the same masks, whatever is computed again."""

    def inner(x: Tensor) -> Tensor:
        h = layer(x)
        return layer(h * h)

    return lambda x: checkpoint(inner, x, use_reentrant=False)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Expressions on the CPU, too. What is compiled so must not be found by others."""
    import torch._functorch.config
    import torch._inductor.config

    monkeypatch.setattr(inductor, "DEVICES", {"cpu"})
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch.compiler.reset()


def calls(code: list[str]) -> int:
    """Counts the operators that were left as they are."""
    names = ("masked", "dropout_add", "activation_dropout", "activation_dropout_backward")
    return sum(one.count(f"torchdrop.{name}.default(") for one in code for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "dynamic", "count"), [(torch.float32, False, 9), (torch.bfloat16, True, 4), (torch.float16, False, 2)]
)
def test_in_c_plus_plus_they_are_eagers_bit_for_bit(
    dtype: torch.dtype, dynamic: bool, count: int, on_the_cpu: None
) -> None:
    from torch._inductor.utils import run_and_get_code

    layers = dict(list(exact_layers().items())[:count])
    model = Several(layers)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    got, code = run_and_get_code(lambda: outcomes(compiled, dtype, len(layers)))
    assert calls(code) == 0
    expected = outcomes(model, dtype, len(layers))
    for name, y, z in zip([*layers, *layers], got, expected, strict=True):
        assert torch.equal(y, z), name
    assert [y.stride() for y in got[:count]] == [z.stride() for z in expected[:count]]


@pytest.mark.slow
def test_recomputed_masks_are_those_of_forward(on_the_cpu: None) -> None:
    function, x = twice(torchdrop.Dropout(0.5)), torch.ones(4, 300, requires_grad=True)
    torch.manual_seed(1)
    y = torch.compile(function, fullgraph=True)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(1)
    assert torch.equal(y, function(x))
    assert torch.equal(gradient, 2 * y)


@pytest.mark.slow
def test_what_no_expression_serves_stays_an_operator(on_the_cpu: None) -> None:
    from torch._inductor.utils import run_and_get_code

    each, wide = torchdrop.Dropout(keep_prob=torch.linspace(0.1, 0.9, 24)), torchdrop.Dropout(0.3)

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return each(x), wide(x.double())

    x = torch.randn(3, 24)
    torch.manual_seed(4)
    got, code = run_and_get_code(lambda: torch.compile(model, fullgraph=True)(x))
    torch.manual_seed(4)
    assert calls(code) == 2
    assert all(torch.equal(y, z) for y, z in zip(got, model(x), strict=True))


# On CUDA.


def chain(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, residual: layer(F.gelu(x)) + residual


def counted(codes: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "externs": [name for name in code.externs if "draw_key" not in name],
            "bytes": [kernel.bytes_an_element() for kernel in code.kernels],
        }
        for code in codes
    ]


def main() -> None:
    """In the child: compiles for CUDA and runs what it gets."""
    from tests.kernels.generated import compiled

    folder, found = Path(tempfile.mkdtemp()), {}
    for dtype in (torch.float32, torch.bfloat16):
        layers = exact_layers()
        for name in ("channels", "none", "add") if dtype is torch.bfloat16 else list(layers)[1:]:
            del layers[name]
        model = Several(layers)
        function, codes = compiled(model, folder)
        got, expected = outcomes(function, dtype, len(layers)), outcomes(model, dtype, len(layers))
        verdicts = {
            f"{name} {kind}": torch.equal(y, z)
            or (name in ROUNDED and torch.equal(y != 0, z != 0) and torch.allclose(y, z, atol=0.04))
            for (name, kind), y, z in zip(
                [(name, kind) for kind in ("output", "gradient") for name in layers], got, expected, strict=True
            )
        }
        found[f"layers {dtype}"] = {"verdicts": verdicts, "codes": counted(codes)}
    x, residual = torch.randn(16, 40), torch.randn(16, 40)
    for name, dtype in (("narrow", torch.bfloat16), ("wide", torch.float64)):
        layer, given = torchdrop.Dropout(0.3), (x.to(dtype).requires_grad_(), residual.to(dtype))
        function, codes = compiled(chain(layer), folder)
        torch.manual_seed(3)
        y = function(*given)
        (gradient,) = torch.autograd.grad(y.sum(), given[0])
        torch.manual_seed(3)
        z = chain(layer)(*given)
        (expected_gradient,) = torch.autograd.grad(z.sum(), given[0])
        close = torch.allclose(y, z, atol=0.04) and torch.allclose(gradient, expected_gradient, atol=0.04)
        found[name] = {"verdicts": {"close": close}, "codes": counted(codes)}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def on_cuda(cache: Path) -> dict[str, Any]:  # noqa: F811
    found: dict[str, Any] = apart("tests.kernels.test_inductor", cache)
    return found


needs_triton = pytest.mark.skipif(bool(missing), reason=missing)


@needs_triton
@pytest.mark.slow
def test_on_cuda_they_are_eagers(on_cuda: dict[str, Any]) -> None:
    """Bit for bit, but where Inductor rounds otherwise: then masks are the same, and values close."""
    verdicts = {f"{case}, {name}": fine for case in on_cuda for name, fine in on_cuda[case].get("verdicts", {}).items()}
    assert len(verdicts) == 2 * (1 + 6 + 1)
    assert all(verdicts.values()), verdicts


@needs_triton
@pytest.mark.slow
def test_a_mask_is_in_one_kernel_with_what_is_around_it(on_cuda: dict[str, Any]) -> None:
    """gelu, dropout and a sum read two tensors of bfloat16 and write one, forward and backward: gradient, input and
    gradient there."""
    forward, backward = on_cuda["narrow"]["codes"]
    assert forward == {"externs": [], "bytes": [6]}
    assert backward == {"externs": [], "bytes": [6]}
    for case in ("layers torch.float32", "layers torch.bfloat16"):
        assert all(code["externs"] == [] for code in on_cuda[case]["codes"]), case


@needs_triton
@pytest.mark.slow
def test_an_operator_that_stays_takes_no_kernel_for_its_linear_part(on_cuda: dict[str, Any]) -> None:
    forward, backward = on_cuda["wide"]["codes"]
    assert forward["externs"] == backward["externs"] == ["torchdrop.masked.default"]
    assert len(forward["bytes"]) == 2
    assert len(backward["bytes"]) == 1


if __name__ == "__main__":
    main(*sys.argv[1:])

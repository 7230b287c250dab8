"""Where torch.nn's layers give or refuse something out of the ordinary, ours do the same: element types that no kernel
takes, tensors that must not be written to, nested tensors."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests import TORCH
from torchdrop import functional as TF
from torchdrop.core.inputs import check_inplace

SHAPES = {
    "dropout": (2, 3),
    "dropout1d": (2, 3, 4),
    "dropout2d": (2, 3, 4, 4),
    "dropout3d": (2, 3, 2, 2, 2),
    "alpha_dropout": (2, 3),
    "feature_alpha_dropout": (2, 3, 4),
}
LAYERS = {
    "dropout": "Dropout",
    "dropout1d": "Dropout1d",
    "dropout2d": "Dropout2d",
    "dropout3d": "Dropout3d",
    "alpha_dropout": "AlphaDropout",
    "feature_alpha_dropout": "FeatureAlphaDropout",
}
UNUSUAL = (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
COMPLEX = (torch.complex64, torch.complex128)


def given(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Any, ...]:
    """What a call gives for a copy of x: values, whether they are the copy's own, and the error's class."""
    x = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            y = f(x)
        except (RuntimeError, TypeError) as error:
            return type(error), x.tolist()
    return y.dtype, y.tolist(), y.data_ptr() == x.data_ptr(), x.tolist()


@pytest.mark.skipif(TORCH < (2, 7), reason="PyTorch 2.6 raises a base class of the error")
@pytest.mark.parametrize("dtype", UNUSUAL)
@pytest.mark.parametrize("name", SHAPES)
def test_element_types_without_a_kernel_are_torchs_where_nothing_is_drawn(name: str, dtype: torch.dtype) -> None:
    ours, stock = getattr(TF, name), getattr(F, name)
    layer, stock_layer = getattr(torchdrop, LAYERS[name]), getattr(nn, LAYERS[name])
    for p, training, inplace in itertools.product((0.0, 1.0, 0.5), (True, False), (False, True)):
        for shape in (SHAPES[name], (0, *SHAPES[name][1:])):
            x = torch.ones(shape).to(dtype)
            expected = given(lambda x, a=(p, training, inplace): stock(x, *a), x)
            assert given(lambda x, a=(p, training, inplace): ours(x, *a), x) == expected
            if "alpha" not in name:  # torch.nn's layers ignore `inplace` there
                expected = given(lambda x, a=(p, inplace, training): stock_layer(*a[:2]).train(a[2])(x), x)
            assert given(lambda x, a=(p, inplace, training): layer(*a[:2]).train(a[2])(x), x) == expected


# Complex numbers.


@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("name", [name for name in SHAPES if "alpha" not in name])
def test_complex_numbers_are_kept_or_dropped_as_one_under_the_mask_of_real_numbers(
    name: str, dtype: torch.dtype
) -> None:
    f = getattr(TF, name)
    x = torch.randn(SHAPES[name], dtype=dtype, generator=torch.Generator().manual_seed(1)).mT.requires_grad_()

    def drawn(x: Tensor, **kwargs: Any) -> Tensor:
        with torchdrop.seeded(3):
            return f(x, 0.5, **kwargs)

    mask = drawn(torch.ones(x.shape, dtype=x.real.dtype))
    assert mask.unique().tolist() == [0.0, 2.0]
    y = drawn(x)
    assert torch.equal(y, x * mask)
    assert y.dtype == dtype
    assert torch.equal(drawn(x.detach().conj()), x.detach().conj() * mask)
    assert torch.equal(drawn(x, inverted=False), x * (mask / 2))
    g = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    assert torch.equal(*torch.autograd.grad(y, x, g), g * mask)
    for own in (x.detach().clone(), x.detach().conj()):
        assert drawn(own, inplace=True) is own
        assert torch.equal(own.abs(), y.abs())
    leaf = x.detach().requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
        f(leaf, 0.5, inplace=True)
    assert torch.equal(leaf, before)
    z = x * 1
    assert torch.equal(*torch.autograd.grad(drawn(z, inplace=True), x, g), g * mask)
    k = torch.tensor(1.0, dtype=torch.float64)
    assert f(x, keep_prob=k) is x
    stack = torch.stack([x.detach()] * 3)
    with torchdrop.seeded(3):
        stacked = torch.func.vmap(lambda x: f(x, 0.5), randomness="same")(stack)
    assert torch.equal(stacked, stack * mask)


def test_complex_numbers_have_rates_axes_and_shards_as_real_ones() -> None:
    x, ones = torch.full((3, 4, 5), 1 + 1j), torch.ones(3, 4, 5)
    rates = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)[:, None]
    for kwargs in (
        {"keep_prob": rates},
        {"keep_prob": 0.5, "shared_axes": -1},
        {"keep_prob": 0.5, "noise_shape": (3, 1, None)},
        {"keep_prob": 0.5, "shard": torchdrop.Shard(-1, 2, 9)},
    ):
        results = []
        for input in (x, ones):
            with torchdrop.seeded(3):
                results.append(TF.dropout(input, **kwargs))
        assert torch.equal(results[0], x * results[1]), kwargs
        assert 0 < results[1].count_nonzero() < 60, kwargs


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_compiled_code_drops_complex_numbers_as_eager_code() -> None:
    x = torch.ones(8, 5, dtype=torch.complex64, requires_grad=True)
    layer = torchdrop.Dropout(0.5)
    results = []
    for f in (layer, torch.compile(layer, fullgraph=True)):
        with torchdrop.seeded(3):
            y = f(x)
        results.append((y, *torch.autograd.grad(y.real.sum(), x)))
    assert all(map(torch.equal, *results))
    assert 0 < results[0][0].count_nonzero() < 40


def test_functions_that_are_defined_for_real_numbers_alone_refuse_complex_ones() -> None:
    for f in (TF.alpha_dropout, TF.feature_alpha_dropout, TF.drop_path):
        with pytest.raises(NotImplementedError, match=r"is not implemented for torch\.complex64"):
            f(torch.ones(2, 3, 4, dtype=torch.complex64), 0.5, training=True)


def test_complex_zeros_have_a_gradient_as_torchs() -> None:
    x = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    (gradient,) = torch.autograd.grad(TF.dropout(x, 1.0).abs().sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


# Tensors that must not be written to.


class Viewed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view(4, 3)


def wanted() -> Tensor:
    return torch.rand(4, 3, requires_grad=True) + 1.0


def under(mode: Any, view: Callable[[Tensor], Tensor]) -> Tensor:
    x = wanted()
    with mode:
        return view(x)


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.rand(4, 3) + 1.0


FORBIDDEN: dict[str, Callable[[], Tensor]] = {
    "leaf": lambda: torch.ones(4, 3, requires_grad=True),
    "view of a leaf": lambda: torch.ones(4, 3, requires_grad=True).view(-1),
    "split": lambda: wanted().split(2)[1],
    "chunk": lambda: wanted().chunk(2)[0],
    "unbind": lambda: wanted().unbind()[2],
    "split of a leaf": lambda: torch.ones(4, 3, requires_grad=True).split(2)[1],
    "view of a split": lambda: wanted().split(2)[1].view(-1),
    "view without gradients": lambda: under(torch.no_grad(), lambda x: x.view(-1)),
    "view in inference mode": lambda: under(torch.inference_mode(), lambda x: x.view(-1)),
    "view from a function": lambda: Viewed.apply(wanted()),
    "expanded": lambda: torch.ones(1, 3).expand(4, 3),
    "inference": inference,
    "view of inference": lambda: inference()[1:],
}
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda x: TF.dropout(x, 0.5, True, True),
    "layer": torchdrop.Dropout(0.5, inplace=True),
    "shared": torchdrop.Dropout(0.5, inplace=True, shared_axes=0),
    "alpha": lambda x: TF.alpha_dropout(x, 0.5, True, True),
    "gaussian": lambda x: TF.gaussian_dropout(x, 0.5, inplace=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", FORBIDDEN)
def test_what_torch_does_not_write_to_is_refused_before_anything_changes(which: str, form: str) -> None:
    x = FORBIDDEN[which]()
    with torch.no_grad():
        before, version = x.clone(), None if x.is_inference() else x._version
    with pytest.raises(RuntimeError) as caught:
        FORMS[form](x)
    with torch.no_grad():
        assert torch.equal(x, before)
    assert x.is_inference() or x._version == version
    with pytest.raises(RuntimeError) as torchs:
        F.dropout(x, 0.5, True, True)
    assert str(torchs.value)[:70] == str(caught.value)[:70]


def test_what_torch_writes_to_is_written_to() -> None:
    for made in (wanted, lambda: wanted().view(-1), lambda: torch.ones(4, 3).split(2)[0], lambda: wanted()[1:]):
        x = made()
        assert FORMS["function"](x) is x
        assert (x == 0).any()
    with torch.no_grad():
        x = wanted().split(2)[0]
        check_inplace(x)
    with torch.inference_mode():
        x = inference()
        assert FORMS["layer"](x) is x


# Jagged nested tensors.


def jagged(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = [torch.ones(length, 40, dtype=dtype) for length in (3, 1, 5)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=requires_grad)


@pytest.mark.parametrize("layer", [torchdrop.Dropout(0.5), lambda x: TF.dropout(x, 0.5)])
def test_the_values_of_a_jagged_tensor_are_dropped(layer: Callable[[Tensor], Tensor]) -> None:
    x = jagged(requires_grad=True)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(y.values(), layer(torch.ones(9, 40)))
    assert y.shape == x.shape == F.dropout(x, 0.5).shape
    assert (y + x).values().unique().tolist() == [1.0, 3.0]
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient.values(), y.values())
    assert y._maybe_max_seqlen == x._maybe_max_seqlen


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_code_drops_values_of_jagged_tensors(compiler: str) -> None:
    torch.compiler.reset()
    layer, x = torchdrop.Dropout(0.5), jagged(requires_grad=True)
    found = []
    for call in (torch.compile(layer, fullgraph=True, backend=compiler), layer):
        torch.manual_seed(1)
        y = call(x)
        found += [y.values(), torch.autograd.grad(y, x, torch.ones_like(y))[0].values()]
    assert all(torch.equal(found[0], other) for other in found)


def test_jagged_tensors_meet_what_holds_for_others() -> None:
    x = jagged()
    assert torchdrop.Dropout(0.5).eval()(x) is x
    assert torch.equal(TF.dropout(x, 0.0).values(), x.values())
    assert torch.equal(TF.dropout(x, 1.0).values(), torch.zeros(9, 40))
    assert torch.equal(TF.dropout(jagged(dtype=torch.int64), 1.0).values(), torch.zeros(9, 40, dtype=torch.int64))
    assert TF.dropout(x, 0.5, training=False, inverted=False).values().unique().tolist() == [0.5]
    columns = torch.nested.nested_tensor_from_jagged(torch.ones(4, 8), torch.tensor([0, 3, 8]), jagged_dim=2)
    assert TF.dropout(columns).shape == columns.shape
    with pytest.raises(RuntimeError, match="result type Float can't be cast to the desired output type Long"):
        TF.dropout(jagged(dtype=torch.int64))
    with pytest.raises(TypeError, match="shared_axes, noise_shape and shard are for strided tensors"):
        torchdrop.Dropout(0.5, shared_axes=1)(x)
    for f in (F.dropout, TF.dropout):
        with pytest.raises(NotImplementedError):
            f(x, 0.5, True, True)
        with pytest.raises(ValueError, match="contiguous jagged layout NestedTensor"):
            f(x.transpose(1, 2))
    with pytest.raises(TypeError, match=r"alpha_dropout takes strided tensors, got the layout torch\.jagged"):
        TF.alpha_dropout(x, 0.5, True)


@pytest.mark.parametrize(("name", "shape"), [("Dropout2d", (2, 3, 4)), ("Dropout3d", (2, 3, 4)), ("Dropout2d", (2, 3))])
def test_shapes_of_which_torch_warns_compile_in_one_piece(name: str, shape: tuple[int, ...]) -> None:
    layer, x = getattr(torchdrop, name)(), torch.ones(shape)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match=f"{name.lower()}: Received a"):
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"{name.lower()}: Received a"):
        expected = layer(x)
    torch.manual_seed(0)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    assert y.shape == x.shape

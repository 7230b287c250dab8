"""Losses of two passes: their definitions, what they preserve, and the two passes themselves."""

from __future__ import annotations

import copy
import itertools
import math
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import torchdrop
from torchdrop.losses import FraternalLoss, RDropLoss, fraternal, r_drop, two_passes

SHAPES = [(4,), (5, 4), (5, 4, 3), (2, 4, 3, 2)]


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def indices(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(4, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of each position, by definition."""
    dim = 0 if a.dim() == 1 else 1
    p, q = a.softmax(dim), b.softmax(dim)
    return (p * (p / q).log()).sum(dim)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_r_drop_is_its_definition(shape: tuple[int, ...], reduction: str) -> None:
    (a, b), y = pair(shape), indices(shape)
    kl = (divergence(a, b) + divergence(b, a)) / 2
    kl = kl if reduction == "none" else getattr(kl, reduction)()
    entropy = (F.cross_entropy(a, y, reduction=reduction) + F.cross_entropy(b, y, reduction=reduction)) / 2
    found = r_drop(a, b, y, 0.7, reduction=reduction)
    torch.testing.assert_close(found, entropy + 0.7 * kl, rtol=1e-12, atol=1e-12)


def test_divergence_is_zero_without_dropout_and_so_is_its_gradient() -> None:
    logits, y = torch.randn(5, 4, dtype=torch.float64), indices((5, 4))
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    r_drop(a, b, y, 100.0).backward()
    plain = logits.clone().requires_grad_()
    expected = F.cross_entropy(plain, y)
    expected.backward()
    assert torch.equal(r_drop(logits, logits, y, 100.0), F.cross_entropy(logits.log_softmax(1), y))
    torch.testing.assert_close(a.grad, plain.grad / 2)
    torch.testing.assert_close(b.grad, plain.grad / 2)
    assert fraternal(logits, logits) == 0


def test_losses_are_symmetric_in_the_passes() -> None:
    (a, b), y = pair((5, 4, 3)), indices((5, 4, 3))
    torch.testing.assert_close(r_drop(a, b, y), r_drop(b, a, y), rtol=1e-14, atol=0)
    assert torch.equal(fraternal(a, b), fraternal(b, a))


def test_divergence_is_never_negative() -> None:
    a = torch.randn(1000, 4)
    b = a + 1e-4 * torch.randn(1000, 4)
    nothing = torch.full((1000,), -100)
    assert (r_drop(a, b, torch.zeros(1000, dtype=torch.long), 1.0, reduction="none") > 0).all()
    assert not r_drop(a, b, nothing, 1.0, reduction="none").any()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, ...]) -> None:
    (a, b), y = pair(shape), indices(shape)
    a.requires_grad_(), b.requires_grad_()
    mask = torch.rand(y.shape) < 0.7
    for f in (lambda a, b: r_drop(a, b, y, 0.5, mask=mask, reduction="sum"), fraternal):
        assert torch.autograd.gradcheck(f, (a, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (a, b), fast_mode=True)


def test_weights_smoothing_and_probabilities_are_those_of_the_cross_entropy() -> None:
    (a, b), y = pair((6, 4)), indices((6, 4))
    kl = (divergence(a, b) + divergence(b, a)).mean() / 2
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    for target in (y, torch.rand(6, 4).softmax(1)):
        for smoothing in (0.0, 0.2):
            options: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing}
            double = target.double() if target.is_floating_point() else target
            entropies = [F.cross_entropy(x, double, weight.double(), label_smoothing=smoothing) for x in (a, b)]
            torch.testing.assert_close(r_drop(a, b, target, 2.0, **options), sum(entropies) / 2 + 2 * kl)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_and_masked_positions_do_not_count(reduction: str) -> None:
    (a, b), y = pair((5, 4, 3)), indices((5, 4, 3))
    mask = torch.rand(5, 3) < 0.6
    ignored = torch.where(mask, y, -1)
    found = r_drop(a, b, ignored, 0.5, ignore_index=-1, reduction=reduction)
    assert torch.equal(found, r_drop(a, b, y, 0.5, mask=mask, reduction=reduction))
    rows = [x.movedim(1, -1)[mask] for x in (a, b)]
    alone = r_drop(rows[0], rows[1], y[mask], 0.5, reduction=reduction)
    torch.testing.assert_close(found[mask] if reduction == "none" else found, alone)
    if reduction == "none":
        assert not found[~mask].any()
    squares = fraternal(*(x.movedim(1, -1) for x in (a, b)), 0.5, mask=mask.unsqueeze(-1), reduction=reduction)
    alone = fraternal(rows[0], rows[1], 0.5, reduction=reduction)
    torch.testing.assert_close(squares[mask] if reduction == "none" else squares, alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    a, b = (60 * x for x in pair((50, 4), dtype))
    y = indices((50, 4))
    found = r_drop(a.requires_grad_(), b, y, 0.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, r_drop(a.float(), b.float(), y, 0.5))
    found.backward()
    assert a.grad.dtype == dtype
    assert a.grad.isfinite().all()
    large = torch.full((2,), 300.0, dtype=dtype)
    assert fraternal(large, -large, 1.0) == 360_000  # beyond float16
    assert r_drop(a.detach(), b, y, weight=torch.ones(4, dtype=dtype)).isfinite()


def test_classes_that_both_passes_exclude() -> None:
    (a, b), y = pair((5, 4)), torch.zeros(5, dtype=torch.long)
    a[:, 3] = b[:, 3] = -math.inf
    a.requires_grad_()
    loss = r_drop(a, b, y)
    loss.backward()
    torch.testing.assert_close(loss.detach(), r_drop(a.detach()[:, :3], b[:, :3], y))
    assert a.grad.isfinite().all()
    b[:, 3] = 0.0
    assert r_drop(a.detach(), b, y) == math.inf
    assert r_drop(a.detach() * math.nan, b, y).isnan()


@pytest.mark.parametrize("swapped", [False, True])
def test_a_class_that_one_pass_excludes_and_the_other_gives_no_probability(swapped: bool) -> None:
    a, b, y = torch.tensor([[0.0, -200.0, -5.0]]), torch.tensor([[0.0, -math.inf, -4.0]]), torch.tensor([0])
    a, b = (b, a) if swapped else (a, b)
    a.requires_grad_()
    loss = r_drop(a, b, y)
    loss.backward()
    torch.testing.assert_close(loss.detach(), r_drop(a.detach()[:, ::2], b[:, ::2], y))
    assert a.grad.isfinite().all()


def test_positions_of_byte_targets_can_be_masked() -> None:
    (a, b), y, mask = pair((5, 4)), indices((5, 4)), torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(r_drop(a, b, y.to(torch.uint8), mask=mask), r_drop(a, b, y, mask=mask))


def test_fraternal_is_twice_the_variance_over_masks_by_enumeration() -> None:
    k, w = 0.7, torch.randn(3, 4, dtype=torch.float64)
    x = torch.randn(4, dtype=torch.float64)
    masks = [torch.tensor(m, dtype=torch.float64) for m in itertools.product([0.0, 1.0], repeat=4)]
    chances = [k ** float(m.sum()) * (1 - k) ** float(4 - m.sum()) for m in masks]
    logits = [w @ (x * m / k) for m in masks]
    mean = sum(c * z for c, z in zip(chances, logits, strict=True))
    variance = sum(c * (z - mean).square() for c, z in zip(chances, logits, strict=True))
    expected = sum(
        c * d * fraternal(y, z, 0.3)
        for (c, y), (d, z) in itertools.product(zip(chances, logits, strict=True), repeat=2)
    )
    torch.testing.assert_close(expected, 2 * 0.3 * variance.mean(), rtol=1e-12, atol=0)
    known = (1 - k) / k * (w.square() @ x.square())
    torch.testing.assert_close(variance, known, rtol=1e-12, atol=0)


def test_modules_are_the_functions() -> None:
    (a, b), y = pair((6, 4), torch.float32), indices((6, 4))
    weight = torch.rand(4)
    loss = RDropLoss(0.3, weight, 1, "sum", 0.1)
    expected = r_drop(a, b, y, 0.3, weight=weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
    assert torch.equal(loss(a, b, y), expected)
    mask = y > 1
    assert torch.equal(RDropLoss()(a, b, y, mask), r_drop(a, b, y, mask=mask))
    assert list(loss.state_dict()) == ["weight"]
    assert list(RDropLoss().state_dict()) == []
    assert torch.equal(copy.deepcopy(loss)(a, b, y), expected)
    assert torch.equal(FraternalLoss(2.0, "sum")(a, b), fraternal(a, b, 2.0, reduction="sum"))
    assert repr(FraternalLoss()) == "FraternalLoss(kappa=0.15)"


@pytest.mark.slow
def test_losses_under_compile_and_vmap() -> None:
    (a, b), y = pair((5, 4)), indices((5, 4))
    for f in (lambda a, b: r_drop(a, b, y, 0.5), fraternal):
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(a, b), f(a, b))
    each = vmap(grad(lambda a, b, y: r_drop(a, b, y)))(a, b, y)
    a.requires_grad_()
    r_drop(a, b, y, reduction="sum").backward()
    torch.testing.assert_close(each, a.grad)
    model = nn.Sequential(nn.Linear(4, 50), torchdrop.Dropout(0.5))
    x = torch.randn(3, 4)
    torch.manual_seed(1)
    first = two_passes(model, x)
    torch.manual_seed(1)
    again = torch.compile(lambda x: two_passes(model, x), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(first, again)


def test_two_passes_have_two_masks_in_one_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 50), torchdrop.Dropout(0.5))
    x = torch.randn(3, 4)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    first, second = two_passes(model, x)
    assert sizes == [6]
    dense = model[0](x)
    for out in (first, second):
        kept = out != 0
        assert 0 < kept.sum() < kept.numel()
        torch.testing.assert_close(out, torch.where(kept, 2 * dense, 0.0))
    assert not torch.equal(first, second)
    two_passes(model, x, batched=False)
    assert sizes == [6, 3, 3]


class Several(nn.Module):
    def forward(self, x: Tensor, shared: Tensor, *, y: Tensor | None = None, flag: str = "") -> dict[str, Any]:
        assert len(shared) == 5
        out = F.dropout(x)
        assert y is None or len(y) == len(x)
        return {"logits": out, "loss": out.mean(), "flag": flag, "nested": [x, None]}


def test_inputs_and_outputs_of_any_structure() -> None:
    x, shared = torch.randn(3, 40), torch.randn(5)
    for inputs in ((x, shared), {"x": x, "shared": shared, "y": x, "flag": "a"}, UserDict(x=x, shared=shared)):
        first, second = two_passes(Several(), inputs)
        assert first["logits"].shape == second["logits"].shape == (3, 40)
        assert not torch.equal(first["logits"], second["logits"])
        assert torch.equal(first["loss"], second["loss"])
        assert torch.equal(first["nested"][0], x)
        assert torch.equal(second["nested"][0], x)
    time_first, second = two_passes(nn.Dropout(0.5), torch.ones(7, 3, 5), batch_dim=1)
    assert time_first.shape == second.shape == (7, 3, 5)


@pytest.mark.parametrize("batched", [True, False])
def test_passes_without_randomness_warn(batched: bool) -> None:
    model = nn.Sequential(nn.Linear(300, 50), torchdrop.Dropout(0.5), nn.Linear(50, 3))
    x = torch.randn(7, 300)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        two_passes(model.train(), x.to(dtype), batched=batched)
        with pytest.warns(UserWarning, match="two_passes: both passes gave the same. Is the model in train mode"):
            two_passes(model.eval(), x.to(dtype), batched=batched)
    with pytest.warns(UserWarning, match="rate above 0"):
        two_passes(nn.Sequential(nn.Linear(300, 3), torchdrop.Dropout(0.0)), x, batched=batched)
    two_passes(model.eval(), x[:0].bfloat16())
    with torchdrop.mc_dropout(model.float(), seed=1):
        two_passes(model, x, batched=batched)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 1e-6)]
)
def test_rounding_does_not_pass_for_randomness(dtype: torch.dtype, rounding: float) -> None:
    factor = torch.tensor([1.0, 1.0])

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * factor.to(dtype).repeat_interleave(len(x) // 2).unsqueeze(1)

    factor[1] += rounding
    with pytest.warns(UserWarning, match="gave the same"):
        two_passes(Rounded(), torch.ones(4, 3, dtype=dtype))
    factor[1] += 0.05
    two_passes(Rounded(), torch.ones(4, 3, dtype=dtype))


def test_masks_that_the_batch_shares_warn_and_two_forwards_help() -> None:
    model, x = nn.Sequential(torchdrop.Dropout(0.5, shared_axes=0), nn.Linear(30, 3)), torch.randn(4, 30)
    with pytest.warns(UserWarning, match="need batched=False"):
        two_passes(model, x)
    two_passes(model, x, batched=False)


class Flat(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(0, 1)


class Opaque(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(x))


@pytest.mark.parametrize("kind", [Flat, Opaque])
def test_outputs_that_cannot_be_told_apart_are_refused(kind: type[nn.Sequential]) -> None:
    model, x = kind(nn.Dropout(0.5)), torch.ones(5, 3, 4)
    message = r"^model must give a tensor of 10 rows in dimension 0 for 5 rows of the inputs .* pass batched=False$"
    with pytest.raises(ValueError, match=message):
        two_passes(model, x)
    first, second = two_passes(model, x, batched=False)
    assert first is not second


def test_batch_norm_sees_both_copies() -> None:
    model, x = nn.Sequential(torchdrop.Dropout(0.5), nn.BatchNorm1d(4, momentum=1.0)), torch.randn(8, 4)
    torch.manual_seed(1)
    two_passes(model, x)
    torch.manual_seed(1)
    torch.testing.assert_close(model[1].running_mean, model[0](torch.cat([x, x])).mean(0))


def test_bad_calls() -> None:
    (a, b), y = pair((5, 4)), indices((5, 4))
    with pytest.raises(ValueError, match=r"must have one shape, .* got \(5, 4\) and \(4, 4\)"):
        r_drop(a, b[:4], y)
    with pytest.raises(ValueError, match="must have one shape"):
        fraternal(a, b[:, :1])
    with pytest.raises(TypeError, match=r"logits2 must be a floating-point tensor, got torch.int64"):
        r_drop(a, b.long(), y)
    with pytest.raises(TypeError, match="logits1 must be a floating-point tensor, got list"):
        fraternal([1.0], b)
    with pytest.raises(ValueError, match=r"logits1 must have classes, \(C,\), .* got a 0-d tensor"):
        r_drop(a[0, 0], b[0, 0], y[0])
    with pytest.raises(TypeError, match=r"^target must be a tensor, got list$"):
        r_drop(a, b, y.tolist())
    with pytest.raises(TypeError, match=r"^weight must be a tensor, got list$"):
        r_drop(a, b, y, weight=[1.0] * 4)
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"alpha must be finite and not negative, got {value}"):
            r_drop(a, b, y, value)
        with pytest.raises(ValueError, match=f"kappa must be finite and not negative, got {value}"):
            FraternalLoss(value)
    with pytest.raises(TypeError, match="alpha must be a number, got str"):
        RDropLoss("1")
    for call in (lambda: r_drop(a, b, y, reduction="max"), lambda: RDropLoss(reduction="max"),
                 lambda: fraternal(a, b, reduction="max"), lambda: FraternalLoss(reduction="max")):  # fmt: skip
        with pytest.raises(ValueError, match="max is not a valid value for reduction: it must be"):
            call()
    with pytest.raises(ValueError, match=r"mask must have the target's shape \(5,\), got \(4,\)"):
        r_drop(a, b, y, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be a tensor of bools, got torch.float32"):
        r_drop(a, b, y, mask=torch.ones(5))
    with pytest.raises(TypeError, match="mask must be a tensor of bools, got list"):
        fraternal(a, b, mask=[True])
    with pytest.raises(ValueError, match="mask goes with class indices as target"):
        r_drop(a, b, b.softmax(1), mask=torch.ones(5, dtype=torch.bool))
    for shape in ((5, 3), (1, 5, 4)):
        with pytest.raises(ValueError, match=r"mask must broadcast against the logits of shape \(5, 4\), got"):
            fraternal(a, b, mask=torch.ones(shape, dtype=torch.bool))
    model = nn.Dropout(0.5)
    with pytest.raises(TypeError, match="inputs must be a tensor, a tuple or a mapping, got str"):
        two_passes(model, "x")
    with pytest.raises(ValueError, match="inputs must hold a tensor, got none"):
        two_passes(model, ())
    with pytest.raises(
        ValueError, match=r"batch_dim must be a dimension of the inputs, got 2 for a tensor of \(5, 4\)"
    ):
        two_passes(model, a, batch_dim=2)
    with pytest.raises(TypeError, match=r"^batch_dim must be an integer, got str$"):
        two_passes(model, a, batch_dim="rows")

"""DropBlock's probabilities: of a position by enumeration, of the map in closed form, of drawn masks by counting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.statistical import FALSE_ALARM, MISS, deviation
from torchdrop.core import sites
from torchdrop.kernels.mask_params import ONE, MaskParams, inverted, mask_params, params_tensor, threshold
from torchdrop.layers.drop_block import drop_block as block
from torchdrop.layers.drop_block import geometry as _geometry

TINY = [((6,), 3), ((5,), 2), ((4,), 4), ((4, 4), 2), ((3, 5), 3), ((3, 3, 3), 2)]
"""Maps with few enough anchors that every mask can be looked at."""

tiny = pytest.mark.parametrize(("sizes", "side"), TINY)


def anchors(sizes: tuple[int, ...], side: int) -> tuple[slice, ...]:
    return tuple(slice(0, length - side + 1) for length in sizes)


def all_masks(sizes: tuple[int, ...], side: int) -> tuple[Tensor, Tensor]:
    """Every choice of anchors that start no block, (2**n, 1, *sizes), and how many start one.

    What lies outside the anchors is False, as if blocks that do not fit started everywhere.
    """
    places = math.prod(length - side + 1 for length in sizes)
    choices = torch.tensor(list(itertools.product([False, True], repeat=places)))
    masks = torch.zeros(len(choices), 1, *sizes, dtype=torch.bool)
    inner = (slice(None), slice(None), *anchors(sizes, side))
    masks[inner] = choices.reshape(masks[inner].shape)
    return masks, (~choices).sum(1)


def covered(unstarted: Tensor, sizes: tuple[int, ...], side: int) -> Tensor:
    """Which positions lie in a block, block by block."""
    out = torch.zeros(unstarted.shape, dtype=torch.bool)
    for corner in itertools.product(*(range(length - side + 1) for length in sizes)):
        started = ~unstarted[(..., *corner)]
        out[(..., *(slice(at, at + side) for at in corner))] |= started.reshape(*started.shape, *[1] * len(sizes))
    return out


def probabilities(q: float, sizes: tuple[int, ...], side: int) -> Tensor:
    """The formula: q to the number of blocks that can cover a position."""
    axes = [
        torch.tensor([min(i, L - side) - max(0, i - side + 1) + 1 for i in range(L)], dtype=torch.float64)
        for L in sizes
    ]
    exponents = axes[0]
    for axis in axes[1:]:
        exponents = exponents.unsqueeze(-1) * axis
    return q**exponents


@tiny
def test_what_no_block_covers_is_kept(sizes: tuple[int, ...], side: int) -> None:
    masks, _ = all_masks(sizes, side)
    assert torch.equal(_geometry.free(masks, sizes, side), ~covered(masks, sizes, side))


@pytest.mark.parametrize("shape", [(3, 2, 17), (2, 3, 9, 12), (2, 2, 6, 9, 7), (5, 7, 7)])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 6])
def test_blocks_of_any_side_do_not_reach_into_other_maps(shape: tuple[int, ...], side: int) -> None:
    sizes = shape[2:] if len(shape) > 3 or shape[2] == 17 else shape[1:]
    for density in (0.05, 0.5):
        unstarted = torch.rand(shape) > density
        assert torch.equal(_geometry.free(unstarted, sizes, side), ~covered(unstarted, sizes, side))


@tiny
@pytest.mark.parametrize("k", [0.3, 0.9])
def test_marginal_keep_probability_by_enumeration(sizes: tuple[int, ...], side: int, k: float) -> None:
    masks, started = all_masks(sizes, side)
    found = _geometry.anchor_params(mask_params(k), sizes, side)
    q, places = found.threshold / ONE, math.prod(length - side + 1 for length in sizes)
    weights = (1 - q) ** started.double() * q ** (places - started).double()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    kept = _geometry.free(masks, sizes, side).double().flatten(1)
    marginal = (weights @ kept).reshape(sizes)
    assert torch.allclose(marginal, probabilities(q, sizes, side), rtol=0, atol=1e-12)
    assert marginal.mean().item() == pytest.approx(_geometry.mean_keep(q, sizes, side), abs=1e-12)
    assert found.scale * marginal.mean().item() == pytest.approx(1, abs=1e-12)


def expectation(
    sizes: tuple[int, ...], side: int, k: float, scaling: block.Scaling, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """x, and the mean of y over all masks, weighted by their probabilities."""
    masks, started = all_masks(sizes, side)
    monkeypatch.setattr(sites, "keep_mask", lambda *_: masks)
    q = _geometry.anchor_params(mask_params(k), sizes, side).threshold / ONE
    weights = (1 - q) ** started.double() * q ** (masks[0, 0][anchors(sizes, side)].numel() - started).double()
    x = torch.linspace(0.5, 2.0, math.prod(sizes), dtype=torch.float64).reshape(sizes)
    function = getattr(block, f"drop_block{len(sizes)}d")
    y = function(x.expand(len(masks), 1, *sizes), keep_prob=k, block_size=side, scaling=scaling)
    return x, torch.tensordot(weights, y[:, 0], 1)


@tiny
def test_expectation_is_the_input_by_enumeration_with_marginal_scaling(
    sizes: tuple[int, ...], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, mean = expectation(sizes, side, 0.7, "marginal", monkeypatch)
    assert torch.allclose(mean, x, rtol=1e-12, atol=0)


@tiny
def test_expectation_is_the_input_in_the_mean_over_positions_with_mean_scaling(
    sizes: tuple[int, ...], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, mean = expectation(sizes, side, 0.7, "mean", monkeypatch)
    factors = mean / x
    assert factors.mean().item() == pytest.approx(1, abs=1e-12)
    assert (factors.max() - factors.min()).item() > 0.01 or min(sizes) == side


@pytest.mark.parametrize("length", [7, 14, 28, 56])
@pytest.mark.parametrize("side", [3, 4, 5, 6, 7])
def test_mean_keep_probability_is_exactly_the_nominal_one(length: int, side: int) -> None:
    for k in (0.5, 0.75, 0.9, 0.99):
        for sizes in ((length,), (length, length), (length, length + 3)):
            q = _geometry.solve(k, sizes, side)
            assert probabilities(q, sizes, side).mean().item() == pytest.approx(k, abs=1e-12)
            found = _geometry.anchor_params(mask_params(k), sizes, side)
            realized = probabilities(found.threshold / ONE, sizes, side).mean().item()
            assert abs(realized - k) <= (side ** len(sizes) + 1) / 2**33
            assert found.scale == pytest.approx(1 / realized, rel=1e-14)


@pytest.mark.parametrize("sizes", [(7,), (7, 7), (7, 7, 7), (56, 56), (1,), (1, 1)])
def test_every_rate_is_solved(sizes: tuple[int, ...]) -> None:
    for side in {1, min(3, *sizes), min(7, *sizes)}:
        before = -1
        for k in (0.0, 2.0**-32, 1e-6, 0.01, 0.5, 1 - 1e-6, 1 - 2.0**-32, 1.0):
            found = _geometry.anchor_params(mask_params(k), sizes, side)
            assert found.threshold >= before
            assert math.isfinite(found.scale)
            assert found.threshold == threshold(k) if k in (0, 1) or side == 1 else True
            before = found.threshold


def test_laws_of_tensors_are_those_of_numbers() -> None:
    rates = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    for sizes, side in TINY:
        params_of_each = _geometry.anchor_params(params_tensor(rates), sizes, side)
        for rate, row in zip(rates.tolist(), params_of_each, strict=True):
            one = _geometry.anchor_params(mask_params(rate), sizes, side)
            assert isinstance(one, MaskParams)
            assert torch.equal(row, one.tensor())
        batched = torch.vmap(lambda k: _geometry.anchor_params(params_tensor(k), sizes, side))(rates)  # noqa: B023
        assert torch.equal(batched, params_of_each)
        alone = [_geometry.position_scales(one, sizes, side) for one in params_of_each[2:]]
        batched = torch.vmap(lambda one: _geometry.position_scales(one, sizes, side))(params_of_each[2:])  # noqa: B023
        assert torch.equal(batched, torch.stack(alone))


def test_operators_pass_opcheck() -> None:
    for name in ("block_anchors", "block_scales"):
        torch.library.opcheck(
            getattr(torch.ops.torchdrop, name).default, (mask_params(0.9, inverted).tensor(), [7, 9], 3)
        )


def variance_of_the_mean(q: float, sizes: tuple[int, int], side: int) -> float:
    """Of the kept share of one map: positions are kept together with probability q to the blocks that cover either."""
    spans = [[(max(0, i - side + 1), min(i, length - side) + 1) for i in range(length)] for length in sizes]
    single = [torch.tensor([last - first for first, last in axis]) for axis in spans]
    both = [torch.tensor([[max(0, min(a[1], b[1]) - max(a[0], b[0])) for b in axis] for a in axis]) for axis in spans]
    r = torch.outer(*single).flatten().double()
    shared = torch.einsum("ab,cd->acbd", *both).reshape(len(r), len(r)).double()
    together = q ** (r[:, None] + r[None, :] - shared)
    return float(together.mean() - (q**r).mean() ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("length", [7, 14, 56])
def test_realized_keep_rate_is_the_nominal_one_within_a_thousandth(length: int, side: int) -> None:
    k, sizes = 0.9, (length, length)
    error = 0.001 * k
    found = _geometry.anchor_params(mask_params(k), sizes, side)
    variance = variance_of_the_mean(found.threshold / ONE, sizes, side)
    n = 1024
    while deviation(n, variance, FALSE_ALARM) + deviation(n, 1.1 * variance, MISS) > n * error:
        n = n * 9 // 8
    torch.set_num_threads(1)
    kept, x, chunk = 0, torch.empty(0), max(1, 2**18 // length**2)
    for first in range(0, n, chunk):
        shape = (min(chunk, n - first), *sizes)
        unstarted = sites.keep_mask(x, found, shape)
        kept += int(_geometry.free(unstarted, sizes, side).count_nonzero())
    assert abs(kept / length**2 - n * k) <= deviation(n, variance, FALSE_ALARM)

"""Shards: their masks are parts of the whole tensor's, whatever the tensor is cut into."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

import torchdrop
import torchdrop.functional as F
from tests import TORCH
from tests.seeding import seeded
from tests.strategies import on, tensors
from torchdrop import Shard, kernels
from torchdrop.core.shard import part_of
from torchdrop.kernels.masking import MaskSlice

Bounds = list[tuple[int, int]]


def indices(part: MaskSlice, n: int) -> list[int]:
    return [part.start + (e // part.run * part.pitch + e % part.run if part.run else e) for e in range(n)]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """The shape of a block, of the tensor that it lies in, and its place there."""
    whole = draw(st.lists(st.integers(1, 5), max_size=4))
    first = [draw(st.integers(0, size - 1)) for size in whole]
    return [draw(st.integers(1, size - at)) for size, at in zip(whole, first, strict=True)], whole, first


@given(blocks())
def test_a_part_has_the_elements_of_the_block_and_is_refused_only_where_there_is_none(
    block: tuple[list[int], list[int], list[int]],
) -> None:
    shape, whole, first = block
    at = tuple(slice(start, start + size) for start, size in zip(first, shape, strict=True))
    expected = torch.arange(math.prod(whole)).reshape(whole)[at].flatten().tolist()
    n = len(expected)
    try:
        assert indices(part_of(shape, whole, first), n) == expected
    except NotImplementedError:
        for run in range(1, n):
            assert indices(MaskSlice(expected[0], run, expected[run] - expected[0]), n) != expected
        assert indices(MaskSlice(expected[0]), n) != expected


@pytest.mark.parametrize("run", [5, 7, 20, -3])
def test_a_part_is_whole_rows(run: int) -> None:
    message = f"^the run of a part must divide its number of elements, got a run of {run} and 12$"
    key, params = torch.tensor([1, 2]), torch.tensor([2.0**31, 2.0, 0.0, 0.0], dtype=torch.float64)
    for name in ("native", "reference"):
        with torchdrop.use_backend(name), pytest.raises(ValueError, match=message):
            kernels.masked(torch.ones(12), key, params, (12,), MaskSlice(0, run, 30))


@st.composite
def cuts(draw: st.DrawFn, size: int) -> Bounds:
    """Where a dimension is cut, into up to four parts of which some may be empty."""
    at = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    return list(itertools.pairwise([0, *at, size]))


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], dict[int, Bounds]]:
    """A tensor, the axes over which its mask is shared, and how it is cut: anywhere along one dimension, or along the
    first and one more."""
    x = draw(tensors(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)))
    shared = tuple(d for d in range(x.dim()) if draw(st.integers(0, 3)) == 0)
    dims = {draw(st.integers(0, x.dim() - 1))} | ({0} if draw(st.booleans()) else set())
    return x, shared, {dim: draw(cuts(x.shape[dim])) for dim in sorted(dims)}


def put_together(x: Tensor, cut: dict[int, Bounds], of_part: Callable[[Tensor, list[Shard]], Tensor]) -> Tensor:
    """What a function gives for every part of x, in its place."""
    out = torch.full_like(x, 77.0)
    for bounds in itertools.product(*cut.values()):
        at = [slice(None)] * x.dim()
        shards = []
        for dim, (start, stop) in zip(cut, bounds, strict=True):
            at[dim] = slice(start, stop)
            shards.append(Shard(dim if start % 2 else dim - x.dim(), start, x.shape[dim]))
        out[tuple(at)] = of_part(x[tuple(at)], shards)
    return out


def drop(x: Tensor, shard: Any = None, **options: Any) -> Tensor:
    return seeded(7, F.dropout, x, 0.4, shard=shard, **options)


@given(cut_tensors(), st.booleans(), st.booleans())
def test_shards_of_any_tensor_have_the_masks_of_the_whole(
    device: torch.device,
    case: tuple[Tensor, tuple[int, ...], dict[int, Bounds]],
    by_noise_shape: bool,
    reverse: bool,
) -> None:
    x, shared, cut = on(device, case[0]), *case[1:]
    options: dict[str, Any] = {"shared_axes": shared}
    if by_noise_shape:
        options = {"noise_shape": [1 if d in shared else None for d in range(x.dim())]}

    def forward(part: Tensor, shards: list[Shard]) -> Tensor:
        return drop(part, shards[::-1] if reverse else shards, **options)

    def backward(part: Tensor, shards: list[Shard]) -> Tensor:
        leaf = part.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf, shards), leaf, torch.full_like(leaf, 3.0))[0]

    whole = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = drop(whole, **options)
    (slope,) = torch.autograd.grad(y, whole, torch.full_like(whole, 3.0))
    assert torch.equal(put_together(x, cut, forward), y)
    assert torch.equal(put_together(x, cut, backward), slope)


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_large_tensors_cut_evenly(
    device: torch.device, dtype: torch.dtype, parts: int, dim: int, contiguous: bool
) -> None:
    x = torch.randn(24, 60, 36, device=device).to(dtype)
    y = drop(x)
    width = x.shape[dim] // parts
    pieces = list(x.split(width, dim))
    if contiguous:
        pieces = [piece.contiguous() for piece in pieces]
    ours = [drop(piece, Shard(dim, i * width, x.shape[dim])) for i, piece in enumerate(pieces)]
    assert torch.equal(torch.cat(ours, dim), y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["native", "triton", "aten", "reference"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_backend(name: str, dim: int) -> None:
    reasons = torchdrop.available_backends()[name]
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    x = torch.randn(5, 6, 7, dtype=torch.float64)
    y = drop(x)
    with torchdrop.use_backend(name):
        ours = [drop(x.narrow(dim, i, 1), Shard(dim, i, x.shape[dim])) for i in range(x.shape[dim])]
    assert torch.equal(torch.cat(ours, dim), y)


LAST = Shard(-1, 2, 8)
"""Of a tensor with 8 columns, those from the third on."""


def of_last(x: Tensor) -> Tensor:
    return x[..., 2:5]


class TestPaths:
    def test_the_module_does_what_the_function_does(self) -> None:
        x = torch.randn(6, 8)
        y = of_last(drop(x))
        layer = torchdrop.Dropout(0.4, shard=LAST)
        assert torch.equal(seeded(7, layer, of_last(x)), y)
        layer.shard = [Shard(0, 0, 6), LAST]
        assert torch.equal(seeded(7, layer, of_last(x)), y)
        layer.shard = None
        assert torch.equal(seeded(7, layer, x), drop(x))
        layer = torchdrop.Dropout(0.4, shard=LAST).eval()
        part = of_last(x)
        assert layer(part) is part

    @pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("stop", [2, 5])
    def test_one_key_is_drawn_whatever_the_rate_and_the_part(self, p: float, stop: int) -> None:
        x = torch.randn(6, 8)
        seeded(7, F.dropout, x, p)
        state = torch.get_rng_state()
        part = x[:, 2:stop]
        y = seeded(7, F.dropout, part, p, shard=LAST)
        assert torch.equal(torch.get_rng_state(), state)
        assert (y is part) == (p == 0.0)

    def test_a_generator_of_its_own(self) -> None:
        x = torch.randn(6, 8)
        y = F.dropout(x, generator=torch.Generator().manual_seed(3))
        part = F.dropout(of_last(x), shard=LAST, generator=torch.Generator().manual_seed(3))
        assert torch.equal(part, of_last(y))

    def test_in_place(self) -> None:
        x = torch.randn(6, 8)
        part = of_last(x).clone()
        assert drop(part, LAST, inplace=True) is part
        assert torch.equal(part, of_last(drop(x)))

    @pytest.mark.parametrize("shape", [(8,), (6, 1), (6, 8)])
    def test_rates_as_tensors_are_those_of_the_part(self, shape: tuple[int, ...]) -> None:
        x, k = torch.randn(6, 8), torch.rand(shape)
        y = seeded(7, F.dropout, x, keep_prob=k)
        own = k if k.shape[-1] == 1 else of_last(k)
        assert torch.equal(seeded(7, F.dropout, of_last(x), keep_prob=own, shard=LAST), of_last(y))

    def test_the_original_formulation(self) -> None:
        x = torch.randn(6, 8)
        assert torch.equal(drop(of_last(x), LAST, inverted=False), of_last(drop(x, inverted=False)))

    def test_derivatives_of_every_order(self) -> None:
        x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

        def slopes(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            (g,) = torch.autograd.grad((f(x) ** 3).sum(), x, create_graph=True)
            return g, torch.autograd.grad(g.sum(), x)[0]

        for ours, expected in zip(slopes(lambda x: drop(x, LAST), of_last(x)), slopes(drop, x), strict=True):
            assert torch.equal(ours, of_last(expected))
        part = of_last(x).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: drop(x, LAST), (part,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda x: drop(x, LAST) ** 3, (part,))

    @pytest.mark.parametrize("randomness", ["same", "different"])
    @pytest.mark.parametrize("dim", [0, 1])
    def test_vmap(self, randomness: str, dim: int, device: torch.device) -> None:
        x = torch.randn(5, 4, 8, device=device)

        def each(x: Tensor, **options: Any) -> Tensor:
            return seeded(7, vmap(lambda x: F.dropout(x, **options), randomness=randomness), x)

        y = each(x)
        width = x.shape[dim + 1] // 2
        parts = [each(x.narrow(dim + 1, i * width, width), shard=Shard(dim, i * width, 2 * width)) for i in (0, 1)]
        assert torch.equal(torch.cat(parts, dim + 1), y)
        assert (len({tuple(row.flatten().tolist()) for row in y != 0}) == 1) == (randomness == "same")

    def test_vmap_over_rates(self, device: torch.device) -> None:
        x, k = torch.randn(5, 4, 8, device=device), torch.rand(5)

        def each(x: Tensor, shard: Shard | None) -> Tensor:
            f = vmap(lambda x, k: F.dropout(x, keep_prob=k, shard=shard), randomness="different")
            return seeded(7, f, x, k)

        assert torch.equal(each(of_last(x), LAST), of_last(each(x, None)))

    def test_meta_tensors(self) -> None:
        assert F.dropout(torch.ones(6, 3, device="meta"), shard=LAST).shape == (6, 3)

    @pytest.mark.slow
    @pytest.mark.parametrize("shards", [LAST, (Shard(0, 1, 9), LAST), Shard(0, 3, 9)], ids=str)
    def test_compiled(self, shards: Any, device: torch.device) -> None:
        torch.compiler.reset()
        layer, x = torchdrop.Dropout(0.4, shard=shards), torch.randn(4, 3, requires_grad=True, device=device)

        def both(x: Tensor) -> Tensor:
            return torch.tanh(layer(torch.sin(x))) * F.dropout(x, 0.3, shard=shards)

        results = []
        for f in (both, torch.compile(both, fullgraph=True)):
            y = seeded(7, f, x)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours == 0, expected == 0)
            torch.testing.assert_close(ours, expected)

    @pytest.mark.skipif(TORCH < (2, 9), reason="PyTorch 2.8 makes the dimension of a shard an unknown")
    @pytest.mark.slow
    def test_compiled_for_parts_of_any_size(self) -> None:
        torch.compiler.reset()
        compiled = torch.compile(lambda x, shard: F.dropout(x, 0.4, shard=shard), fullgraph=True, dynamic=True)
        x = torch.randn(7, 30)
        y = drop(x)
        for start, stop in [(0, 4), (4, 15), (15, 30), (3, 7)]:
            assert torch.equal(seeded(7, compiled, x[:, start:stop], Shard(1, start, 30)), y[:, start:stop])


class TestValues:
    def test_is_a_value(self) -> None:
        shard = Shard(dim=1, offset=2, size=8)
        assert shard == Shard(1, 2, 8) != Shard(1, 3, 8)
        assert repr(shard) == "Shard(dim=1, offset=2, size=8)"
        assert len({shard, Shard(1, 2, 8)}) == 1
        with pytest.raises(FrozenInstanceError):
            shard.dim = 2

    def test_is_shown_and_copied(self) -> None:
        layer = torchdrop.Dropout(0.4, shared_axes=0, shard=LAST)
        shown = "Dropout(p=0.4, inplace=False, shared_axes=0, shard=Shard(dim=-1, offset=2, size=8))"
        assert repr(layer) == shown
        assert repr(torchdrop.Dropout(0.4)) == "Dropout(p=0.4, inplace=False)"
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.shard == LAST
            assert repr(twin) == shown
        assert list(layer.state_dict()) == []

    def test_a_layer_that_was_pickled_before_there_were_shards(self) -> None:
        layer = torchdrop.Dropout(0.4)
        del vars(layer)["shard"]
        layer = pickle.loads(pickle.dumps(layer))
        assert torch.equal(seeded(7, layer, torch.ones(6, 8)), drop(torch.ones(6, 8)))
        assert repr(layer) == "Dropout(p=0.4, inplace=False)"

    @pytest.mark.parametrize("wrong", [1.0, "1", True, None, torch.tensor(1)])
    @pytest.mark.parametrize("name", ["dim", "offset", "size"])
    def test_not_integers(self, name: str, wrong: Any) -> None:
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got {type(wrong).__name__}$"):
            Shard(**({"dim": 0, "offset": 0, "size": 1} | {name: wrong}))

    @pytest.mark.parametrize("name", ["offset", "size"])
    def test_negative(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"^{name} must not be negative, got -2$"):
            Shard(**({"dim": 0, "offset": 0, "size": 1} | {name: -2}))

    def test_an_offset_beyond_the_size(self) -> None:
        assert Shard(0, 4, 4).offset == 4  # an empty part
        with pytest.raises(ValueError, match=r"^offset must not be beyond size, got offset=5 and size=4$"):
            Shard(0, 5, 4)

    @pytest.mark.parametrize(
        ("wrong", "name"),
        [(3, "int"), ((1, 2, 3), "int"), ("", "str"), ([None], "NoneType"), ([LAST, torch.ones(1)], "torch.Tensor")],
    )
    def test_no_shards(self, wrong: Any, name: str) -> None:
        message = f"^shard must be a torchdrop.Shard, a list or tuple of them, or None, got {name}$"
        with pytest.raises(TypeError, match=message):
            torchdrop.Dropout(shard=wrong)
        with pytest.raises(TypeError, match=message):
            F.dropout(torch.ones(6, 3), shard=wrong)

    def test_a_placement_of_a_dtensor_is_another_thing(self) -> None:
        placements = pytest.importorskip("torch.distributed.tensor")
        with pytest.raises(TypeError, match=r"got torch\.distributed\.tensor\.placement_types\.Shard$"):
            torchdrop.Dropout(shard=placements.Shard(0))

    @pytest.mark.parametrize(
        ("shape", "shards", "error", "message"),
        [
            ((6, 3), Shard(2, 0, 8), ValueError, r"the dim of a shard must be in \[-2, 2\) for a 2-D input, got 2"),
            ((6, 3), Shard(-3, 0, 8), ValueError, r"the dim of a shard must be in \[-2, 2\) for a 2-D input, got -3"),
            ((), Shard(0, 0, 8), ValueError, r"the dim of a shard must be in \[0, 0\) for a 0-D input, got 0"),
            ((6, 3), [Shard(1, 0, 8), Shard(-1, 0, 8)], ValueError, r"shards must name each dim once, got \[Shard"),
            ((6, 3), Shard(1, 6, 8), ValueError,
             r"a shard must end within the whole: its offset \+ the input's size must be at most its size, got "
             r"6 \+ 3 > 8 along dim 1"),
            ((2, 3, 4), [Shard(1, 0, 8), Shard(2, 0, 8)], NotImplementedError,
             r"a mask can be cut along one dimension, or along the outermost and one more, got a part of shape "
             r"\(2, 3, 4\) of a mask of shape \(2, 8, 8\), cut along \[1, 2\]: share the mask along one of them, "
             r"gather the tensor along it first, or apply dropout before it is cut"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("shared", [None, ()])
    def test_shards_that_do_not_fit(
        self, shape: Sequence[int], shards: Any, error: type[Exception], message: str, shared: Any
    ) -> None:
        x, state = torch.ones(shape), torch.get_rng_state()
        with pytest.raises(error, match=f"^{message}"):
            F.dropout(x, shard=shards, shared_axes=shared)
        with pytest.raises(error, match=f"^{message}"):
            torchdrop.Dropout(shard=shards, shared_axes=shared)(x)
        assert torch.equal(torch.get_rng_state(), state)

    def test_what_is_refused_can_be_had_by_sharing(self) -> None:
        x = torch.randn(2, 8, 8)
        y = drop(x, shared_axes=2)
        part = drop(x[:, 2:5, 4:], [Shard(1, 2, 8), Shard(2, 4, 8)], shared_axes=2)
        assert torch.equal(part, y[:, 2:5, 4:])

    def test_a_shared_dimension_needs_no_shard_and_takes_one(self) -> None:
        x = torch.randn(4, 8)
        y = drop(x, shared_axes=0)
        for start in range(4):
            row = x[start : start + 1]
            assert torch.equal(drop(row, Shard(0, start, 4), shared_axes=0), y[start : start + 1])
            assert torch.equal(drop(row, shared_axes=0), y[start : start + 1])
            assert torch.equal(drop(row, Shard(0, start, 4)), drop(x)[start : start + 1])

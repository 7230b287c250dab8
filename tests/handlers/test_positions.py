"""Masks that belong to places: a part of a sequence has its part of the whole sequence's mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.statistical import check_rate, draws_for
from torchdrop.handlers.calls import Site
from torchdrop.handlers.masks import Pass
from torchdrop.handlers.positions import PlacelessError, Positions, PositionSlot, Span, find_parts
from torchdrop.kernels.mask_params import params_tensor
from torchdrop.ops import operators, random_bits

SITE = Site("h.0.drop", "dropout", 0)
LENGTHS = {"rows": 2, "source": 5, "target": 3}

Shape = Callable[[int, int, int], Sequence[int]]
"""The shape of a tensor for numbers of rows and of words of source and target."""

HIDDEN: Shape = lambda rows, source, target: (rows, target, 8)  # noqa: E731
SCORES: Shape = lambda rows, source, target: (rows, 4, target, target)  # noqa: E731
CROSS: Shape = lambda rows, source, target: (rows, 4, target, source)  # noqa: E731
FOLDED: Shape = lambda rows, source, target: (rows * 4, target, target)  # noqa: E731
FLAT: Shape = lambda rows, source, target: (rows * target, 8)  # noqa: E731


def learned(shape: Shape, origin: int = 0, shared: Sequence[int] = ()) -> Positions:
    """Positions that know a tensor of this shape, and its mask, which has one element along the shared dimensions."""

    def met(longer: str) -> dict[Site, tuple[Sequence[int], Sequence[int]]]:
        sizes = shape(*(length + (kind == longer) for kind, length in LENGTHS.items()))
        return {SITE: (sizes, [1 if dim in shared else size for dim, size in enumerate(sizes)])}

    positions = Positions(origin)
    positions.learn(LENGTHS, met(""), {kind: met(kind) for kind in LENGTHS})
    return positions


def slot(positions: Positions, span: Span, sample: int = 5) -> PositionSlot:
    positions.span = span
    return positions.slot(Pass(0, torch.tensor(sample), None, shared=True), SITE, 123)


def kept(
    positions: Positions, span: Span, shape: Sequence[int], mask: Sequence[int] | None = None, sample: int = 5
) -> Tensor:
    """Whether the elements of a tensor of this shape are kept, with a mask of its shape or another."""
    one = slot(positions, span, sample)
    out = one.apply(operators.masked, torch.ones(shape), one.params(0.5, shape), mask or shape, False)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    return out > 0


class TestSteps:
    def test_words(self) -> None:
        positions = learned(HIDDEN)
        whole = kept(positions, Span(2, 0, 9), (2, 9, 8))
        parts = [kept(positions, Span(2, past, new), (2, new, 8)) for past, new in ((0, 4), (4, 1), (5, 3), (8, 1))]
        assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.equal(whole[0], whole[1])
        assert len({tuple(word.tolist()) for word in whole[0]}) == 9  # each place has a mask of its own

    @pytest.mark.parametrize("shape", [SCORES, FOLDED], ids=["four", "folded"])
    def test_pairs_of_words(self, shape: Shape) -> None:
        positions = learned(shape)
        whole = kept(positions, Span(2, 0, 7), shape(2, 5, 7))
        for past, new in ((0, 3), (3, 2), (5, 1), (6, 1)):
            size = list(shape(2, 5, new))
            size[-1] = past + new
            part = kept(positions, Span(2, past, new), size)
            assert torch.equal(part, whole[..., past : past + new, : past + new])
        heads = whole.view(2, 4, 49)[0].T
        assert len({tuple(pair.tolist()) for pair in heads}) > 10  # of the 16 that there can be
        words = slot(positions, Span(2, 0, 7)).numbers(random_bits.random_bits, shape(2, 5, 7), None)
        assert words.unique().numel() == 4 * 49  # each pair of places has a mask of its own

    def test_a_cache_of_the_last_words(self) -> None:
        positions = learned(SCORES)
        whole = kept(positions, Span(2, 0, 7), (2, 4, 7, 7))
        assert torch.equal(kept(positions, Span(2, 6, 1), (2, 4, 1, 3)), whole[..., 6:, 4:])

    def test_a_cache_with_room(self) -> None:
        positions = learned(SCORES)
        wide = kept(positions, Span(2, 2, 1), (2, 4, 1, 12))
        assert torch.equal(wide[..., :3], kept(positions, Span(2, 2, 1), (2, 4, 1, 3)))

    def test_source_and_target(self) -> None:
        positions = learned(CROSS)
        whole = kept(positions, Span(2, 0, 6), (2, 4, 6, 9))
        assert torch.equal(kept(positions, Span(2, 3, 1), (2, 4, 1, 9)), whole[:, :, 3:4])
        assert torch.equal(kept(positions, Span(2, 0, 6), (2, 4, 6, 5)), whole[..., :5])  # less padding

    def test_heads_in_the_place_of_queries(self) -> None:
        positions = learned(SCORES)
        usual = kept(positions, Span(2, 4, 1), (2, 4, 1, 5))
        packed = kept(positions, Span(2, 4, 1), (2, 2, 2, 5))
        assert torch.equal(packed.flatten(1, 2), usual.flatten(1, 2))

    def test_rows_and_words_in_one_dimension(self) -> None:
        hidden = kept(learned(HIDDEN), Span(3, 2, 4), (3, 4, 8))
        assert torch.equal(kept(learned(FLAT), Span(3, 2, 4), (12, 8)).view(3, 4, 8), hidden)

    def test_beams(self) -> None:
        """Their rows are more than those that the arguments of the call tell of."""
        few = kept(learned(HIDDEN), Span(2, 0, 4), (2, 4, 8))
        assert torch.equal(kept(learned(HIDDEN), Span(2, 0, 4), (6, 4, 8))[:2], few)
        few = kept(learned(FOLDED), Span(2, 0, 4), (8, 4, 4))
        assert torch.equal(kept(learned(FOLDED), Span(2, 0, 4), (24, 4, 4))[:8], few)

    def test_padding_on_the_left(self) -> None:
        """Places count from the origin, the end of the prompt."""
        long = kept(learned(SCORES, origin=6), Span(2, 0, 8), (2, 4, 8, 8))
        short = kept(learned(SCORES, origin=4), Span(2, 0, 6), (2, 4, 6, 6))
        assert torch.equal(long[..., 2:, 2:], short)

    def test_samples_and_sources_differ(self) -> None:
        positions, shape = learned(HIDDEN), (2, 9, 8)
        one, other = kept(positions, Span(2, 0, 9), shape), kept(positions, Span(2, 0, 9), shape, sample=6)
        assert not torch.equal(one, other)
        first = slot(positions, Span(2, 0, 9))
        assert first.another(0) is first
        out = first.another(1).apply(operators.masked, torch.ones(shape), first.params(0.5, shape), shape, False)
        assert not torch.equal(out > 0, one)

    def test_masks_that_are_broadcast(self) -> None:
        positions = learned(HIDDEN, shared=[1])
        units = kept(positions, Span(2, 0, 9), (2, 9, 8), (2, 1, 8))
        assert (units == units[:, :1]).all()
        assert torch.equal(kept(positions, Span(2, 4, 2), (2, 2, 8), (2, 1, 8)), units[:, :2])
        assert torch.equal(kept(positions, Span(2, 4, 1), (2, 1, 8), (2, 1, 8)), units[:, :1])
        positions = learned(HIDDEN, shared=[2])
        words = kept(positions, Span(2, 0, 9), (2, 9, 8), (2, 9, 1))
        assert (words == words[..., :1]).all()
        assert torch.equal(kept(positions, Span(2, 2, 7), (2, 7, 8), (2, 7, 1)), words[:, 2:])

    def test_masks_of_held_words(self) -> None:
        """All queries see the same keys, so that a mask is of the keys alone."""
        positions = learned(SCORES, shared=[1, 2])
        whole = kept(positions, Span(2, 0, 9), (2, 4, 9, 9), (2, 1, 1, 9))
        assert torch.equal(kept(positions, Span(2, 7, 1), (2, 4, 1, 8), (2, 1, 1, 8)), whole[:, :, :1, :8])

    def test_numbers(self) -> None:
        positions = learned(HIDDEN)
        whole = slot(positions, Span(2, 0, 9)).normal(torch.empty(2, 9, 8))
        part = slot(positions, Span(2, 3, 2)).normal(torch.empty(2, 2, 8))
        assert torch.equal(part, whole[:, 3:5])
        assert torch.equal(whole[0], whole[1])
        words = slot(positions, Span(2, 0, 9)).numbers(random_bits.random_bits, (2, 9, 8), None)
        assert words.unique().numel() == 72

    def test_in_place(self) -> None:
        positions, x = learned(HIDDEN), torch.ones(2, 4, 8)
        one = slot(positions, Span(2, 0, 4))
        out = one.apply(operators.masked, x, one.params(0.5, x.shape), x.shape, True)
        assert out is x
        assert torch.equal(x > 0, kept(positions, Span(2, 0, 4), (2, 4, 8)))

    def test_rates_that_vary(self) -> None:
        """Mask parameters may be a tensor, here of one rate for each unit."""
        positions = learned(HIDDEN)
        params = params_tensor(torch.tensor([0.0, 1.0, 0.5, 0.5, 1.0, 0.0, 0.5, 0.5])).view(1, 1, 8, -1)
        one = slot(positions, Span(2, 0, 9))
        out = one.apply(operators.masked, torch.ones(2, 9, 8), params, (2, 9, 8), False)
        assert (out[..., [0, 5]] == 0).all()
        assert (out[..., [1, 4]] == 1).all()
        assert set(out[..., 2].unique().tolist()) == {0.0, 2.0}


def test_the_rate_is_kept() -> None:
    """Over places, units and samples, and for pairs of neighbors, which must be independent."""
    positions, error = learned(HIDDEN), 0.02
    samples = -(-draws_for(0.3, error) // (40 * 8)) * 2
    one = slot(positions, Span(1, 0, 40))
    drawn = []
    for sample in range(samples):
        one = slot(positions, Span(1, 0, 40), sample)
        drawn.append(one.apply(operators.masked, torch.ones(1, 40, 8), one.params(0.7, (1, 40, 8)), (1, 40, 8), False))
    found = torch.stack(drawn) > 0
    check_rate(int(found.sum()), found.numel(), 0.3, error)
    for dim in (0, 2, 3):  # samples, places, units
        before, after = found.narrow(dim, 0, found.shape[dim] - 1), found.narrow(dim, 1, found.shape[dim] - 1)
        both = before & after
        check_rate(int(both.sum()), both.numel(), 0.09, error)


class TestErrors:
    @pytest.mark.parametrize(
        ("base", "longer", "message"),
        [
            ((6,), (10,), "dimension 0 has 6 and 10 elements for 2 and 3 rows"),
            ((6,), (8,), "dimension 0 has 6 and 8 elements for 2 and 3 rows"),
            ((6,), (3, 3), "another number of dimensions"),
        ],
    )
    def test_another_way_to_grow(self, base: tuple[int, ...], longer: tuple[int, ...], message: str) -> None:
        with pytest.raises(PlacelessError, match=message):
            find_parts({"rows": 2}, base, {"rows": longer})
        with pytest.raises(PlacelessError, match=f"tensor of dropout in h.0.drop: .*{message}.* Leave it out with"):
            Positions().learn({"rows": 2}, {SITE: (base, base)}, {"rows": {SITE: (longer, longer)}})

    def test_a_call_that_is_not_always_made(self) -> None:
        with pytest.raises(PlacelessError, match="it is not called every time"):
            Positions().learn({"rows": 2}, {SITE: ((2,), (2,))}, {"rows": {}})

    def test_a_call_that_is_new(self) -> None:
        positions = Positions()
        positions.learn({}, {}, {})
        with pytest.raises(PlacelessError, match="not met when the lengths"):
            kept(positions, Span(2), (2, 3))

    def test_a_shape_that_does_not_fit(self) -> None:
        with pytest.raises(PlacelessError, match="a dimension of 5 words does not fit"):
            kept(learned(HIDDEN), Span(2, 0, 4), (2, 5, 8))
        with pytest.raises(PlacelessError, match=r"its shape \(2, 4, 9\) does not fit"):
            kept(learned(HIDDEN), Span(2, 0, 4), (2, 4, 9))
        with pytest.raises(PlacelessError, match=r"its shape \(13, 8\) does not fit"):
            kept(learned(FLAT), Span(3, 0, 4), (13, 8))

"""Keys, layouts and strata: what makes a mask a function of (seed, source, sample, row)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.statistical import check_rate, draws_for
from torchdrop import kernels
from torchdrop.handlers.masks import Hypercube, Layout, MaskSlot, NotVectorizableError, Pass, find_layout, source_seed
from torchdrop.kernels import native
from torchdrop.kernels.mask_params import ONE, MaskParams, gaussian, mask_params
from torchdrop.ops import operators

SEED = 12345


def pass_of(sample: int, rows: int | None, first_row: int = 0, **options: object) -> Pass:
    return Pass(7, torch.tensor(sample), rows, first_row=first_row, **options)  # type: ignore[arg-type]


def dropped(
    run: Pass, x: Tensor, layout: Layout | None, keep_prob: float = 0.5, mask: list[int] | None = None
) -> Tensor:
    slot = MaskSlot(run, SEED, lambda *_: layout)
    return slot.apply(operators.masked, x, mask_params(keep_prob), mask or list(x.shape), False)


class TestFindLayout:
    @pytest.mark.parametrize(
        ("shapes", "mask", "expected"),
        [
            (((2, 5), (3, 5)), (3, 5), Layout(0, 1, True)),
            (((5, 2), (5, 3)), (5, 3), Layout(1, 1, True)),
            (((8, 5), (12, 5)), (12, 5), Layout(0, 4, True)),
            (((2, 5), (3, 5)), (1, 5), Layout(0, 1, False)),
            (((2, 2), (3, 3)), (3, 3), Layout(0, 1, True)),
            (((5, 4), (5, 4)), (5, 4), None),
            (((), ()), (), None),
            (((3, 5), (4, 5)), (4, 5), None),
            (((2,), (3, 1)), (3, 1), None),
        ],
    )
    def test_cases(self, shapes: tuple, mask: tuple, expected: Layout | None) -> None:
        assert find_layout(shapes, (2, 3), mask) == expected


class TestSeeds:
    def test_names_and_seeds_differ(self) -> None:
        names = [("a", "dropout", 0), ("a", "dropout", 1), ("b", "dropout", 0), ("a", "lstm", 0), ("", "dropout", 0)]
        seeds = {source_seed(seed, *name) for seed in (0, 1, -1, 2**70) for name in names}
        assert len(seeds) == 20
        assert all(-(2**63) <= seed < 2**63 for seed in seeds)

    def test_is_stable(self) -> None:
        """A seed is part of what users write down: it must not change between versions or processes."""
        assert source_seed(0, "features.0", "dropout", 2) == 6548487195833012521


class TestRows:
    """A row's mask is the same wherever the row is."""

    @given(
        rows=st.integers(1, 9),
        ratio=st.integers(1, 3),
        dim=st.integers(0, 2),
        cut=st.integers(0, 8),
        latin=st.booleans(),
        k=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    )
    def test_alone_or_in_a_batch(self, rows: int, ratio: int, dim: int, cut: int, latin: bool, k: float) -> None:
        cut = min(cut, rows - 1)
        cube = Hypercube(6) if latin else None
        sizes = [4, 5, 3]
        sizes[dim] = rows * ratio
        x = torch.rand(sizes) + 1
        layout = Layout(dim, ratio, True)
        whole = dropped(pass_of(3, rows, hypercube=cube), x, layout, k)
        part = x.narrow(dim, cut * ratio, (rows - cut) * ratio)
        alone = dropped(pass_of(3, rows - cut, cut, hypercube=cube), part, layout, k)
        assert torch.equal(alone, whole.narrow(dim, cut * ratio, (rows - cut) * ratio))

    @given(
        rows=st.integers(1, 5), ratio=st.integers(1, 2), dim=st.integers(0, 1), latin=st.booleans(), own=st.booleans()
    )
    def test_folded_is_one_after_another(self, rows: int, ratio: int, dim: int, latin: bool, own: bool) -> None:
        cube = Hypercube(6) if latin else None
        sizes = [4, 5]
        sizes[dim] = rows * ratio
        x = torch.rand(sizes) + 1
        layout = Layout(dim, ratio, own)
        mask = list(sizes)
        if not own:
            mask[dim] = 1
        each = [dropped(pass_of(s, rows, hypercube=cube), x, layout, mask=mask) for s in (4, 2, 5)]
        folded = Pass(7, torch.tensor([4, 2, 5]), rows, folded=True, hypercube=cube)
        mask[dim] *= 3 if own else 1
        together = dropped(folded, torch.cat([x] * 3, dim), layout, mask=mask)
        assert torch.equal(together, torch.cat(each, dim))
        assert not torch.equal(each[0], each[1]) or x.numel() < 20

    @given(rows=st.integers(1, 5), latin=st.booleans(), batched=st.booleans())
    def test_vmap_is_one_after_another(self, rows: int, latin: bool, batched: bool) -> None:
        cube = Hypercube(6) if latin else None
        layout = Layout(0, 1, True)
        x = torch.rand(3, rows, 8) + 1 if batched else torch.rand(rows, 8) + 1
        each = [
            dropped(pass_of(s, rows, hypercube=cube), x[i] if batched else x, layout) for i, s in enumerate((0, 3, 5))
        ]

        def one(sample: Tensor, x: Tensor) -> Tensor:
            return dropped(Pass(7, sample, rows, hypercube=cube), x, layout)

        many = torch.func.vmap(one, in_dims=(0, 0 if batched else None))(torch.tensor([0, 3, 5]), x)
        assert torch.equal(many, torch.stack(each))

    def test_shared_rows_have_one_mask(self) -> None:
        out = dropped(pass_of(0, 6, shared=True), torch.ones(6, 50), Layout(0, 1, True))
        assert torch.equal(out, out[:1].expand_as(out))
        first = dropped(pass_of(0, 1), torch.ones(1, 50), Layout(0, 1, True))
        assert torch.equal(out[:1], first)

    def test_independent_rows_and_samples_differ(self) -> None:
        masks = [dropped(pass_of(s, 4), torch.ones(4, 64), Layout(0, 1, True)) for s in range(3)]
        rows = torch.cat(masks)
        assert len({tuple(row.tolist()) for row in rows}) == 12

    def test_law_over_rows_and_columns(self) -> None:
        """A keep probability of 0 or 1 for each place shows that sets of parameters follow their places."""
        keep = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        from torchdrop.kernels.mask_params import params_tensor

        slot = MaskSlot(pass_of(0, 2), SEED, lambda *_: Layout(0, 1, True))
        out = slot.apply(operators.masked, torch.ones(2, 3), params_tensor(keep), [2, 3], False)
        assert torch.equal(out, keep)
        slot = MaskSlot(pass_of(0, 3), SEED, lambda *_: Layout(1, 1, True))
        out = slot.apply(operators.masked, torch.ones(2, 3), params_tensor(keep), [2, 3], False)
        assert torch.equal(out, keep)

    def test_gaussian_noise_follows_its_row(self) -> None:
        for cube in (None, Hypercube(4)):
            whole = MaskSlot(pass_of(1, 5, hypercube=cube), SEED, lambda *_: Layout(0, 1, True))
            part = MaskSlot(pass_of(1, 2, 3, hypercube=cube), SEED, lambda *_: Layout(0, 1, True))
            noise = mask_params(0.5, gaussian)
            a = whole.apply(operators.gaussian, torch.ones(5, 6), noise, [5, 6], False)
            b = part.apply(operators.gaussian, torch.ones(2, 6), noise, [2, 6], False)
            assert torch.equal(a[3:], b)
            assert a.unique().numel() == 30

    def test_folding_needs_rows(self) -> None:
        run = Pass(7, torch.arange(2), 3, folded=True)
        with pytest.raises(NotVectorizableError, match="belong to no row"):
            dropped(run, torch.ones(4), None)

    def test_in_place(self) -> None:
        x = torch.ones(4, 8)
        slot = MaskSlot(pass_of(0, 4), SEED, lambda *_: Layout(0, 1, True))
        out = slot.apply(operators.masked, x, mask_params(0.5), [4, 8], True)
        assert out is x
        assert set(x.unique().tolist()) == {0.0, 2.0}


class TestNumbers:
    @pytest.mark.parametrize("cube", [None, Hypercube(5)])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_uniform(self, dtype: torch.dtype, cube: Hypercube | None) -> None:
        slot = MaskSlot(pass_of(2, 100, hypercube=cube), SEED, lambda *_: Layout(0, 1, True))
        u = slot.uniform(torch.empty(100, 6000, dtype=dtype))
        assert u.dtype == dtype
        assert u.min() >= 0
        assert u.max() < 1

        check_rate(int((u < 0.25).sum()), u.numel(), 0.25, 0.01)

    def test_normal(self) -> None:
        z = MaskSlot(pass_of(2, 400), SEED, lambda *_: Layout(0, 1, True)).normal(
            torch.empty(400, 1000, dtype=torch.float64)
        )
        # five standard deviations of the mean, the variance and the fourth moment of 400,000 normals
        assert abs(z.mean()) < 5 / 632
        assert abs(z.var() - 1) < 5 * 2**0.5 / 632
        assert abs((z**4).mean() - 3) < 5 * 96**0.5 / 632


class TestHypercube:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 20, 97, 100, 128])
    def test_every_member_is_a_permutation(self, size: int) -> None:
        strata = (Hypercube(size).offsets(torch.arange(size)) * size + ONE // 2) >> 32
        assert torch.equal(strata.sort(0).values, torch.arange(size).unsqueeze(1).expand_as(strata))

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [10, 20, 50, 100])
    def test_pairs_of_samples_are_nearly_uncorrelated(self, size: int) -> None:
        """Averaged over the family, the correlation of one unit's masks in two samples is that of sampling strata
        without replacement, -1 / (T - 1); the excess squared is what a second-order effect of two units would keep."""
        strata = ((Hypercube(size).offsets(torch.arange(size)) * size + ONE // 2) >> 32).double()
        for k in (0.5, 0.8):
            distance = (strata[:, None] - strata[None]).remainder(size) / size
            both = (k - distance).clamp(min=0) + (k - 1 + distance).clamp(min=0)
            correlation = ((both - k * k) / (k - k * k)).mean(-1)
            pairs = correlation[~torch.eye(size, dtype=torch.bool)]
            assert (pairs.mean() + 1 / (size - 1)).abs() < 1e-9
            assert (pairs + 1 / (size - 1)).square().mean() < 0.1 / size

    @pytest.mark.parametrize(("k", "size"), [(0.5, 20), (0.8, 20), (0.75, 4), (0.9, 50)])
    def test_units_are_kept_whole_numbers_of_times(self, k: float, size: int) -> None:
        x = torch.ones(3, 500)
        cube = Hypercube(size)
        kept = sum((dropped(pass_of(s, 3, hypercube=cube), x, Layout(0, 1, True), k) > 0).int() for s in range(size))
        assert torch.equal(kept, torch.full_like(kept, round(k * size)))

    def test_units_are_kept_once_more_or_less(self) -> None:
        cube, k, size = Hypercube(7), 0.5, 7
        kept = sum(
            (dropped(pass_of(s, 3, hypercube=cube), torch.ones(3, 500), Layout(0, 1, True), k) > 0).int()
            for s in range(size)
        )
        assert set(kept.unique().tolist()) == {3, 4}

    def test_each_mask_has_its_rate(self) -> None:
        n = draws_for(0.3, 0.01)
        rows = -(-n // 1000)
        for sample in (0, 6):
            out = dropped(
                pass_of(sample, rows, hypercube=Hypercube(7)), torch.ones(rows, 1000), Layout(0, 1, True), 0.3
            )
            check_rate(int((out > 0).sum()), out.numel(), 0.3, 0.01)

    def test_draws_of_one_sample_are_exactly_uniform(self) -> None:
        """A sample's draw is the unit's own draw, moved around the circle: a bijection of the 2**32 values."""
        offsets = Hypercube(20).offsets(torch.arange(20))
        assert offsets.min() >= 0
        assert offsets.max() < ONE
        assert offsets.dtype == torch.int64

    def test_hypercubes_differ(self) -> None:
        masks = [
            dropped(pass_of(0, 1, hypercube=Hypercube(4, number)), torch.ones(1, 64), Layout(0, 1, True))
            for number in range(3)
        ]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


class TestStratified:
    @given(
        rows=st.integers(1, 4),
        length=st.integers(0, 600),
        size=st.integers(1, 12),
        k=st.sampled_from([0.0, 1e-9, 0.3, 0.5, 1.0]),
    )
    def test_backends_agree(self, rows: int, length: int, size: int, k: float) -> None:
        if native.library is None:
            pytest.skip("no C kernels here")
        shift, choice = torch.randint(-(2**62), 2**62, (2, rows, 2))
        offsets = Hypercube(size).offsets(torch.arange(size))
        assert kernels.backend_for(torch.device("cpu")) is native
        made = kernels.stratified((length,), shift, choice, offsets, mask_params(k))
        with kernels.use_backend("reference"):
            expected = kernels.stratified((length,), shift, choice, offsets, mask_params(k))
        assert made.shape == (size, rows, length)
        assert torch.equal(made, expected)

    def test_definition(self) -> None:
        """Element by element, in Python's integers."""
        shift, choice = torch.tensor([5, 6]), torch.tensor([7, 8])
        offsets = Hypercube(3).offsets(torch.arange(3))
        first, second = kernels.random_bits((40,), shift).tolist(), kernels.random_bits((40,), choice).tolist()
        threshold = MaskParams(3 * 2**30, 4 / 3)
        made = kernels.stratified((40,), shift, choice, offsets, threshold)
        for s, i in itertools.product(range(3), range(40)):
            member = second[i] * offsets.shape[1] // ONE
            assert made[s, i].item() == ((first[i] + int(offsets[s, member])) % ONE < 3 * 2**30)

    @pytest.mark.parametrize("width", [0, 2, 512])
    def test_vector_widths_agree(self, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
        if native.library is None:
            pytest.skip("no C kernels here")
        shift, choice = torch.randint(-(2**62), 2**62, (2, 3, 2))
        offsets = Hypercube(6).offsets(torch.arange(6))
        with kernels.use_backend("reference"):
            expected = kernels.stratified((777,), shift, choice, offsets, mask_params(0.7))
        monkeypatch.setattr(native, "ANY_WIDTH", width)
        assert torch.equal(kernels.stratified((777,), shift, choice, offsets, mask_params(0.7)), expected)

    def test_threads_change_nothing(self) -> None:
        shift, choice = torch.randint(-(2**62), 2**62, (2, 3, 2))
        offsets = Hypercube(4).offsets(torch.arange(4))
        torch.set_num_threads(1)
        one = kernels.stratified((20000,), shift, choice, offsets, mask_params(0.5))
        torch.set_num_threads(2)
        assert torch.equal(kernels.stratified((20000,), shift, choice, offsets, mask_params(0.5)), one)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_select(self, dtype: torch.dtype) -> None:
        x = torch.randn(4, 6, dtype=dtype)
        x[0, 0] = torch.inf
        kept = torch.rand(3, 4, 1) < 0.5
        kept[:, 0] = False
        out = kernels.select(x, kept, mask_params(0.5))
        assert torch.equal(out, torch.where(kept, x * 2, torch.zeros((), dtype=dtype)))

"""The bit stream and the kernels: known answers, an independent Philox, and every backend against the reference."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import torchdrop
from tests.statistical import check_rate, draws_for
from tests.strategies import DTYPES, keep_probs, keys, shared, tensors
from torchdrop import kernels
from torchdrop.kernels import aten, native, reference
from torchdrop.kernels.mask_params import ONE, MaskParams, alpha, inverted, mask_params, original, params_tensor
from torchdrop.kernels.masking import WHOLE, MaskSlice, apply_mask, params_by_value, unpack_params
from torchdrop.kernels.rows import has_plan, plan_rows

needs_native = pytest.mark.skipif(native.library is None, reason="the C kernels are not built")
made_fast = pytest.mark.parametrize("fast", [pytest.param(native, marks=needs_native), aten], ids=["native", "aten"])

KEY = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])


def block_of(number: int, key: list[int]) -> list[int]:
    """Four words of the native library's plain Philox."""
    words = (ctypes.c_uint32 * 4)()
    held = torch.tensor(key)
    assert native.library is not None
    native.library.philox_block(number % 2**64, held.data_ptr(), ctypes.addressof(words))
    return list(words)


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    block = signed(counter[0] | counter[1] << 32)
    pair = [signed(key[0] | key[1] << 32), signed(counter[2] | counter[3] << 32)]
    got = [int(w) for w in reference.philox(torch.tensor(block), torch.tensor(pair))]
    assert got == answer
    if native.library is not None:
        assert block_of(block, pair) == answer


@given(st.integers(0, 2**61 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_draws_are_those_of_an_independent_philox(block: int, seed: int, stream: int) -> None:
    def independent(number: int) -> list[int]:
        from randomgen import Philox

        generator = Philox(counter=0, key=seed, number=4, width=32)
        # randomgen steps the counter before it draws.
        counter = (number | stream << 64) - 1
        state = generator.state
        state["state"]["counter"] = np.array([counter >> 32 * j & 0xFFFFFFFF for j in range(4)], dtype=np.uint32)
        state["buffer_pos"] = 4
        generator.state = state
        return [int(w) for w in generator.random_raw(4)]

    upper, lower = independent(block), independent(block + 2**61)
    halves = [[w >> 16 * half & 0xFFFF for w in plane for half in (0, 1)] for plane in (upper, lower)]
    expected = [high << 16 | low for high, low in zip(*halves, strict=True)]
    key = torch.tensor([signed(seed), signed(stream)])
    for backend in (reference, aten, *([native] if native.library is not None else [])):
        assert backend.random_bits((8,), key, MaskSlice(8 * block)).tolist() == expected


@made_fast
@given(st.data(), tensors(), keep_probs, st.sampled_from([inverted, original, alpha]), st.booleans())
def test_fast_backends_equal_the_reference_bit_for_bit(
    fast: Any, data: st.DataObject, x: Tensor, k: float, formula: object, as_tensor: bool
) -> None:
    key = data.draw(keys())
    shape = data.draw(shared(tuple(x.shape)))
    drawn = mask_params(k, formula)  # type: ignore[arg-type]
    given_params = drawn.tensor() if as_tensor else drawn
    expected = reference.masked(x, key, given_params, shape)
    got = fast.masked(x, key, given_params, shape)
    assert torch.equal(got, expected)
    assert got.dtype == x.dtype
    assert got.stride() == torch.empty_like(x).stride()
    again = fast.masked(x, key, given_params, shape, WHOLE, x.clone(memory_format=torch.preserve_format))
    assert torch.equal(again, expected)
    assert torch.equal(fast.keep_mask(shape, key, given_params), reference.keep_mask(shape, key, given_params))


@made_fast
@given(st.data(), st.sampled_from([(3,), (2, 3), (1, 3)]), st.sampled_from([(5, 130), (4, 3), (200,), ()]))
def test_batches_of_keys_and_params_equal_the_reference(
    fast: Any, data: st.DataObject, batch: tuple[int, ...], rest: tuple[int, ...]
) -> None:
    key = data.draw(keys(batch))
    shape = data.draw(shared(rest))
    full = (*batch, *rest)
    rates = data.draw(shared((*batch, *shape)))
    params_of_each = params_tensor(
        torch.rand(rates, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), alpha
    )
    x = torch.randn((2, *full[1:]) if full[0] == 1 else full)
    for given_params in (params_of_each, mask_params(0.7)):
        expected = reference.masked(x, key, given_params, shape)
        assert torch.equal(fast.masked(x, key, given_params, shape), expected)
    for index in np.ndindex(*batch):
        alone = reference.masked(x[index], key[index], mask_params(0.7), shape)
        assert torch.equal(fast.masked(x, key, mask_params(0.7), shape)[index], alone)


@made_fast
@given(st.data(), st.integers(0, 2**62), st.integers(0, 700), keep_probs)
@example(data=None, start=2**32 - 3, n=300, k=0.3)
@example(data=None, start=2**40 - 1, n=17, k=0.9)
@example(data=None, start=2**62, n=300, k=0.3)
def test_any_part_of_the_index_space_can_be_drawn(
    fast: Any, data: st.DataObject | None, start: int, n: int, k: float
) -> None:
    key = KEY if data is None else data.draw(keys())
    assert torch.equal(
        fast.random_bits((n,), key, MaskSlice(start)), reference.random_bits((n,), key, MaskSlice(start))
    )
    assert torch.equal(
        fast.standard_normal((n,), key, MaskSlice(start)), reference.standard_normal((n,), key, MaskSlice(start))
    )
    assert torch.equal(
        fast.keep_mask((n,), key, mask_params(k), MaskSlice(start)),
        reference.keep_mask((n,), key, mask_params(k), MaskSlice(start)),
    )


@pytest.mark.parametrize("start", [0, 1, 7, 8, 2**32 - 5, 2**35 + 3])
def test_a_part_is_the_part_of_the_whole(start: int) -> None:
    whole = kernels.random_bits((1000,), KEY, MaskSlice(start))
    for offset in (0, 1, 8, 255, 256, 999):
        assert torch.equal(kernels.random_bits((1000 - offset,), KEY, MaskSlice(start + offset)), whole[offset:])


def test_indices_beyond_2_to_the_32_do_not_repeat() -> None:
    here = kernels.random_bits((4096,), KEY)
    for start in (2**31, 2**32, 2**35, 2**48, 2**60):
        assert not torch.equal(kernels.random_bits((4096,), KEY, MaskSlice(start)), here)


@pytest.mark.parametrize(
    ("batch", "shape", "rates", "part"),
    [
        ((), (5, 130), None, WHOLE),
        ((2, 3), (70,), (2, 1, 1), WHOLE),
        ((3,), (4, 5), (3, 1, 1), MaskSlice(7, 10, 96)),
        ((2,), (6, 80), (1, 6, 1), WHOLE),
        ((), (3, 4, 64), (3, 4, 1), MaskSlice(5)),
        ((), (), None, MaskSlice(3)),
    ],
)
def test_a_plan_of_rows_has_the_bits_and_parameters_of_the_mask(
    batch: tuple[int, ...], shape: tuple[int, ...], rates: tuple[int, ...] | None, part: MaskSlice
) -> None:
    key = KEY + torch.arange(2 * math.prod(batch)).reshape(*batch, 2)
    params = (
        mask_params(0.3) if rates is None else params_tensor(torch.linspace(0.1, 0.9, math.prod(rates)).view(rates))
    )
    assert has_plan(params, key, shape, part)
    plan = plan_rows(key, params, shape, part)
    keys = key.reshape(-1, 2)
    rows = [
        reference.random_bits(
            (plan.length,), keys[r // plan.rows_per_key], MaskSlice(part.start + r % plan.rows_per_key * plan.pitch)
        )
        for r in range(plan.rows)
    ]
    assert torch.equal(torch.cat(rows), reference.random_bits(shape, key, part).flatten())
    if isinstance(plan.params, Tensor):
        own = plan.params.reshape(-1, 4).repeat_interleave(plan.rows_per_key if plan.params_for == "key" else 1, 0)
        assert isinstance(params, Tensor)
        expected = params.expand(*batch, *shape, 4).reshape(-1, 4)
        assert torch.equal(own.repeat_interleave(plan.length, 0), expected)
    else:
        assert (plan.params, plan.params_for) == (params, "all")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0.5, 0.9, 1 / 3])
def test_threads_and_vector_width_do_not_change_a_bit(dtype: torch.dtype, k: float) -> None:
    assert native.library is not None
    x = torch.randn(200_003).to(dtype)
    drawn = mask_params(k, alpha if k == 0.9 else inverted)
    expected = reference.masked(x, KEY, drawn, x.shape)
    for width in (0, 2, 512):
        for threads in (1, 2, 3, 7):
            out = torch.empty_like(x)
            native.library.rows(
                native.Operation.DROPOUT, native.ELEMENT_TYPES[dtype], out.data_ptr(), x.data_ptr(), 1, x.numel(), 1, 0,
                x.numel(), KEY.data_ptr(), drawn.address, 0, threads, width,
            )  # fmt: skip
            assert torch.equal(out, expected), (width, threads)


@needs_native
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_of_several_megabytes_are_the_same(dtype: torch.dtype, offset: int) -> None:
    x = torch.randn(2**21 + 2**20 + 77).to(dtype)[offset:]
    out = torch.empty_like(x)
    expected = apply_mask(x, native.keep_mask(x.shape, KEY, mask_params(0.9)), mask_params(0.9))
    assert torch.equal(native.masked(x, KEY, mask_params(0.9), x.shape, WHOLE, out), expected)
    assert torch.equal(native.masked(x, KEY, mask_params(0.9), x.shape, WHOLE, x), expected)


@needs_native
def test_this_build_has_threads_and_says_its_width() -> None:
    assert native.library is not None
    assert native.library.openmp() == 1
    assert native.library.width() in (0, 2, 512)


@needs_native
@pytest.mark.parametrize("width", [0, 2, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_value_is_scaled_and_rounded_as_pytorch_does(dtype: torch.dtype, width: int) -> None:
    assert native.library is not None
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (1.0, 4 / 3, 2.0**16, 0.3, 2.0**-9):
        out, drawn = torch.empty_like(x), MaskParams(ONE, scale)
        native.library.rows(
            native.Operation.DROPOUT, native.ELEMENT_TYPES[dtype], out.data_ptr(), x.data_ptr(), 1, x.numel(), 1, 0,
            x.numel(), KEY.data_ptr(), drawn.address, 0, 1, width,
        )  # fmt: skip
        expected = (x.float() * scale).to(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        same = (out.view(torch.int16) == expected.view(torch.int16)) | expected.isnan()
        assert bool(same.all())


def test_a_dropped_element_is_positive_zero_whatever_it_was(backend: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -1.0, -0.0] * 200)
    y = kernels.masked(x, KEY, mask_params(0.5), x.shape)
    kept = kernels.keep_mask(x.shape, KEY, mask_params(0.5))
    dropped = y[~kept]
    assert torch.equal(dropped, torch.zeros_like(dropped))
    assert not dropped.signbit().any()
    assert torch.equal(y[kept].nan_to_num(7.0), (x * 2)[kept].nan_to_num(7.0))
    assert y[kept & (x == 0)].signbit().all()


def test_rates_zero_and_one_are_exact(backend: str) -> None:
    x = torch.randn(5000)
    assert torch.equal(kernels.masked(x, KEY, mask_params(1.0), x.shape), x)
    assert torch.equal(kernels.masked(x, KEY, mask_params(0.0), x.shape), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_gives_zero_or_the_scaled_input(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(64, 100, dtype=torch.float64).to(dtype)
    y = kernels.masked(x, KEY, mask_params(0.8), x.shape)
    kept = kernels.keep_mask(x.shape, KEY, mask_params(0.8))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert torch.equal(y, torch.where(kept, (x.to(wide) * mask_params(0.8).scale).to(dtype), 0))
    assert torch.equal(y, kernels.masked(x, KEY, mask_params(0.8), x.shape))
    assert 0.7 < kept.float().mean() < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.5, 0.8, 0.99])
def test_masks_have_their_rate_along_elements_streams_and_seeds(backend: str, k: float) -> None:
    error = 0.05 * min(k, 1 - k)
    n = draws_for(k, error)
    check_rate(int(kernels.keep_mask((n,), KEY, mask_params(k)).sum()), n, k, error)
    many = torch.stack([torch.arange(n // 8 + 1), torch.full((n // 8 + 1,), 5)], -1)
    for key in (many, many.flip(-1)):
        kept = kernels.keep_mask((8,), key, mask_params(k))
        check_rate(int(kept.sum()), kept.numel(), k, error)


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.5, 0.8])
def test_masks_are_independent_along_elements_streams_and_seeds(k: float) -> None:
    error = 0.02 * k * (1 - k)
    n = draws_for(k * k, error)
    one = kernels.keep_mask((n + 1024,), KEY, mask_params(k))
    for lag in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024):
        check_rate(int((one[:n] & one[lag : n + lag]).sum()), n, k * k, error)
    for step in ([1, 0], [0, 1], [1, 1], [2**32, 0], [0, 2**32]):
        other = kernels.keep_mask((n,), KEY + torch.tensor(step), mask_params(k))
        check_rate(int((one[:n] & other).sum()), n, k * k, error)
    streams = torch.stack([torch.full((n // 8 + 2,), 3), torch.arange(n // 8 + 2)], -1)
    for key in (streams, streams.flip(-1)):
        rows = kernels.keep_mask((8,), key, mask_params(k))
        both = (rows[:-1] & rows[1:]).flatten()
        check_rate(int(both.sum()), both.numel(), k * k, error)


@pytest.mark.slow
def test_every_bit_of_the_draws_is_fair() -> None:
    n = draws_for(0.5, 0.005)
    drawn = kernels.random_bits((n,), KEY)
    for bit in range(32):
        check_rate(int((drawn >> bit & 1).sum()), n, 0.5, 0.005)


@pytest.mark.slow
def test_normals_have_the_normal_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    n = 2**20
    z = kernels.standard_normal((n,), KEY).numpy()
    # The Kolmogorov-Smirnov distance exceeds t with probability 2 exp(-2 n t^2) at most (Massart).
    limit = math.sqrt(math.log(2 / 1e-9) / (2 * n))
    assert stats.kstest(z, "norm").statistic < limit
    assert stats.kstest(z[0::2] * z[1::2] / np.hypot(z[0::2], z[1::2]) * 2, "norm").statistic < limit * math.sqrt(2)


def test_the_grid_of_normals_has_mean_zero_and_variance_one() -> None:
    """Moments by enumeration: opposite angles cancel, perpendicular ones share their squares, and -2 ln u has mean
    2."""
    words_ = torch.arange(0, 2**30, 2**14 + 1)
    cosine, sine = reference._circle(words_)
    for turn, (x, y) in enumerate([(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)]):
        turned = reference._circle(words_ + turn * 2**30)
        assert torch.equal(turned[0], x)
        assert torch.equal(turned[1], y)
    # Stirling: sum of ln((w + 1/2) / 2^b) over the 2^b words w is -2^b + (ln 2)/2 + o(1).
    u = (torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**20
    assert (-2 * reference._log(u)).mean().item() == pytest.approx(2 - math.log(2) / 2**20, rel=1e-12)
    assert torch.allclose(reference._log(u), u.log(), rtol=1e-15, atol=1e-15)
    angle = ((words_ & 0x3FFFFFFF).double() - 536870911.5) / 2**30 * math.pi / 2 + (words_ >> 30) * math.pi / 2
    assert torch.allclose(cosine, angle.cos(), atol=1e-15)
    assert torch.allclose(sine, angle.sin(), atol=1e-15)


def test_backends_are_listed_with_their_reasons() -> None:
    listed = torchdrop.available_backends()
    assert list(listed) == ["native", "triton", "aten", "reference"]
    assert listed["reference"] == []
    assert torchdrop.available_backends("cuda")["native"][-1] == "it works on CPU tensors, not on cuda"
    assert torchdrop.available_backends(dtype=torch.int32)["aten"][0].startswith("it takes torch.float16")


@pytest.mark.parametrize("size", [8 * aten.FEW - 3, 8 * aten.FEW + 9, 8 * aten.PIECE + 77])
def test_large_masks_of_pytorchs_operations_are_those_of_the_reference(size: int) -> None:
    parts = [WHOLE, MaskSlice(5)] if size < aten.PIECE else [MaskSlice(2**40 + 3, size, size)]
    for key in (KEY, torch.stack([KEY, -KEY])):
        for part in parts:
            found = aten.keep_mask((size,), key, mask_params(0.9), part)
            assert torch.equal(found, reference.keep_mask((size,), key, mask_params(0.9), part))


def test_elements_whose_upper_bits_do_not_decide_are_decided_by_the_lower_ones() -> None:
    """At this rate each of them is on the threshold's upper 16 bits with probability 2**-16, so some hundred are."""
    n = 2**23
    k = mask_params(0.3)
    drawn = native.random_bits((n,), KEY) if native.library is not None else reference.random_bits((n,), KEY)
    tied = drawn >> 16 == k.threshold >> 16
    assert tied.sum() > 64
    found = aten.keep_mask((n,), KEY, k)
    assert torch.equal(found, drawn < k.threshold)
    assert found[tied].any()
    assert not found[tied].all()


def test_every_bit_of_a_key_matters(backend: str) -> None:
    """In all 128 places: the masks of random keys, and of those that differ from them in one bit, are all different."""
    count = 1 if backend == "triton" else 100
    base = torch.randint(-(2**63), 2**63 - 1, (count, 1, 2), generator=torch.Generator().manual_seed(5))
    bits = torch.tensor([1 << bit if bit < 63 else -(2**63) for bit in range(64)])
    one_off = torch.cat([torch.zeros(1, 2, dtype=torch.int64), torch.stack([bits, bits * 0], -1)])
    one_off = torch.cat([one_off, torch.stack([bits * 0, bits], -1)])
    kept = kernels.keep_mask((64,), base ^ one_off, mask_params(0.5))
    numbers = (kept.to(torch.int64) << torch.arange(64)).sum(-1)
    assert numbers.numel() == count * 129
    # Two fair masks of 64 elements are equal with probability 2**-64, so that none of these are.
    assert len(numbers.unique()) == numbers.numel()
    alone = kernels.keep_mask((64,), base[0, 0], mask_params(0.5))
    assert torch.equal(alone, kept[0, 0])


def test_a_backend_is_forced_and_let_go() -> None:
    x = torch.randn(100)
    torch.manual_seed(3)
    expected = torchdrop.functional.dropout(x)
    with torchdrop.use_backend("reference"):
        torch.manual_seed(3)
        assert torch.equal(torchdrop.functional.dropout(x), expected)
        with torchdrop.use_backend("aten"):
            torch.manual_seed(3)
            assert torch.equal(torchdrop.functional.dropout(x), expected)
            assert kernels.backend_for(x.device) is aten
        assert kernels.backend_for(x.device) is reference
    assert kernels._forced is None


def test_a_forced_backend_that_cannot_serve_says_why_and_changes_nothing() -> None:
    x = torch.randn(4, device="meta")
    state = torch.get_rng_state()
    with torchdrop.use_backend("native"), pytest.raises(RuntimeError) as error:
        torchdrop.functional.dropout(x)
    assert str(error.value) == "the native backend cannot serve this: it works on CPU tensors, not on meta"
    assert torch.equal(torch.get_rng_state(), state)
    with (
        pytest.raises(ValueError, match="backend must be one of 'native', 'triton', 'aten', 'reference', got 'cuda'"),
        torchdrop.use_backend("cuda"),
    ):
        pass


def test_more_dimensions_than_the_kernels_take() -> None:
    x = torch.zeros([1] * 63 + [2])
    assert torch.equal(kernels.masked(x, KEY, mask_params(0.5), x.shape), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(native.library is None, reason="no compiled kernels")
@pytest.mark.parametrize("size", [1, 63, 64, 127, 128, 255, 256, 1000])
def test_groups_short_and_long_are_those_of_the_reference(dtype: torch.dtype, size: int) -> None:
    """Long ones that are dropped are set to zero without being read."""
    x = torch.randn(40, size).to(dtype)
    x[::3] = math.nan
    for one in (mask_params(0.4), mask_params(0.4, alpha)):
        ours, expected = (b.masked(x, KEY, one, (40, 1)) for b in (native, reference))
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())
        assert torch.equal(torch.signbit(ours.nan_to_num()), torch.signbit(expected.nan_to_num()))


class TestLawsOnOtherDevices:
    """A copy of a set of mask parameters from the host's memory to a device is waited for."""

    @pytest.mark.parametrize("dims", [0, 2])
    def test_one_law_is_taken_by_its_numbers(self, dims: int) -> None:
        given_params = mask_params(0.3, alpha)
        tensor = given_params.tensor().reshape(*[1] * dims, 4)
        assert repr(params_by_value(tensor)) == repr(given_params)
        assert params_by_value(given_params) is given_params

    def test_a_threshold_out_of_range_is_clipped(self) -> None:
        for value, below in ((-1.0, 0), (2.0**33, ONE)):
            found = params_by_value(torch.tensor([value, 2.0, 0.0, 0.0], dtype=torch.float64))
            assert isinstance(found, MaskParams)
            assert found.threshold == below

    def test_several_laws_and_those_of_a_device_stay_where_they_are(self) -> None:
        several, elsewhere = params_tensor(torch.tensor([0.3, 0.6])), mask_params(0.3).tensor().to("meta")
        assert params_by_value(several) is several
        assert params_by_value(elsewhere) is elsewhere

    def test_the_scalars_of_one_law_are_not_copied(self) -> None:
        meta, tensor = torch.device("meta"), mask_params(0.3, alpha).tensor()
        scalars = unpack_params(tensor, meta)
        assert [v.item() for v in scalars if isinstance(v, Tensor) and v.is_cpu] == tensor.tolist()
        assert all(isinstance(v, Tensor) and v.is_meta for v in unpack_params(tensor.expand(3, 4), meta))
        batched = torch.func.vmap(lambda one: unpack_params(one, meta)[1])(tensor.expand(3, 4))
        assert batched.is_meta

    @pytest.mark.parametrize("run", [kernels.masked, kernels.gaussian])
    def test_backends_are_given_numbers(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []

        class Backend:
            @staticmethod
            def masked(x: Tensor, key: Tensor, given_params: Any, *rest: Any) -> Tensor:
                seen.append(given_params)
                return x

            @staticmethod
            def standard_normal(shape: Any, key: Tensor, part: MaskSlice) -> Tensor:
                return torch.zeros(shape, dtype=torch.float64, device=key.device)

        monkeypatch.setattr(kernels, "backend_for", lambda *_: Backend)
        monkeypatch.setattr(kernels, "apply_normal", lambda x, z, given_params, out: seen.append(given_params) or x)
        for device, kind in (("meta", MaskParams), ("cpu", Tensor)):
            x = torch.ones(5, device=device)
            run(x, KEY.to(device), mask_params(0.3).tensor(), x.shape)
            assert isinstance(seen.pop(), kind)

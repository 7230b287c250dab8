"""The Triton kernels' masks against the reference: on a CUDA device if there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton_kernels import (  # noqa: F401
    KEY,
    REASONS,
    added,
    here,
    identical,
    lengths,
    masked,
    needs_kernels,
    programs_of_the_devices_size,
    quiet,
    some_rates,
)
from tests.strategies import DTYPES, dtypes, keep_probs, keys, shared, tensors
from torchdrop.kernels import reference
from torchdrop.kernels import triton as backend
from torchdrop.kernels.mask_params import ONE, MaskParams, alpha, inverted, mask_params, original, params_tensor
from torchdrop.kernels.masking import COMPUTE_DTYPE, WHOLE, MaskSlice

pytestmark = quiet

small_tensors = tensors(
    st.one_of(
        st.just(()),
        st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
        lengths.map(lambda n: (n,)),
        st.sampled_from([(3, 700), (2, 3, 4, 40)]),
    )
)


@needs_kernels
@settings(max_examples=20)
@given(keys(), lengths, keep_probs)
def test_draws_and_masks_are_those_of_the_reference(key: Tensor, n: int, k: float) -> None:
    assert torch.equal(backend.random_bits((n,), here(key)).cpu(), reference.random_bits((n,), key))
    got = backend.keep_mask((n,), here(key), mask_params(k))
    assert got.dtype == torch.bool
    assert torch.equal(got.cpu(), reference.keep_mask((n,), key, mask_params(k)))


@pytest.mark.slow
@needs_kernels
@settings(max_examples=15)
@given(keys(), st.integers(0, 2**62), st.integers(0, 4), st.integers(1, 300), st.integers(0, 2**50), st.booleans())
@example(KEY, 2**31 - 3, 1, 2100, 0, False)
@example(KEY, 2**31, 2, 16, 2**31, False)
@example(KEY, 2**32 - 5, 3, 21, 2**32 + 1, False)
@example(KEY, 2**34 - 8, 3, 24, 2**33 + 8, False)
@example(KEY, 2**40, 2, 2500, 2**41 + 3, False)
@example(KEY, 2**62, 2, 9, 5, False)
def test_any_part_of_the_index_space(
    key: Tensor, start: int, rows: int, run: int, pitch: int, whole_blocks: bool
) -> None:
    if whole_blocks:
        start, run, pitch = start // 8 * 8, run * 8, pitch // 8 * 8
    shape, part = (rows, run), MaskSlice(start, run, pitch)
    x = torch.rand(shape) + 1
    assert torch.equal(backend.random_bits(shape, here(key), part).cpu(), reference.random_bits(shape, key, part))
    assert identical(
        masked(x, key, mask_params(0.3), shape, part), reference.masked(x, key, mask_params(0.3), shape, part)
    )
    part = MaskSlice(start)
    assert identical(
        masked(x, key, mask_params(0.3), shape, part), reference.masked(x, key, mask_params(0.3), shape, part)
    )


@needs_kernels
@pytest.mark.parametrize(("rows", "run"), [(1, 1022), (1, 1024), (2, 1022), (2, 1024), (2, 126), (2, 125)])
def test_what_begins_within_a_vector_may_need_one_more_program(rows: int, run: int) -> None:
    x, part = torch.ones(rows, run), MaskSlice(3, run, 2**20 + 1) if rows > 1 else MaskSlice(3)
    assert identical(
        masked(x, KEY, mask_params(0.5), x.shape, part), reference.masked(x, KEY, mask_params(0.5), x.shape, part)
    )


@needs_kernels
@pytest.mark.parametrize("n", [8, 2048, 3001])
def test_ties_of_the_upper_halves_are_decided_by_the_lower(n: int) -> None:
    drawn = reference.random_bits((n,), KEY)
    x = torch.ones(n)
    for element in (0, n // 2, n - 1):
        draw = int(drawn[element])
        assert draw & 0xFFFF
        for threshold in (draw, draw + 1, (draw & ~0xFFFF) + 1):
            given_params = MaskParams(threshold, 1.0)
            expected = drawn < threshold
            assert torch.equal(backend.keep_mask((n,), here(KEY), given_params).cpu(), expected)
            assert torch.equal(masked(x, KEY, given_params, (n,)).cpu() != 0, expected)


@needs_kernels
def test_ties_at_the_smallest_and_the_largest_upper_half() -> None:
    """Where nothing is below the threshold's upper half, or everything else is."""
    drawn = reference.random_bits((2**20,), KEY)
    for upper in (0, 0xFFFF):
        for parity in (0, 1):
            found = (drawn >> 16 == upper).nonzero().flatten()
            place = int(found[found % 2 == parity][0])
            draw = int(drawn[place])
            for threshold in (draw, draw + 1, max(draw & ~0xFFFF, 1), (draw | 0xFFFF) + 1):
                got = backend.keep_mask((9,), here(KEY), MaskParams(threshold, 1.0), MaskSlice(place - 4)).cpu()
                assert torch.equal(got, drawn[place - 4 : place + 5] < threshold)


@pytest.mark.slow
@needs_kernels
@settings(max_examples=25)
@given(st.data(), small_tensors, keep_probs, st.sampled_from([inverted, original, alpha]), st.booleans())
def test_masked_equals_the_reference_bit_for_bit(
    data: st.DataObject, x: Tensor, k: float, formula: Any, as_tensor: bool
) -> None:
    key, shape = data.draw(keys()), data.draw(shared(tuple(x.shape)))
    drawn = mask_params(k, formula)
    given_params = drawn.tensor() if as_tensor else drawn
    expected = reference.masked(x, key, drawn, shape)
    got = masked(x, key, given_params, shape)
    assert torch.equal(got.cpu(), expected)
    assert got.stride() == expected.stride()
    target = here(x).clone(memory_format=torch.preserve_format)
    assert torch.equal(backend.masked(target, here(key), given_params, shape, WHOLE, target).cpu(), expected)


@pytest.mark.slow
@needs_kernels
@settings(max_examples=15)
@given(
    st.data(), dtypes, st.sampled_from([(3,), (2, 2), (1, 3)]), st.sampled_from([(2, 130), (4, 3), (200,), (2, 256)])
)
def test_batches_of_keys_and_params_equal_the_reference(
    data: st.DataObject, dtype: torch.dtype, batch: tuple[int, ...], rest: tuple[int, ...]
) -> None:
    key = data.draw(keys(batch))
    shape = data.draw(shared(rest))
    full = (*batch, *rest)
    rates = data.draw(shared((*batch, *shape)))
    params_of_each = params_tensor(
        torch.rand(rates, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), alpha
    )
    x = torch.randn((2, *full[1:]) if full[0] == 1 else full).to(dtype)
    part = MaskSlice(data.draw(st.sampled_from([0, 8, 13])), shape[-1] if shape[-1] > 1 else 0, 264)
    for given_params, wanted in (
        (params_of_each, WHOLE),
        (mask_params(0.7), WHOLE),
        (data.draw(st.sampled_from([params_of_each, mask_params(0.7)])), part),
    ):
        expected = reference.masked(x, key, given_params, shape, wanted)
        assert torch.equal(masked(x, key, given_params, shape, wanted).cpu(), expected)


@needs_kernels
@pytest.mark.parametrize("part", [MaskSlice(5, 16, 80), MaskSlice(8, 16, 80), WHOLE])
def test_parameters_for_each_key_hold_for_all_its_rows(part: MaskSlice) -> None:
    x, key = torch.ones(3, 2, 32), torch.arange(6).reshape(3, 2)
    params_of_each = params_tensor(torch.tensor([0.2, 0.5, 0.8])).reshape(3, 1, 1, 4)
    expected = reference.masked(x, key, params_of_each, (2, 32), part)
    assert identical(masked(x, key, here(params_of_each), (2, 32), part), expected)


@pytest.mark.slow
@needs_kernels
@settings(max_examples=25)
@given(
    keys(),
    dtypes,
    st.integers(1, 20),
    st.sampled_from([2, 7, 8, 16, 17, 49, 64, 300, 512, 1000]),
    st.sampled_from([0, 3, 8, 2**33 + 5]),
    some_rates,
    st.booleans(),
)
@example(KEY, torch.float32, 20, 49, 3, 0.5, True)
@example(KEY, torch.bfloat16, 20, 512, 2**33 + 5, 0.9, True)
def test_shared_draws_equal_the_reference(
    key: Tensor, dtype: torch.dtype, count: int, width: int, start: int, k: float, several: bool
) -> None:
    if several:
        key = torch.stack([key, key + 1, KEY])
    x = torch.randn(*key.shape[:-1], count, width).to(dtype)
    drawn = mask_params(k, alpha if k == 0.9 else inverted)
    expected = reference.masked(x, key, drawn, (count, 1), MaskSlice(start))
    assert identical(masked(x, key, drawn, (count, 1), MaskSlice(start)), expected)


@pytest.mark.skipif(bool(REASONS) or not backend._interpreted(), reason="only the interpreter tells what is read")
def test_groups_that_are_dropped_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    read: set[int] = set()
    load = InterpreterBuilder.create_masked_load

    def watch(self: Any, places: Any, mask: Any, *rest: Any) -> Any:
        read.update(places.data[mask.data].tolist())
        return load(self, places, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watch)
    x = torch.ones(30, 20)
    kept = reference.keep_mask((30, 1), KEY, mask_params(0.5)).expand(30, 20)
    masked(x, KEY, mask_params(0.5), (30, 1))
    places = x.data_ptr() + 4 * torch.arange(600).reshape(30, 20)
    assert read & set(places.flatten().tolist()) == set(places[kept].tolist())


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_value_is_rounded_to_the_nearest_even(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (4 / 3, 2.0**16, 2.0**-9):
        got = masked(x, KEY, MaskParams(ONE, scale), x.shape).cpu()
        expected = (x.float() * scale).to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert bool(((got.view(torch.int16) == expected.view(torch.int16)) | expected.isnan()).all())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_by", [1, 50])
def test_a_dropped_element_is_positive_zero_and_a_kept_zero_keeps_its_sign(dtype: torch.dtype, shared_by: int) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -1.0, -0.0], dtype=dtype).repeat(20 * shared_by)
    x = x.reshape(100, shared_by)
    kept = reference.keep_mask((100, 1), KEY, mask_params(0.5))
    expected = torch.where(kept, x * 2, torch.zeros((), dtype=dtype))
    for given_params in (mask_params(0.5), mask_params(0.5).tensor()):
        y = masked(x, KEY, given_params, (100, 1) if shared_by > 1 else x.shape).cpu()
        assert torch.equal(y.isnan(), expected.isnan())
        assert identical(y.nan_to_num(7.0), expected.nan_to_num(7.0))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_with_a_fill_alone_or_a_shift_alone(dtype: torch.dtype) -> None:
    x = torch.randn(999).to(dtype)
    x[::3] = -0.0
    for given_params in (
        MaskParams(ONE // 3, 1.5, 0.25),
        MaskParams(ONE // 3, 1.5, 0.0, -3.0),
        MaskParams(ONE, 1.0, -0.125, 2.0),
    ):
        expected = reference.masked(x, KEY, given_params, x.shape)
        assert identical(masked(x, KEY, given_params, x.shape), expected)
        assert identical(masked(x, KEY, given_params.tensor(), x.shape), expected)


@pytest.mark.slow
@needs_kernels
def test_many_parameters_in_the_devices_memory_are_read_there() -> None:
    """With thresholds that no `MaskParams` has: outside their range or no numbers."""
    x, key = torch.randn(3, 70, 80), torch.arange(6).reshape(3, 2)
    for below in (-5.0, 0.0, 1.0, 2.0**31, ONE - 1.0, float(ONE), 1e30):
        params_of_each = torch.tensor(
            [[below, 1.5, 0.0, 0.0], [ONE // 2, 2.0, 0.25, -1.0], [ONE / 3 // 1, 3.0, 0.0, 0.5]]
        )
        params_of_each = params_of_each.to(torch.float64).reshape(3, 1, 1, 4)
        expected = reference.masked(x, key, params_of_each, (70, 80))
        assert torch.equal(masked(x, key, here(params_of_each), (70, 80)).cpu(), expected)
        assert torch.equal(
            backend.keep_mask((70, 80), here(key), here(params_of_each)).cpu(),
            reference.keep_mask((70, 80), key, params_of_each),
        )


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formula", [inverted, alpha])
def test_one_set_of_parameters_in_the_devices_memory_is_read_there(dtype: torch.dtype, formula: Any) -> None:
    x, residual, drawn = torch.randn(300).to(dtype), torch.randn(300).to(dtype), mask_params(0.37, formula)
    x[::5] = -0.0
    in_memory = here(drawn.tensor())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "params_by_value", lambda one: one)  # as of memory that the host does not read
        grouped = x.reshape(100, 3)
        for linear, meant in ((False, drawn), (True, drawn.linear())):
            y = backend.masked(here(x), here(KEY), in_memory, (300,), linear=linear)
            assert identical(y, reference.masked(x, KEY, meant, (300,)))
            y = backend.masked(here(grouped), here(KEY), in_memory, (100, 1), linear=linear)
            assert identical(y, reference.masked(grouped, KEY, meant, (100, 1)))
        if formula is inverted:
            sums = backend.dropout_add(here(x), None, here(residual), here(KEY), in_memory)
            assert identical(cast(Tensor, sums), added(x, None, residual, drawn))
            given, kept = here(x), here(residual)
            g = backend.activation_dropout_backward(given, kept, here(KEY), in_memory, "relu")
            wide = COMPUTE_DTYPE[dtype]
            assert identical(cast(Tensor, g), torch.where(residual <= 0, 0, x.to(wide) * drawn.scale).to(dtype))


@needs_kernels
def test_rates_zero_and_one_are_exact() -> None:
    x = torch.randn(2500)
    assert identical(masked(x, KEY, mask_params(1.0), x.shape), x)
    assert identical(masked(x, KEY, mask_params(0.0), x.shape), torch.zeros_like(x))


@needs_kernels
def test_normal_variates_are_the_references() -> None:
    got = backend.standard_normal((3, 50), here(KEY), MaskSlice(5))
    torch.testing.assert_close(got.cpu(), reference.standard_normal((3, 50), KEY, MaskSlice(5)), rtol=1e-14, atol=1e-15)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6, 1, 1), (2, 1, 1, 1)])
def test_other_memory_formats_take_the_kernels_too(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, k = torch.randn(2, 6, 4, 5).half(), mask_params(0.5)
    expected = reference.masked(x, KEY, k, shape)
    monkeypatch.setattr(backend, "apply_mask", None)
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3).contiguous().transpose(0, 3)):
        got = masked(other, KEY, k, shape)
        assert identical(got, expected)
        assert got.stride() == other.stride()

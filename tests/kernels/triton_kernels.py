"""What the tests of the Triton backend share: the device, a comparison of bits, and programs of the device's size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import on
from torchdrop.kernels import reference
from torchdrop.kernels import triton as backend
from torchdrop.kernels.mask_params import MaskParams
from torchdrop.kernels.masking import COMPUTE_DTYPE, WHOLE, MaskSlice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""A CUDA device where there is one; else Triton's interpreter takes CPU tensors."""

REASONS = backend.unsupported_reasons(DEVICE, torch.float32)

needs_kernels = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))

quiet = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
"""numpy, in which the interpreter computes, reports what overflows."""

KEY = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])

lengths = st.one_of(st.integers(0, 70), st.sampled_from([1023, 1024, 1025, 2047, 2048, 2049, 5000]))

some_rates = st.sampled_from([0.5, 0.37, 0.9, 1.0, 0.0])


@pytest.fixture(autouse=True, scope="module")
def programs_of_the_devices_size() -> Iterator[None]:
    """Also in the interpreter, where they are larger, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_vectors", lambda: backend._VECTORS)
        yield


def here(x: Any) -> Any:
    """A tensor on the device under test; anything else as it is."""
    return on(DEVICE, x) if isinstance(x, Tensor) else x


def identical(got: Tensor, expected: Tensor) -> bool:
    """Whether all bits are the same, those of zeros' signs as well."""
    view = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    same_kind = got.dtype == expected.dtype and got.shape == expected.shape
    return same_kind and torch.equal(got.cpu().contiguous().view(view), expected.contiguous().view(view))


def masked(x: Tensor, key: Tensor, params: MaskParams | Tensor, shape: Any, part: MaskSlice = WHOLE) -> Tensor:
    return backend.masked(here(x), here(key), params, shape, part)


def added(x: Tensor, bias: Tensor | None, residual: Tensor, given_params: MaskParams) -> Tensor:
    """The definition of `dropout_add`, rounded once."""
    wide = COMPUTE_DTYPE[x.dtype]
    value = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    kept = reference.keep_mask(x.shape, KEY, given_params)
    return (residual.to(wide) + torch.where(kept, value * given_params.scale, 0)).to(x.dtype)

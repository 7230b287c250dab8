"""What hypothesis draws: shapes, element types, strides, keep probabilities, keys."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

dtypes = st.sampled_from(DTYPES)

shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 7), min_size=1, max_size=5).map(tuple),
    st.integers(0, 3000).map(lambda n: (n,)),
    st.sampled_from([(70_000,), (3, 257, 129), (2, 16, 33, 40)]),
)

keep_probs = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.9, 2.0**-16, 1 - 2.0**-16, 2.0**-32, 1e-12, 1 - 1e-12, 1 / 65536 + 2.0**-30]),
    st.floats(0.0, 1.0),
)

words = st.integers(-(2**63), 2**63 - 1)


@st.composite
def keys(draw: st.DrawFn, batch: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if batch:
        return torch.randint(-(2**63), 2**63 - 1, (*batch, 2), generator=generator)
    return torch.tensor([draw(words), draw(words)])


@st.composite
def tensors(draw: st.DrawFn, of_shapes: st.SearchStrategy[tuple[int, ...]] = shapes) -> Tensor:
    """A tensor without zeros whose memory may be transposed, sliced with a step, offset or channels_last."""
    shape = draw(of_shapes)
    dtype = draw(dtypes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    layout = draw(st.sampled_from(["contiguous", "permuted", "stepped", "offset", "channels_last"]))
    if layout == "channels_last" and len(shape) == 4:
        return _filled(shape, dtype, generator).contiguous(memory_format=torch.channels_last)
    if layout == "permuted" and len(shape) > 1:
        order = draw(st.permutations(range(len(shape))))
        inverse = [order.index(d) for d in range(len(shape))]
        return _filled([shape[d] for d in order], dtype, generator).permute(inverse)
    if layout == "stepped" and shape:
        return _filled((*shape[:-1], 2 * shape[-1]), dtype, generator)[..., ::2]
    if layout == "offset" and shape:
        return _filled((*shape[:-1], shape[-1] + 1), dtype, generator)[..., 1:]
    return _filled(shape, dtype, generator)


def _filled(shape: object, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(tuple(shape), generator=generator)  # type: ignore[arg-type]
    return torch.where(x.abs() < 0.01, 0.5, x).to(dtype)


@st.composite
def shared(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A mask's shape for an input of this shape: some axes are shared."""
    return tuple(1 if draw(st.booleans()) else size for size in shape)


def on(device: torch.device, x: Tensor) -> Tensor:
    """x on a device, with its strides; itself if it is there."""
    if x.device.type == device.type:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)

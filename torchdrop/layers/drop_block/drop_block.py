"""DropBlock: `drop_block1d`, `drop_block2d`, `drop_block3d` and their modules.

Blocks of side b start at random places of each map, wholly inside it, and the elements that they cover are dropped
(Ghiasi et al., NeurIPS 2018). With c the elements that no block covers and P(c) their probability,

    y = x c / mean(P(c))       scaling "mean": the expectation over a map's positions is right, E[c] has the mean k
    y = x c / P(c)             scaling "marginal": E[y] = x at every position

The probability that a block starts is solved for, so that the mean of P(c) over positions is k (see `geometry`). Both
scales follow only from the rate and the shape, never from the mask that was drawn, which would couple samples.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Proxy

from ... import kernels
from ...core import portable, sites
from ...core.checks import check_bool, check_integer
from ...core.inputs import check_inplace, check_input
from ...core.mask_shape import Axes, mask_shape
from ...core.rate import InplaceRated, Probability, as_rate, rate_named
from ...core.symbolic import leaf, recorded
from ...core.torch_state import is_compiling, is_plain
from ...kernels.mask_params import ONE, MaskParams
from ...kernels.masking import COMPUTE_DTYPE
from ...ops import operators
from .geometry import anchor_params, free, position_scales

Scaling = Literal["mean", "marginal"]


def _check_form(block_size: Any, scaling: Any, inplace: Any) -> None:
    check_integer("block_size", block_size, least=1)
    if scaling not in ("mean", "marginal"):
        raise ValueError(f"scaling must be 'mean' or 'marginal', got {scaling!r}")
    check_bool("inplace", inplace)  # timm's third argument is a number, gamma_scale


def _rate_or_none(p: Any, keep_prob: Any) -> Any:
    """Does what `rate_named` does, but lets `as_rate` refuse a call without a rate."""
    return None if p is None else rate_named("p", p, keep_prob)


def _mask_shape(input: Tensor, spatial: int, block_size: int, shared_axes: Axes) -> tuple[int, ...]:
    """Returns the input's shape, with ones on the shared axes, none of which may be the map's."""
    dims, name = input.dim(), f"drop_block{spatial}d"
    axes = ", ".join("DHW"[3 - spatial :] if spatial > 1 else "L")
    if dims not in (spatial + 1, spatial + 2):
        raise ValueError(
            f"input should be {spatial + 2} dimensional. Got {dims} dimensions: {name} takes (N, C, {axes}), or "
            f"(C, {axes}) for one sample"
        )
    if block_size > min(input.shape[-spatial:]):
        raise ValueError(
            f"block_size must be at most the smallest side of the feature map, got {block_size} for an input of "
            f"{tuple(input.shape)}: choose a smaller block_size for maps of this size"
        )
    shape = tuple(mask_shape(input, shared_axes, None))
    if shape[-spatial:] != input.shape[-spatial:]:
        raise ValueError(f"shared_axes must not be those of the feature map, ({axes}), got {shared_axes}")
    return shape


_UNSCALED = MaskParams(ONE, 1.0)


class _Blocked(torch.autograd.Function):
    """Multiplication by a mask that backward keeps, at a byte for each of its elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, params: MaskParams) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.params, ctx.shape = params, x.shape
        return kernels.select(x, kept, params)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _masked(operators.fitting(grad, ctx.shape, kept.device), kept, ctx.params), None, None


def _select(x: Tensor, kept: Tensor, params: MaskParams) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _Blocked.apply(x, kept, params)
    return kernels.select(x, kept, params)


def _select_in_memory_order(x: Tensor, kept: Tensor, params: MaskParams) -> Tensor:
    """Applies the kernel, whose results are contiguous: dimensions are put in the order of x's memory, and back."""
    if x.is_contiguous():
        return _select(x, kept, params)
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    back = [order.index(d) for d in range(x.dim())]
    return _select(x.permute(order), kept.expand(x.shape).permute(order), params).permute(back)


def _masked(x: Tensor, kept: Tensor, scale: MaskParams | Tensor) -> Tensor:
    """Returns ``x * scale`` where kept and 0 elsewhere, differentiable in x."""
    dtype = COMPUTE_DTYPE[x.dtype]
    if not is_compiling() and is_plain(x):
        if isinstance(scale, MaskParams):
            return _select_in_memory_order(x, kept, scale)
        return (_select_in_memory_order(x, kept, _UNSCALED).to(dtype) * scale.to(x.device, dtype)).to(x.dtype)
    factor = scale.scale if isinstance(scale, MaskParams) else scale.to(x.device, dtype)
    if not x.is_contiguous():
        kept = torch.ones_like(x, dtype=torch.bool) & kept  # the result has x's strides, and where() copies them
    return torch.where(kept, x.to(dtype) * factor, 0.0).to(x.dtype)


def _drop_block(
    spatial: int,
    input: Tensor,
    p: Any,
    block_size: int,
    inplace: bool,
    training: bool,
    keep_prob: Any,
    scaling: Scaling,
    shared_axes: Axes,
    generator: torch.Generator | None,
) -> Tensor:
    """Drops blocks, for all three forms. These differ in the number of the map's dimensions."""
    rate = as_rate(_rate_or_none(p, keep_prob), keep_prob)
    _check_form(block_size, scaling, inplace)
    if not sites.is_on(training):
        return input
    check_input(input, f"drop_block{spatial}d")
    shape = _mask_shape(input, spatial, block_size, shared_axes)
    if inplace:
        check_inplace(input)
    sizes = portable.numbered(shape[-spatial:])
    params = anchor_params(rate.params_for((*shape[:-spatial], *[1] * spatial)), sizes, block_size)
    scale: MaskParams | Tensor = params if isinstance(params, MaskParams) else params[..., 1]
    if scaling == "marginal":
        scale = position_scales(params, sizes, block_size)
    unstarted = sites.keep_mask(input, params, shape, generator)
    if unstarted is None:
        return input
    out = _masked(input, free(unstarted, sizes, block_size), scale)
    return input.copy_(out) if inplace else out


def drop_block1d(
    input: Tensor,
    p: Probability | None = None,
    block_size: int = 7,
    inplace: bool = False,
    eps: float = 1e-06,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    scaling: Scaling = "mean",
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Applies `drop_block2d` to (N, C, L) or (C, L): blocks of `block_size` neighbors in each channel of each sample.

    The definition, the expectation and the arguments are those of `drop_block2d`.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.functional.drop_block1d(torch.ones(1, 1, 8), keep_prob=0.2, block_size=8)
        >>> y.unique().numel()
        1
    """
    if isinstance(input, Proxy):
        return recorded(drop_block1d, locals())
    return _drop_block(1, input, p, block_size, inplace, training, keep_prob, scaling, shared_axes, generator)


def drop_block2d(
    input: Tensor,
    p: Probability | None = None,
    block_size: int = 7,
    inplace: bool = False,
    eps: float = 1e-06,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    scaling: Scaling = "mean",
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops square blocks of each channel's map, so that a share k of the positions is kept on average.

    Blocks of side b start with probability 1 - q, independently, at each of the (H - b + 1)(W - b + 1) places where
    they fit. Position (i, j) is kept with probability ``q**(r(i) r(j))``, r counting the places on its axis whose
    blocks cover it, so it is higher at the edges; q is solved for such that its mean over positions is k = keep_prob
    = 1 - p, within ``block_size**2 / 2**33``. In training, kept elements are multiplied by

    - ``scaling="mean"``: 1 over that mean, one number. E[y] = x on average over a map's positions.
    - ``scaling="marginal"``: 1 over the position's own probability. E[y] = x everywhere. The center's probability is
      below k, so its scale is above 1/k; above 10 it is refused (below k = 0.54 for blocks of 7 on maps of 14 x 14).

    With k = 1 and in eval mode the input itself is returned; with k = 0 the output is 0. A dropped element is exactly
    0, also where the input is infinite or NaN. Masks are drawn for each channel of each sample, and scales do not
    depend on them. Even sizes of blocks are served like odd ones; a block larger than the map is refused, not clamped.

    Args:
        input: (N, C, H, W), or (C, H, W) for one sample; float16, bfloat16, float32 or float64.
        p: the mean share that is dropped, in [0, 1].
        block_size: the side b of a block, an integer from 1 to the smallest side of the map; 1 is `dropout`.
        inplace: whether the result is written into `input`.
        eps: not used: there is no division by a count. It is here for calls written for torchvision.
        training: whether blocks are dropped.
        keep_prob: k, in place of `p`: a number, or a tensor that broadcasts against (N, C, 1, 1).
        scaling: "mean" or "marginal".
        shared_axes: axes over which the mask is the same, such as 1 for all channels; never those of the map.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape, dtype and memory format; the input itself in eval mode, with k = 1 and in place.

    Raises:
        ValueError: a rate outside [0, 1], a block smaller than 1 or larger than the map, an input of another rank, or
            a scale above 10.
        TypeError: both names of the rate, neither, a block_size that is no integer, or inplace that is no bool.
        RuntimeError: an integer tensor, or one that must not be written to.

    References:
        Ghiasi, Lin and Le, NeurIPS 2018 (arXiv:1810.12890). Its equation (1) for the rate of blocks ignores that they
        overlap, and its algorithm 1 scales by the count of the mask that was drawn.

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> y = torchdrop.functional.drop_block2d(torch.ones(64, 32, 14, 14), 0.1, 7)
        >>> bool(abs((y > 0).float().mean() - 0.9) < 0.01), y.unique().numel()
        (True, 2)
    """
    if isinstance(input, Proxy):
        return recorded(drop_block2d, locals())
    return _drop_block(2, input, p, block_size, inplace, training, keep_prob, scaling, shared_axes, generator)


def drop_block3d(
    input: Tensor,
    p: Probability | None = None,
    block_size: int = 7,
    inplace: bool = False,
    eps: float = 1e-06,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    scaling: Scaling = "mean",
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Applies `drop_block2d` to (N, C, D, H, W) or (C, D, H, W): cubes of side `block_size`, in each channel.

    The definition, the expectation and the arguments are those of `drop_block2d`.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.functional.drop_block3d(torch.ones(1, 1, 3, 3, 3), keep_prob=0.5, block_size=3)
        >>> y.unique().numel()
        1
    """
    if isinstance(input, Proxy):
        return recorded(drop_block3d, locals())
    return _drop_block(3, input, p, block_size, inplace, training, keep_prob, scaling, shared_axes, generator)


class _DropBlock(InplaceRated):
    def __init__(
        self,
        p: Probability | None = None,
        block_size: int = 7,
        inplace: bool = False,
        eps: float = 1e-06,
        *,
        keep_prob: Probability | None = None,
        scaling: Scaling = "mean",
        shared_axes: Axes = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(_rate_or_none(p, keep_prob), inplace, keep_prob=keep_prob, generator=generator)
        _check_form(block_size, scaling, inplace)
        self.block_size = block_size
        self.eps = eps
        self.scaling = scaling
        self.shared_axes = shared_axes

    def extra_repr(self) -> str:
        rate, inplace = super().extra_repr().rsplit(", ", 1)
        scaling = "" if self.scaling == "mean" else f", scaling={self.scaling!r}"
        shared = "" if self.shared_axes is None else f", shared_axes={self.shared_axes}"
        return f"{rate}, block_size={self.block_size}, {inplace}{scaling}{shared}"


class DropBlock1d(_DropBlock):
    """Module of `drop_block1d`: blocks of neighbors of (N, C, L) or (C, L).

    See `DropBlock2d` for the arguments and `drop_block2d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> x = torch.ones(2, 3, 16)
        >>> layer = torchdrop.DropBlock1d(keep_prob=0.9, block_size=4)
        >>> layer(x).shape, layer.eval()(x) is x
        (torch.Size([2, 3, 16]), True)
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return drop_block1d(
            input, self.rate, self.block_size, self.inplace, training=self.training, scaling=self.scaling,
            shared_axes=self.shared_axes, generator=self.generator,
        )  # fmt: skip


class DropBlock2d(_DropBlock):
    """Module of `drop_block2d`: squares of each channel's map are dropped, so that a share k is kept on average.

    In training ``y = x c / mean(P(c))`` or ``x c / P(c)``, c the elements that no block covers; in eval mode the input
    itself. Calls written for torchvision.ops.DropBlock2d mean the same here, but get the exact rate that they ask for.
    Those written for timm's DropBlock2d do not: it has other names for the arguments, and another order.

    Args:
        p: the mean share that is dropped, in [0, 1].
        block_size: the side of a block, at most the smallest side of the map.
        inplace: whether the result is written into the input.
        eps: not used.
        keep_prob: k, in place of `p`: a number, or a tensor that broadcasts against (N, C, 1, 1).
        scaling: "mean" or "marginal".
        shared_axes: axes over which the mask is the same, such as 1 for all channels.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input and output: (N, C, H, W) or (C, H, W). No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1], a block smaller than 1, another scaling.
        TypeError: both names of the rate, neither, a block_size that is no integer, or inplace that is no bool.

    References:
        Ghiasi, Lin and Le, NeurIPS 2018 (arXiv:1810.12890). They let keep_prob fall linearly from 1 in training: see
        `KeepProbScheduler`.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.DropBlock2d(0.1, 7)
        >>> layer
        DropBlock2d(p=0.1, block_size=7, inplace=False)
        >>> x = torch.ones(2, 3, 14, 14)
        >>> layer(x).unique().numel() <= 2, layer.eval()(x) is x
        (True, True)
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return drop_block2d(
            input, self.rate, self.block_size, self.inplace, training=self.training, scaling=self.scaling,
            shared_axes=self.shared_axes, generator=self.generator,
        )  # fmt: skip


class DropBlock3d(_DropBlock):
    """Module of `drop_block3d`: cubes of (N, C, D, H, W) or (C, D, H, W).

    See `DropBlock2d` for the arguments and `drop_block2d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> x = torch.ones(2, 3, 5, 5, 5)
        >>> layer = torchdrop.DropBlock3d(keep_prob=0.9, block_size=3)
        >>> layer(x).shape, layer.eval()(x) is x
        (torch.Size([2, 3, 5, 5, 5]), True)
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return drop_block3d(
            input, self.rate, self.block_size, self.inplace, training=self.training, scaling=self.scaling,
            shared_axes=self.shared_axes, generator=self.generator,
        )  # fmt: skip

"""Masksembles: n fixed masks over the channels, each of which makes a member of an ensemble.

A batch is taken as n blocks: sample i of B gets mask floor(i n / B), both in training and in eval mode. With
d_c the number of masks that keep channel c,

    y_ic = x_ic M_jc n / d_c,   j = floor(i n / B)

so that the mean over the masks is x, channel by channel (Durasov et al., CVPR 2021, who do not scale).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core import sites
from ..core.checks import check_integer, check_module, check_number
from ..core.choices import subset
from ..core.inputs import check_input
from ..core.portable import refuse_script
from ..core.symbolic import holds_proxy, leaf, recorded
from ..kernels.masking import COMPUTE_DTYPE
from ..random import check_generator


def _check_count(name: str, value: Any) -> int:
    return check_integer(name, value, least=1)


def _number_kept(channels: int, n: int, scale: float) -> int:
    """Returns M, the number of channels that each mask keeps: M S (1 - (1 - 1/S)^n) = C, rounded, and n M >= C."""
    met = -math.expm1(n * math.log1p(-1.0 / scale)) if scale > 1.0 else 1.0
    return max(math.ceil(channels / n), round(channels / (scale * met)))


def _check_masks(channels: int, n: int, scale: Any) -> int:
    """Returns the number of channels that each mask keeps.

    Raises:
        TypeError: `scale` is no number.
        ValueError: it is below 1 or not finite; or there are no n different masks, each without some channels.
    """
    scale = check_number("scale", scale)
    if not 1.0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and at least 1, got {scale}")
    kept = _number_kept(channels, n, scale)
    if scale > 1.0 and n > 1 and kept >= channels:
        raise ValueError(
            f"scale must be larger, or channels more, for masks that differ: with {channels} channels, {n} masks and "
            f"scale {scale} each mask keeps all channels"
        )
    if scale > 1.0 and math.comb(channels, kept) < n:
        raise ValueError(
            f"n must be at most {math.comb(channels, kept)} for {channels} channels of which each mask keeps {kept} "
            f"(scale {scale}), got {n}: there are no more different masks"
        )
    return kept


def _equal_to_earlier(masks: Tensor, order: Tensor) -> Tensor:
    """Returns bools of the masks that are equal to one before them, in this order."""
    which = masks.unique(dim=0, return_inverse=True)[1]
    equal = which.unsqueeze(1) == which
    place = order.argsort()
    return (equal & (place < place.unsqueeze(1))).any(1)


def masksembles_masks(channels: int, n: int, scale: float = 2.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws n masks over the channels: the same number of channels in each, and each channel in one mask at least.

    Each mask keeps exactly M channels, M S (1 - (1 - 1/S)^n) = C up to rounding, as published. The scale S determines
    the overlap: two masks share about M / S channels (a few per cent fewer here), an intersection over union of
    1 / (2S - 1). S = 1 keeps everything in all masks; as S grows, masks become disjoint, as in an ensemble of networks.

    The channels are distributed over the masks in random order, so that each has an owner, and each mask is filled up
    with a random subset of the channels that it does not own; masks that equal another one are filled up anew. So the
    masks of S > 1 all differ, and there are masks for every number of channels.

    Args:
        channels: C.
        n: the number of masks.
        scale: S, at least 1. Default: 2.
        generator: a CPU generator, the source of the masks' keys; PyTorch's default generator if None, so that the
            masks follow from torch.manual_seed.

    Returns:
        Bools on the CPU, of shape (n, channels).

    Raises:
        ValueError: a number below 1, or one for which there are no n different masks with channels left out of each.
        TypeError: something that is no number, or no generator.

    References:
        Durasov et al., Masksembles for uncertainty estimation, CVPR 2021 (arXiv:2012.08334).

    Example:
        >>> import torch, torchdrop
        >>> masks = torchdrop.functional.masksembles_masks(16, 4, 2.0)
        >>> masks.sum(1).tolist(), bool(masks.any(0).all())
        ([9, 9, 9, 9], True)
    """
    channels, n = _check_count("channels", channels), _check_count("n", n)
    kept = _check_masks(channels, n, scale)
    check_generator(generator)
    with torch.device("cpu"):
        like = torch.empty(0)
        order = sites.random_bits(like, (channels,), generator).argsort(stable=True)
        owner = torch.empty(channels, dtype=torch.int64).scatter_(0, order, torch.arange(channels) % n)
        own = owner == torch.arange(n).unsqueeze(1)
        masks, again = torch.zeros(n, channels, dtype=torch.bool), torch.ones(n, 1, dtype=torch.bool)
        while True:
            bits = sites.random_bits(like, (n, channels), generator)
            chosen = subset(torch.where(own, -1, bits), kept)  # the channels that a mask owns come first
            masks = torch.where(again, torch.zeros_like(masks).scatter_(1, chosen, True), masks)
            if kept == channels or type(masks) is not Tensor:  # without values there is nothing to compare
                return masks
            again = _equal_to_earlier(masks, bits.argsort(0)[:, 0]).unsqueeze(1)
            if not again.any():
                return masks


def _check_dim(dim: Any) -> None:
    check_integer("dim", dim)
    if dim == 0:
        raise ValueError("dim must not be 0, the dimension of the samples")


def masksembles(input: Tensor, masks: Tensor, *, dim: int = 1) -> Tensor:
    """Multiplies each sample by its mask, and divides each channel by the fraction of the masks that keep it.

    ``y_ic = x_ic M_jc n / d_c`` with j = floor(i n / B), d_c = sum_j M_jc. If n divides the number of samples, they are
    n equal blocks, one for each mask, as in the authors' code; otherwise the blocks' sizes differ by one, and with
    fewer samples than masks some masks are not used. The mean of y over the masks is x, up to rounding, in every
    channel that some mask keeps. A masked element is exactly 0, also where the input is infinite or NaN.

    Args:
        input: (B, C, ...), or with the channels in another dimension: float16, bfloat16, float32 or float64.
        masks: bools of shape (n, C), as `masksembles_masks` makes them; copied to the input's device if on another.
        dim: the dimension of the channels, not 0. Default: 1; -1 for features in the last one.

    Returns:
        A new tensor of the input's shape and dtype.

    Raises:
        ValueError: masks or an input of another shape, or a dimension that does not exist.
        TypeError: masks that are no bools.
        RuntimeError: an integer tensor as input.

    References:
        Durasov et al., Masksembles for uncertainty estimation, CVPR 2021 (arXiv:2012.08334).

    Example:
        >>> import torch, torchdrop
        >>> masks = torch.tensor([[True, True, False], [False, True, True]])
        >>> torchdrop.functional.masksembles(torch.ones(4, 3), masks)
        tensor([[2., 1., 0.],
                [2., 1., 0.],
                [0., 1., 2.],
                [0., 1., 2.]])
    """
    if holds_proxy(input, masks):
        return recorded(masksembles, locals())
    check_input(input, "masksembles")
    _check_dim(dim)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise TypeError(f"masks must be a tensor of bools, got {getattr(masks, 'dtype', type(masks).__name__)}")
    if masks.dim() != 2 or masks.shape[0] == 0:
        raise ValueError(f"masks must be (n, channels), got the shape {tuple(masks.shape)}")
    n, channels = masks.shape
    dims = input.dim()
    if not -dims < dim < dims:
        raise ValueError(f"input must have its channels in dimension {dim}, got the shape {tuple(input.shape)}")
    if input.shape[dim] != channels:
        raise ValueError(
            f"input must have {channels} channels in dimension {dim}, got {input.shape[dim]} in the shape "
            f"{tuple(input.shape)}"
        )
    samples, masks = input.shape[0], masks.to(input.device)
    member = torch.arange(samples, device=input.device) * n // max(samples, 1)
    shape = [1] * dims
    shape[dim] = channels
    dtype = COMPUTE_DTYPE[input.dtype]
    scale = (n / masks.sum(0).clamp(min=1).to(dtype)).reshape(shape)
    shape[0] = samples
    return torch.where(masks[member].reshape(shape), (input.to(dtype) * scale).to(input.dtype), 0.0)


class Masksembles(nn.Module):
    """Module of `masksembles`: n fixed masks, drawn when the layer is made and saved with the model.

    Sample i of B gets mask floor(i n / B), in training and in eval mode. Inputs may have any rank: (N, C) and
    (N, C, H, W) are those of the authors' Masksembles1D and Masksembles2D, and the first three arguments are theirs.
    `masksembles_predict` returns the predictions of all n members.

    Args:
        channels: C, the size of the input's dimension `dim`.
        n: the number of masks.
        scale: determines the masks' overlap, at least 1; see `masksembles_masks`. Default: 2.
        dim: the dimension of the channels. Default: 1; -1 for features in the last one.
        generator: a CPU generator, the source of the masks; PyTorch's default generator if None.

    Shape:
        Input and output: (B, C, ...). The buffer `masks`, (n, C) bools, is in the state_dict; drawn on the CPU, it
        is on PyTorch's default device, as parameters are (but never on "meta", where it would be lost).

    Raises:
        ValueError, TypeError: as `masksembles_masks`.

    References:
        Durasov et al., Masksembles for uncertainty estimation, CVPR 2021 (arXiv:2012.08334).

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.Masksembles(16, 4, 2.0)
        >>> layer(torch.ones(10, 16, 3, 3)).shape, list(layer.state_dict())
        (torch.Size([10, 16, 3, 3]), ['masks'])
    """

    __prepare_scriptable__ = refuse_script

    masks: Tensor

    def __init__(
        self,
        channels: int,
        n: int,
        scale: float = 2.0,
        *,
        dim: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_dim(dim)
        masks, default = masksembles_masks(channels, n, scale, generator=generator), torch.get_default_device()
        self.register_buffer("masks", masks if default.type == "meta" else masks.to(default))
        self.channels: int = int(channels)
        self.n: int = int(n)
        self.scale: float = float(scale)
        self.dim = dim

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return masksembles(input, self.masks, dim=self.dim)

    def extra_repr(self) -> str:
        return f"{self.channels}, n={self.n}, scale={self.scale}, dim={self.dim}"


def masksembles_predict(model: nn.Module, input: Tensor) -> Tensor:
    """Returns the outputs of all members of a model with Masksembles layers, from one forward on n copies of the input.

    The copies are blocks of one batch, one after another, so each gets one mask of every layer. The model runs in its
    present mode: call ``eval()`` before for predictions. Mean and spread over the first dimension are the ensemble's.

    Args:
        model: a module from one tensor to one tensor, with one `Masksembles` layer or several of the same n.
        input: (B, ...).

    Returns:
        (n, B, ...).

    Raises:
        ValueError: the model has no such layer, layers with different n, or an output without the samples in front.
        TypeError: it is no module, or `input` no tensor.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torchdrop.Masksembles(16, 4), torch.nn.Linear(16, 2))
        >>> y = torchdrop.functional.masksembles_predict(model.eval(), torch.randn(5, 4))
        >>> y.shape, y.var(0).shape
        (torch.Size([4, 5, 2]), torch.Size([5, 2]))
    """
    check_module("model", model)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    sizes = {module.n for module in model.modules() if isinstance(module, Masksembles)}
    if len(sizes) != 1:
        found = f"n = {', '.join(map(str, sorted(sizes)))}" if sizes else "none"
        raise ValueError(f"model must have Masksembles layers of one n, got {found}")
    (n,) = sizes
    output = model(torch.cat([input] * n))
    if not isinstance(output, Tensor) or output.shape[:1] != (n * input.shape[0],):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model must give a tensor with a row for each of {n * input.shape[0]} samples, got {got}")
    return output.unflatten(0, (n, input.shape[0]))

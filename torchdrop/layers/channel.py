"""Dropout of whole channels: `dropout1d`, `dropout2d`, `dropout3d` and their modules.

The map of `dropout` with a mask that is shared over the spatial axes: one draw for each channel of each sample
(Tompson et al., CVPR 2015).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..core import sites
from ..core.checks import warn
from ..core.formulations import Formulated, eval_form, masked
from ..core.inputs import check_input
from ..core.mask_shape import check_channels
from ..core.rate import DEFAULT_P, Probability, as_rate, formula_of, undrawn
from ..core.symbolic import leaf, recorded
from ..core.torch_state import is_compiling
from ..ops.fast_path import fast_channel_dropout


def _shape1d(input: Tensor) -> tuple[int, ...]:
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. Note that dropout1d drops whole "
            "channels of inputs with one spatial dimension, (C, L) or (N, C, L): use dropout with shared_axes else"
        )
    return (*input.shape[:-1], 1)


def _shape2d(input: Tensor) -> tuple[int, ...]:
    dims = input.dim()
    if dims not in (3, 4):
        _warn_dimensions("dropout2d", dims, "(N, C, H, W)")
    if dims == 3:
        warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior is "
            "desired - input is interpreted as shape (N, C, L). torch.nn announces that this will become (C, H, W): "
            "use dropout1d to keep the present meaning, or dropout with shared_axes to be explicit",
            stacklevel=5,
        )
    return (*input.shape[:2], *[1] * (dims - 2))


def _shape3d(input: Tensor) -> tuple[int, ...]:
    dims = input.dim()
    if dims not in (4, 5):
        _warn_dimensions("dropout3d", dims, "(N, C, D, H, W) or (C, D, H, W)")
    channels = 2 if dims == 5 else 1
    return (*input.shape[:channels], *[1] * (dims - channels))


def _warn_dimensions(name: str, dims: int, usual: str) -> None:
    warn(
        f"{name}: Received a {dims}-D input to {name}, which is deprecated and will result in an error in a future "
        f"release of torch.nn. {name} drops whole channels of {usual}: use dropout with shared_axes for other shapes",
        stacklevel=6,
    )


def channel_shape(input: Tensor, spatial: int) -> tuple[int, ...]:
    """Returns the shape of a mask with a draw for each channel, for inputs with so many spatial dimensions.

    Raises:
        RuntimeError: a number of dimensions for which torch.nn raises. If torch.nn warns of it, so does this.
    """
    return (_shape1d, _shape2d, _shape3d)[spatial - 1](input)


def _drop_channels(
    spatial: int,
    input: Tensor,
    p: Any,
    training: bool,
    inplace: bool,
    keep_prob: Any,
    generator: torch.Generator | None,
    inverted: bool,
) -> Tensor:
    """Drops channels, for all three forms. These differ in the way they read an input's shape."""
    rate, name = as_rate(p, keep_prob, formula_of(inverted)), f"dropout{spatial}d"
    training = training or sites.is_on(training)
    whole = undrawn(input, rate, inplace) if training else None
    if whole is None and (training or not isinstance(input, Tensor)):
        check_input(input, name, complex_too=True)
    shape = channel_shape(input, spatial)
    if whole is not None:
        return whole
    if not training:
        return eval_form(input, rate, inverted, inplace)
    check_channels(input, least=1 if spatial == 3 else 2)
    if not inplace and generator is None and inverted and not is_compiling() and rate.params is not None:
        out = fast_channel_dropout(input, rate.params, shape)
        if out is not None:
            return out
    return masked(input, rate, inverted, shape, inplace, generator)


def dropout1d(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """Applies `dropout` to whole channels of (N, C, L) or (C, L): one draw for each channel of each sample.

    The definition, the expectation and the arguments are those of `dropout`.

    Raises:
        RuntimeError: the input has neither 2 nor 3 dimensions.

    References:
        Tompson et al., CVPR 2015 (arXiv:1411.4280), section 3.2.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.functional.dropout1d(torch.ones(4, 8, 16), 0.25)
        >>> torch.equal(y, y[:, :, :1].expand_as(y))
        True
    """
    if isinstance(input, Proxy):
        return recorded(dropout1d, locals())
    return _drop_channels(1, input, p, training, inplace, keep_prob, generator, inverted)


def dropout2d(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """Applies `dropout` to whole channels of (N, C, H, W): one draw for each channel of each sample.

    The definition, the expectation and the arguments are those of `dropout`. Inputs of other ranks are taken as
    torch.nn.functional.dropout2d takes them, with its warnings: the first two dimensions are sample and channel.

    Raises:
        RuntimeError: the input has fewer than 2 dimensions.

    References:
        Tompson et al., CVPR 2015 (arXiv:1411.4280), section 3.2.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.functional.dropout2d(torch.ones(4, 8, 5, 5), 0.25)
        >>> torch.equal(y, y[:, :, :1, :1].expand_as(y))
        True
    """
    if isinstance(input, Proxy):
        return recorded(dropout2d, locals())
    return _drop_channels(2, input, p, training, inplace, keep_prob, generator, inverted)


def dropout3d(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """Applies `dropout` to whole channels of (N, C, D, H, W) or (C, D, H, W): one draw for each channel of each sample.

    The definition, the expectation and the arguments are those of `dropout`. Inputs of other ranks are taken as
    torch.nn.functional.dropout3d takes them, with its warning: as one sample, whose first dimension is the channel.

    Raises:
        RuntimeError: the input is a scalar.

    References:
        Tompson et al., CVPR 2015 (arXiv:1411.4280), section 3.2.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.functional.dropout3d(torch.ones(4, 8, 3, 3, 3), 0.25)
        >>> torch.equal(y, y[:, :, :1, :1, :1].expand_as(y))
        True
    """
    if isinstance(input, Proxy):
        return recorded(dropout3d, locals())
    return _drop_channels(3, input, p, training, inplace, keep_prob, generator, inverted)


class Dropout1d(Formulated, nn.Dropout1d):
    """Module of `dropout1d`: whole channels of (N, C, L) or (C, L). A drop-in for torch.nn.Dropout1d.

    See `Dropout` for the arguments and `dropout1d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout1d(0.25)(torch.ones(4, 8, 16))
        >>> torch.equal(y, y[:, :, :1].expand_as(y))
        True
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return dropout1d(
            input, self.rate, self.training, self.inplace, generator=self.generator, inverted=self.inverted
        )


class Dropout2d(Formulated, nn.Dropout2d):
    """Module of `dropout2d`: whole channels of (N, C, H, W). A drop-in for torch.nn.Dropout2d.

    See `Dropout` for the arguments and `dropout2d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout2d(keep_prob=0.75)(torch.ones(4, 8, 5, 5))
        >>> torch.equal(y, y[:, :, :1, :1].expand_as(y))
        True
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return dropout2d(
            input, self.rate, self.training, self.inplace, generator=self.generator, inverted=self.inverted
        )


class Dropout3d(Formulated, nn.Dropout3d):
    """Module of `dropout3d`: whole channels of (N, C, D, H, W) or (C, D, H, W). A drop-in for torch.nn.Dropout3d.

    See `Dropout` for the arguments and `dropout3d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout3d(0.25)(torch.ones(4, 8, 3, 3, 3))
        >>> torch.equal(y, y[:, :, :1, :1, :1].expand_as(y))
        True
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return dropout3d(
            input, self.rate, self.training, self.inplace, generator=self.generator, inverted=self.inverted
        )

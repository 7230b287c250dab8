"""Dropout of whole channels: `dropout1d`, `dropout2d`, `dropout3d` and their modules.

The map of `dropout` with a mask that is shared over the spatial axes: one draw for each channel of each sample
(Tompson et al., CVPR 2015).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..core.exported import is_exporting
from ..core.rate import DEFAULT_P, Rate, apply, check_input, law_for, read_rate, turned_on, undrawn
from ..core.symbolic import called, recorded
from ..core.torch_state import is_compiling
from ..kernels.law import Law, law
from ..ops import operators
from ..ops.fast_path import fast_channel_dropout
from .dropout import Bernoulli, eval_form, exported_original, formula_of


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
        _warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior is "
            "desired - input is interpreted as shape (N, C, L). torch.nn announces that this will become (C, H, W): "
            "use dropout1d to keep the present meaning, or dropout with shared_axes to be explicit"
        )
    return (*input.shape[:2], *[1] * (dims - 2))


def _shape3d(input: Tensor) -> tuple[int, ...]:
    dims = input.dim()
    if dims not in (4, 5):
        _warn_dimensions("dropout3d", dims, "(N, C, D, H, W) or (C, D, H, W)")
    channels = 2 if dims == 5 else 1
    return (*input.shape[:channels], *[1] * (dims - channels))


def _warn_dimensions(name: str, dims: int, usual: str) -> None:
    _warn(
        f"{name}: Received a {dims}-D input to {name}, which is deprecated and will result in an error in a future "
        f"release of torch.nn. {name} drops whole channels of {usual}: use dropout with shared_axes for other shapes",
        stacklevel=7,
    )


@torch.compiler.assume_constant_result
def _warn(message: str, stacklevel: int = 6) -> None:
    """Compiled code warns once, while it is compiled: Dynamo does not enter what Python warns with."""
    warnings.warn(message, stacklevel=stacklevel)


def check_channels(input: Tensor, least: int = 2) -> None:
    """Raises RuntimeError, with torch.nn's text, if the input has too few dimensions for channels."""
    if input.dim() < least:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")


def _drop_channels(
    shape_of: Callable[[Tensor], tuple[int, ...]],
    input: Tensor,
    keep_prob: Rate,
    law_of: Callable[[tuple[int, ...]], Law | Tensor],
    number: Law | None,
    training: bool,
    inplace: bool,
    generator: torch.Generator | None,
    inverted: bool,
) -> Tensor:
    """What the three channel forms share; they differ in how they read an input's shape."""
    name = f"dropout{shape_of.__name__[-2:]}"
    training = training or turned_on()
    whole = undrawn(input, keep_prob, inplace) if training else None
    if whole is None and (training or not isinstance(input, Tensor)):
        check_input(input, name)
    shape = shape_of(input)
    if whole is not None:
        return whole
    if not training:
        return eval_form(input, keep_prob, inverted, inplace)
    check_channels(input, least=1 if shape_of is _shape3d else 2)
    if number is not None and not inplace and generator is None and inverted and not is_compiling():
        out = fast_channel_dropout(input, number, shape)
        if out is not None:
            return out
    if not inverted and is_exporting():
        return exported_original(input, keep_prob, law_of(shape), shape, inplace, generator)
    return apply(operators.masked, input, law_of(shape), shape, inplace, generator)


def dropout1d(
    input: Tensor,
    p: Any = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Any = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """`dropout` of whole channels of (N, C, L) or (C, L): one draw for each channel of each sample.

    The definition, what it preserves and the arguments are those of `dropout`.

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
    return _channels(_shape1d, input, p, training, inplace, keep_prob, generator, inverted)


def dropout2d(
    input: Tensor,
    p: Any = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Any = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """`dropout` of whole channels of (N, C, H, W): one draw for each channel of each sample.

    The definition, what it preserves and the arguments are those of `dropout`. Inputs of other ranks are taken as
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
    return _channels(_shape2d, input, p, training, inplace, keep_prob, generator, inverted)


def dropout3d(
    input: Tensor,
    p: Any = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Any = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """`dropout` of whole channels of (N, C, D, H, W) or (C, D, H, W): one draw for each channel of each sample.

    The definition, what it preserves and the arguments are those of `dropout`. Inputs of other ranks are taken as
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
    return _channels(_shape3d, input, p, training, inplace, keep_prob, generator, inverted)


def _channels(
    shape_of: Callable[[Tensor], tuple[int, ...]],
    input: Tensor,
    p: Any,
    training: bool,
    inplace: bool,
    keep_prob: Any,
    generator: torch.Generator | None,
    inverted: bool,
) -> Tensor:
    k, _ = read_rate(p, keep_prob)
    return _drop_channels(
        shape_of,
        input,
        k,
        lambda shape: law_for(k, formula_of(inverted), shape),
        None if isinstance(k, Tensor) or is_compiling() else law(k),
        training,
        inplace,
        generator,
        inverted,
    )


class _ChannelDropout(Bernoulli):
    _shape_of: Callable[[Tensor], tuple[int, ...]]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return called(_ChannelDropout, self, input)
        return _drop_channels(
            self._shape_of, input, self._keep_prob, self._law_for, self._law, self.training, self.inplace,
            self.generator, self.inverted,
        )  # fmt: skip


class Dropout1d(_ChannelDropout, nn.Dropout1d):
    """Module of `dropout1d`: whole channels of (N, C, L) or (C, L). A drop-in for torch.nn.Dropout1d.

    See `Dropout` for the arguments and `dropout1d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout1d(0.25)(torch.ones(4, 8, 16))
        >>> torch.equal(y, y[:, :, :1].expand_as(y))
        True
    """

    _shape_of = staticmethod(_shape1d)


class Dropout2d(_ChannelDropout, nn.Dropout2d):
    """Module of `dropout2d`: whole channels of (N, C, H, W). A drop-in for torch.nn.Dropout2d.

    See `Dropout` for the arguments and `dropout2d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout2d(keep_prob=0.75)(torch.ones(4, 8, 5, 5))
        >>> torch.equal(y, y[:, :, :1, :1].expand_as(y))
        True
    """

    _shape_of = staticmethod(_shape2d)


class Dropout3d(_ChannelDropout, nn.Dropout3d):
    """Module of `dropout3d`: whole channels of (N, C, D, H, W) or (C, D, H, W). A drop-in for torch.nn.Dropout3d.

    See `Dropout` for the arguments and `dropout3d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout3d(0.25)(torch.ones(4, 8, 3, 3, 3))
        >>> torch.equal(y, y[:, :, :1, :1, :1].expand_as(y))
        True
    """

    _shape_of = staticmethod(_shape3d)

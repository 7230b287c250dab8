"""Dropout and the addition of a residual in one pass, with a bias before it: `dropout_add`, `bias_dropout_add`.

With k the keep probability and m a mask whose elements are 1 with probability k, independently,

    y = r + m x / k             in training, so E[y] = r + x
    y = r + m (x + b) / k       with a bias b
    y = r + x, r + (x + b)      in eval mode

Under one key they equal the plain parts one after another, with one rounding at the end for half types.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import sites
from ..core.fused import dropped, unchanged
from ..core.inputs import check_input
from ..core.rate import DEFAULT_P, Probability, Rate, Rated, as_rate
from ..core.symbolic import leaf, recorded
from ..core.torch_state import is_compiling
from ..kernels.masking import SERVED
from ..ops import fused
from ..ops.fast_path import fast_dropout_add


def _check_beside(name: str, role: str, tensor: Any, input: Tensor) -> None:
    """Refuses a tensor that cannot be added to the input.

    Raises:
        TypeError: it is no tensor, or has another layout than strided.
        RuntimeError: it is on another device, with the start of torch's message.
        ValueError: it has another dtype, and autocast is off or has none that is wider.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {role} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: {role} must be a strided tensor, got the layout {tensor.layout}")
    if tensor.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got {role} on {tensor.device} for an input on "
            f"{input.device}: move it with {role}.to({str(input.device)!r})"
        )
    if tensor.dtype not in SERVED:
        raise ValueError(
            f"{name}: {role} must have the input's dtype {input.dtype}, got {tensor.dtype}: convert it with "
            f"{role}.to({input.dtype})"
        )
    if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise ValueError(
            f"{name}: {role} must have the input's dtype {input.dtype}, got {tensor.dtype}: convert one of them, or "
            "use torch.autocast, under which both are brought to the wider one"
        )


def _checked(name: str, input: Any, bias: Any, residual: Any, with_bias: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns input, bias and residual in one dtype."""
    check_input(input, name)
    _check_beside(name, "residual", residual, input)
    if residual.shape != input.shape:
        raise ValueError(
            f"{name}: residual must have the input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    wide = torch.promote_types(input.dtype, residual.dtype)
    if not with_bias:
        return input.to(wide), None, residual.to(wide)
    _check_beside(name, "bias", bias, input)
    sizes = input.shape[input.dim() - bias.dim() :] if bias.dim() <= input.dim() else None
    if sizes is None or any(size != 1 and size != full for size, full in zip(bias.shape, sizes, strict=True)):
        raise ValueError(
            f"{name}: bias must broadcast against the input's shape {tuple(input.shape)}, got {tuple(bias.shape)}"
        )
    wide = torch.promote_types(wide, bias.dtype)
    return input.to(wide), bias.to(wide), residual.to(wide)


def _add(
    name: str,
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    rate: Rate,
    training: bool,
    generator: torch.Generator | None,
) -> Tensor:
    with_bias = name == "bias_dropout_add"
    plain = training and generator is None and (bias is not None or not with_bias)
    if plain and not is_compiling() and rate.params is not None:
        out = fast_dropout_add(input, bias, residual, rate.params)
        if out is not None:
            return out
    input, bias, residual = _checked(name, input, bias, residual, with_bias)
    if not (training or sites.is_on(training)):
        return fused.composed_add(input, bias, residual, unchanged)
    params = rate.params_for(input.shape)
    return dropped(
        input,
        params,
        generator,
        lambda key: fused.dropout_add(input, bias, residual, key, params),
        lambda drop: fused.composed_add(input, bias, residual, drop),
    )


def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Applies dropout and a residual addition in one pass: ``y = residual + m input / k``; E[y] = residual + input.

    m ~ Bernoulli(k), k = keep_prob = 1 - p, as in `dropout`, with the same mask under the same key. In eval mode and
    with k = 1 it is ``residual + input``, with k = 0 the residual. Where an element is dropped, y is the residual, also
    where the input is infinite or NaN. The gradient of the residual is that of the output itself, and backward keeps
    only the key.

    Args:
        input: the tensor whose elements are dropped, of any shape: float16, bfloat16, float32 or float64.
        residual: the tensor to add, of the input's shape, dtype and device. Under torch.autocast both are converted to
            the wider of their dtypes.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A new tensor of the input's shape and dtype. For half types the arithmetic is in float32, rounded once.

    Raises:
        ValueError: a rate outside [0, 1], or a residual of another shape or dtype.
        TypeError: both names of the rate, or something that is no number or no tensor.
        RuntimeError: an integer tensor, or tensors on different devices.

    References:
        He et al., Deep residual learning, CVPR 2016; Vaswani et al., 2017, section 5.4: dropout of each sub-layer's
        output before it is added.

    Example:
        >>> import torch, torchdrop
        >>> x, residual = torch.ones(1000), torch.full((1000,), 3.0)
        >>> torchdrop.functional.dropout_add(x, residual, keep_prob=0.8).unique()
        tensor([3.0000, 4.2500])
    """
    if isinstance(input, Proxy) or isinstance(residual, Proxy):
        return recorded(dropout_add, locals())
    return _add("dropout_add", input, None, residual, as_rate(p, keep_prob), training, generator)


def bias_dropout_add(
    input: Tensor,
    bias: Tensor,
    residual: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Applies a bias, dropout and a residual addition in one pass: ``y = residual + m (input + bias) / k``.

    E[y] = residual + input + bias; otherwise as `dropout_add`. It is for a linear layer that leaves its bias to this.

    Args:
        input: the tensor whose elements are dropped, of any shape: float16, bfloat16, float32 or float64.
        bias: broadcasts against the input; of shape (F,) for an input (..., F) it costs no pass of its own.
        residual: the tensor to add, of the input's shape, dtype and device. Under torch.autocast all three are
            converted to the widest of their dtypes.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A new tensor of the input's shape and dtype. For half types the arithmetic is in float32, rounded once.

    Raises:
        ValueError: a rate outside [0, 1], a residual of another shape, a bias that does not broadcast, or another
            dtype.
        TypeError: both names of the rate, or something that is no number or no tensor.
        RuntimeError: an integer tensor, or tensors on different devices.

    References:
        Shoeybi et al., Megatron-LM, 2019 (arXiv:1909.08053), which fuses the same three.

    Example:
        >>> import torch, torchdrop
        >>> x, bias, residual = torch.ones(100, 4), torch.ones(4), torch.zeros(100, 4)
        >>> torchdrop.functional.bias_dropout_add(x, bias, residual, 0.5).unique()
        tensor([0., 4.])
    """
    if isinstance(input, Proxy) or isinstance(bias, Proxy) or isinstance(residual, Proxy):
        return recorded(bias_dropout_add, locals())
    return _add("bias_dropout_add", input, bias, residual, as_rate(p, keep_prob), training, generator)


class DropoutAdd(Rated):
    """Module of `dropout_add`: ``y = residual + m input / k`` in training, ``residual + input`` in eval mode.

    Args:
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input, residual and output: any shape, the same for all. No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, neither, or something that is no number.

    References:
        See `dropout_add`.

    Example:
        >>> import torch, torchdrop
        >>> layer, x = torchdrop.DropoutAdd(0.1), torch.randn(8, 16)
        >>> torch.equal(layer.eval()(x, x), x + x)
        True
    """

    @leaf
    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return dropout_add(input, residual, self.rate, self.training, generator=self.generator)


class BiasDropoutAdd(Rated):
    """Module of `bias_dropout_add`: ``y = residual + m (input + bias) / k`` in training, without m / k in eval mode.

    The bias is given at each call, as a parameter of the layer before, so that nothing is in the state_dict.

    Args:
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input, residual and output: any shape, the same for all. Bias: broadcasts against it.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, neither, or something that is no number.

    References:
        See `bias_dropout_add`.

    Example:
        >>> import torch, torchdrop
        >>> layer, x, linear = torchdrop.BiasDropoutAdd(0.1), torch.randn(8, 16), torch.nn.Linear(16, 16)
        >>> y = layer(x @ linear.weight.T, linear.bias, x)
        >>> torch.allclose(layer.eval()(x @ linear.weight.T, linear.bias, x), linear(x) + x, atol=1e-6)
        True
    """

    @leaf
    def forward(self, input: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_add(input, bias, residual, self.rate, self.training, generator=self.generator)

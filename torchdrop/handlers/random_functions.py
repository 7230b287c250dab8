"""The functions of torch and of torchdrop that draw, described one by one: a model's randomness comes from them.

A function mode sees each call of them. `DESCRIBE` turns a call into a `RandomCall`: its draws, and the ways to make it
as it is, without its randomness, and with masks of ours. Layers of other packages (DropPath, StochasticDepth,
LayerDrop, StableDropout) draw with torch.rand, bernoulli_ and the like, so they are seen as well.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..core import sites
from ..kernels.mask_params import ONE, MaskParams
from ..ops import operators, random_bits
from . import random_tensors as tensors
from .calls import Mode, RandomCall, Slot
from .masks import MaskSlot, written


def _is_on(training: bool, p: Any) -> bool:
    return bool(training) and (isinstance(p, Tensor) or p > 0)


def _dropout(
    kind: str, twin: Callable[..., Tensor], inplace: bool = False, training: bool = True
) -> Callable[..., RandomCall]:
    """Describes torch's dropout functions, each served by torchdrop's function of the same name.

    `inplace` and `training` are the function's own defaults.
    """

    def describe(
        mode: Mode,
        func: Any,
        input: Tensor,
        p: float = 0.5,
        training: bool = training,
        inplace: bool = inplace,
        *,
        train: bool | None = None,
    ) -> RandomCall:
        training = training if train is None else train  # torch.dropout calls it `train`
        extra = {"inplace": inplace} if isinstance(func, types.FunctionType) else {}
        return RandomCall(
            kind,
            p,
            _is_on(training, p),
            input.shape,
            original=lambda: func(input, p, training, **extra),
            plain=lambda: func(input, p, False, **extra),
            served=lambda slot, rate: mode.layer(slot, twin, input, rate, inplace),
            at=lambda rate: func(input, rate, training, **extra),
            training=training,
        )

    return describe


def _feature_dropout(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    return functional.dropout(input, p, training, inplace, shared_axes=tuple(range(2, input.dim())))


def _layer(
    mode: Mode,
    func: Any,
    operator: operators.Operator,
    input: Tensor,
    given: MaskParams | Tensor,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
) -> RandomCall:
    """Describes a layer or function of torchdrop."""
    rate = 1.0 - given.threshold / ONE if isinstance(given, MaskParams) else None
    if operator is operators.gaussian and isinstance(given, MaskParams):
        rate = given.scale**2 / (1.0 + given.scale**2)
    return RandomCall(
        "torchdrop",
        rate,
        rate != 0.0,
        input.shape,
        original=lambda: func(operator, input, given, shape, inplace, generator),
        plain=lambda: input,
        served=lambda slot, _: slot.apply(operator, input, given, shape, inplace),
        mask=shape,
    )


def _numbers(
    mode: Mode,
    func: Any,
    numbers: random_bits.Numbers,
    like: Tensor,
    shape: Sequence[int],
    generator: torch.Generator | None,
    given: MaskParams | Tensor | None,
) -> RandomCall:
    """Describes the numbers from which a layer or function of torchdrop makes a mask of its own, if `is_on` says so."""
    rate = 1.0 - given.threshold / ONE if isinstance(given, MaskParams) else None

    def original() -> Tensor:
        return func(numbers, like, shape, generator, given)

    def served(slot: Slot, _: Any) -> Tensor:
        return cast(MaskSlot, slot).numbers(numbers, shape, given)

    return RandomCall("torchdrop", rate, rate != 0.0, shape, original, original, served)


def _attention(
    mode: Mode,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> RandomCall:
    """Describes dropout of attention weights. The rate is 0 in eval mode, so the one seen in train mode is used."""

    def call(p: float) -> Tensor:
        return func(query, key, value, attn_mask, p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def served(slot: Slot, rate: float) -> Tensor:
        how = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return slot.attention(rate, query, key, value, **how)

    shape = (*query.shape[:-1], key.shape[-2])
    return RandomCall(
        "attention",
        dropout_p,
        _is_on(True, dropout_p),
        shape,
        original=lambda: call(dropout_p),
        plain=lambda: call(0.0),
        served=served,
        at=call,
    )


def _recurrent(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> RandomCall:
    """Describes the dropout between the layers of nn.LSTM, nn.GRU and nn.RNN: it is served one layer at a time.

    (input, hx, weights, biases, layers, p, train, bidirectional, batch_first), or, for packed sequences,
    (data, batch_sizes, hx, weights, biases, layers, p, train, bidirectional).
    """
    packed = isinstance(args[3], (tuple, list))
    head, (hx, weights, biases, layers, p, _, bidirectional, *rest) = args[: 1 + packed], args[1 + packed :]
    at = 6 + packed

    def call(rate: float, train: bool) -> Any:
        return func(*args[: at - 1], rate, train, *args[at + 1 :], **kwargs)

    def served(slot: Slot, rate: float) -> Any:
        states = hx if isinstance(hx, (tuple, list)) else (hx,)
        directions, per_layer = 1 + bool(bidirectional), len(weights) // layers
        turned, finals = bool(rest and rest[0]), []  # of rows first; a layer has time first, and would turn it back

        def dropped(data: Tensor, own: Slot) -> Tensor:
            rows = data.transpose(0, 1) if turned and slot.by_rows else data
            out = own.apply(operators.masked, rows, slot.params(rate, rows.shape), rows.shape, False)
            return out if rows is data else out.transpose(0, 1)

        data = head[0].transpose(0, 1) if turned else head[0]
        for layer in range(layers):
            if layer:
                data = dropped(data, slot.another(layer - 1))
            start = [h[layer * directions : (layer + 1) * directions] for h in states]
            first = type(hx)(start) if isinstance(hx, (tuple, list)) else start[0]
            own = weights[layer * per_layer : (layer + 1) * per_layer]
            time_first = [False] if rest else []
            data, *final = func(data, *head[1:], first, own, biases, 1, 0.0, args[at], bidirectional, *time_first)
            finals.append(final)
        return (data.transpose(0, 1) if turned else data, *(torch.cat(parts) for parts in zip(*finals, strict=True)))

    return RandomCall(
        func.__name__.split("_")[0],
        p,
        _is_on(args[at], p) and layers > 1,
        None,
        original=lambda: call(p, args[at]),
        plain=lambda: call(p, False),
        served=served,
        at=lambda rate: call(rate, args[at]),
        training=args[at] and layers > 1,
        is_split=True,
        draws=layers - 1,
        loose="the elements of a packed sequence have other places in another batch" if packed else "",
    )


def _rrelu(
    mode: Mode,
    func: Any,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> RandomCall:
    extra = {"inplace": inplace} if func is F.rrelu else {}

    def served(slot: Slot, _: float) -> Tensor:
        slope = slot.uniform(input) * (upper - lower) + lower
        out = torch.where(input < 0, input * slope, input)
        return written(input, out) if inplace else out

    return RandomCall(
        "rrelu",
        None,
        training,
        input.shape,
        original=lambda: func(input, lower, upper, training, **extra),
        plain=lambda: func(input, lower, upper, False, **extra),
        served=served,
    )


def describe_other(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> RandomCall:
    """Describes random functions that keep torch's own numbers: they draw, but depend on how the samples are run."""

    def original() -> Any:
        return func(*args, **kwargs)

    name = getattr(func, "__name__", "other").strip("_")
    return RandomCall(
        name, None, True, None, original, original, None, flagged=True, loose="torch's own numbers, drawn in one go"
    )


_T = Tensor

RATED = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout",
    "attention", "lstm", "gru", "rnn",
)  # fmt: skip
"""The kinds of calls that are given a rate."""

RECURRENT = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))

DESCRIBE: dict[Any, Callable[..., RandomCall]] = {
    sites.apply: _layer,
    sites.draw: _numbers,
    F.dropout: _dropout("dropout", functional.dropout),
    F.dropout1d: _dropout("dropout1d", functional.dropout1d),
    F.dropout2d: _dropout("dropout2d", functional.dropout2d),
    F.dropout3d: _dropout("dropout3d", functional.dropout3d),
    F.alpha_dropout: _dropout("alpha_dropout", functional.alpha_dropout, training=False),
    F.feature_alpha_dropout: _dropout("feature_alpha_dropout", functional.feature_alpha_dropout, training=False),
    torch.dropout: _dropout("dropout", functional.dropout),
    torch.dropout_: _dropout("dropout", functional.dropout, inplace=True),
    torch.feature_dropout: _dropout("feature_dropout", _feature_dropout),
    torch.feature_dropout_: _dropout("feature_dropout", _feature_dropout, inplace=True),
    torch.alpha_dropout: _dropout("alpha_dropout", functional.alpha_dropout),
    torch.alpha_dropout_: _dropout("alpha_dropout", functional.alpha_dropout, inplace=True),
    torch.feature_alpha_dropout: _dropout("feature_alpha_dropout", functional.feature_alpha_dropout),
    torch.feature_alpha_dropout_: _dropout("feature_alpha_dropout", functional.feature_alpha_dropout, inplace=True),
    F.scaled_dot_product_attention: _attention,
    functional.scaled_dot_product_attention: _attention,
    **dict.fromkeys(RECURRENT, _recurrent),
    F.rrelu: _rrelu,
    torch.rrelu: _rrelu,
    torch.rrelu_: functools.partial(_rrelu, inplace=True),
    torch.bernoulli: tensors.random_tensor("bernoulli", tensors.empty_like, tensors.from_probabilities),
    _T.bernoulli: tensors.random_tensor("bernoulli", tensors.empty_like, tensors.from_probabilities),
    _T.bernoulli_: tensors.random_tensor("bernoulli", tensors.empty_like, tensors.bernoulli_values, inplace=True),
    torch.rand: tensors.random_tensor("uniform", torch.empty, tensors.unit_values),
    torch.rand_like: tensors.random_tensor("uniform", tensors.empty_like, tensors.unit_values),
    _T.uniform_: tensors.random_tensor("uniform", tensors.empty_like, tensors.uniform_values, inplace=True),
    torch.randn: tensors.random_tensor("normal", torch.empty, tensors.standard_values),
    torch.randn_like: tensors.random_tensor("normal", tensors.empty_like, tensors.standard_values),
    torch.normal: tensors.random_tensor("normal", tensors.normal_target, tensors.parted_values),
    _T.normal_: tensors.random_tensor("normal", tensors.empty_like, tensors.normal_values, inplace=True),
    _T.exponential_: tensors.random_tensor("exponential", tensors.empty_like, tensors.exponential_values, inplace=True),
    **dict.fromkeys(
        (
            torch.native_dropout, torch.randint, torch.randint_like, torch.randperm, torch.multinomial,
            torch.poisson, torch.binomial, _T.random_, _T.multinomial, _T.geometric_, _T.cauchy_, _T.log_normal_,
        ),
        describe_other,
    ),
}  # fmt: skip
"""The functions that draw, each with a function that describes a call of it."""


def _opened(function: Any) -> Callable[..., Any]:
    """Copies a Python function of torch, so that function modes see not the copy but the calls inside it."""
    names = {name: (lambda *_: False) for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


OPENED = {function: _opened(function) for function in (F.multi_head_attention_forward, F.gumbel_softmax)}
"""Functions of torch that draw by calling others."""

"""What in a model is random: the functions of torch and of torchdrop that draw, described one by one.

A function mode sees each call of them. `DESCRIBE` turns a call into a `Draw`: what it would draw, how it is made as it
stands, without its randomness, and with masks of ours. Layers of other packages (DropPath, StochasticDepth, LayerDrop,
StableDropout) draw with torch.rand, bernoulli_ and the like, so they are seen as well.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..kernels import operators
from ..kernels.law import ONE, Law, law, threshold
from ..layers import _rate
from .masks import Slot, written


class Site(NamedTuple):
    """A call in the model: the module that makes it, what it is, and its number among such calls in one forward."""

    module: str
    kind: str
    number: int


@dataclass
class Draw:
    """One call of a random function.

    Args:
        kind: the word for it in reports.
        rate: the probability of dropping, or None where there is none.
        on: whether the call as made draws anything.
        shape: of the tensor that is dropped from or drawn; None if only the result tells.
        mask: the shape of its mask, if it is another.
        original: makes the call as it stands.
        plain: makes it without randomness.
        served: makes it with masks from a slot, at a rate; None where that is impossible.
        flagged: whether the module's own code decides from its training flag if this is called or used.
        draws: how many random draws it stands for.
        loose: why its draws depend on the batch, if they do.
    """

    kind: str
    rate: float | None
    on: bool
    shape: Sequence[int] | None
    original: Callable[[], Any]
    plain: Callable[[], Any]
    served: Callable[[Any, float], Any] | None
    mask: Sequence[int] | None = None
    flagged: bool = False
    draws: int = 1
    loose: str = ""


def _is_on(training: bool, p: Any) -> bool:
    return bool(training) and (isinstance(p, Tensor) or p > 0)


Mode = Any
"""The function mode that asks; `inside(slot)` makes torchdrop's next layer take its mask from a slot."""


def _dropout(kind: str, twin: Callable[..., Tensor], inplace: bool = False) -> Callable[..., Draw]:
    """Torch's dropout functions, each served by torchdrop's function of the same name."""

    def describe(
        mode: Mode,
        func: Any,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = inplace,
        *,
        train: bool | None = None,
    ) -> Draw:
        training = training if train is None else train  # torch.dropout's own name
        extra = {"inplace": inplace} if isinstance(func, types.FunctionType) else {}

        def served(slot: Slot, rate: float) -> Tensor:
            with mode.inside(slot):
                return twin(input, rate, True, inplace)

        return Draw(
            kind,
            p,
            _is_on(training, p),
            input.shape,
            original=lambda: func(input, p, training, **extra),
            plain=lambda: func(input, p, False, **extra),
            served=served,
        )

    return describe


def _feature_dropout(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    return functional.dropout(input, p, training, inplace, shared_axes=tuple(range(2, input.dim())))


def _layer(
    mode: Mode,
    func: Any,
    operator: operators.Operator,
    input: Tensor,
    given: Law | Tensor,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
) -> Draw:
    """A layer or function of torchdrop."""
    rate = 1.0 - given.threshold / ONE if isinstance(given, Law) else None
    if operator is operators.gaussian and isinstance(given, Law):
        rate = given.scale**2 / (1.0 + given.scale**2)
    return Draw(
        "torchdrop",
        rate,
        rate != 0.0,
        input.shape,
        original=lambda: func(operator, input, given, shape, inplace, generator),
        plain=lambda: input,
        served=lambda slot, _: slot.apply(operator, input, given, shape, inplace),
        mask=shape,
    )


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
) -> Draw:
    """Dropout of attention weights. The rate is 0 in eval mode, so the one seen in train mode is used."""

    def call(p: float) -> Tensor:
        return func(query, key, value, attn_mask, p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def served(slot: Slot, rate: float) -> Tensor:
        keys, values = key, value
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            keys, values = (t.repeat_interleave(groups, -3) for t in (key, value))
        scores = query @ keys.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
        weights = _softmax(scores, attn_mask, is_causal)
        return slot.apply(operators.masked, weights, law(1.0 - rate), weights.shape, False) @ values

    shape = (*query.shape[:-1], key.shape[-2])
    return Draw(
        "attention",
        dropout_p,
        dropout_p > 0,
        shape,
        original=lambda: call(dropout_p),
        plain=lambda: call(0.0),
        served=served,
    )


def _softmax(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention weights; 0 for a query that may see no key, as scaled_dot_product_attention has it."""
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _recurrent(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Draw:
    """The dropout between the layers of nn.LSTM, nn.GRU and nn.RNN: served by running one layer at a time.

    (input, hx, weights, biases, layers, p, train, bidirectional, batch_first), or, for packed sequences,
    (data, batch_sizes, hx, weights, biases, layers, p, train, bidirectional).
    """
    packed = isinstance(args[3], tuple | list)
    head, (hx, weights, biases, layers, p, _, bidirectional, *rest) = args[: 1 + packed], args[1 + packed :]
    at = 6 + packed

    def call(train: bool) -> Any:
        return func(*args[:at], train, *args[at + 1 :], **kwargs)

    def served(slot: Slot, rate: float) -> Any:
        states = hx if isinstance(hx, tuple | list) else (hx,)
        directions, per_layer = 1 + bool(bidirectional), len(weights) // layers
        data, finals = head[0], []
        for layer in range(layers):
            if layer:
                data = slot.apply(operators.masked, data, law(1.0 - rate), data.shape, False)
            start = [h[layer * directions : (layer + 1) * directions] for h in states]
            first = type(hx)(start) if isinstance(hx, tuple | list) else start[0]
            own = weights[layer * per_layer : (layer + 1) * per_layer]
            data, *final = func(data, *head[1:], first, own, biases, 1, 0.0, False, bidirectional, *rest)
            finals.append(final)
        return (data, *(torch.cat(parts) for parts in zip(*finals, strict=True)))

    return Draw(
        func.__name__.split("_")[0],
        p,
        _is_on(args[at], p) and layers > 1,
        None,
        original=lambda: call(args[at]),
        plain=lambda: call(False),
        served=served,
        draws=layers - 1,
        loose="the elements of a packed sequence have other places in another batch" if packed else "",
    )


def _raw(
    kind: str, make: Callable[..., Tensor], values: Callable[..., Tensor], inplace: bool = False
) -> Callable[..., Draw]:
    """Random tensors. `make` gives an empty one for the same arguments, `values` what is drawn into it."""

    def describe(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Draw:
        def original() -> Any:
            return func(*args, **kwargs)

        sized = {name: value for name, value in kwargs.items() if name != "generator"}
        target = args[0] if inplace else make(*args, **sized)
        parameters = args[1:] if inplace else args
        named = {name: value for name, value in sized.items() if name in ("p", "from", "to", "mean", "std", "lambd")}

        def served(slot: Slot, _: float) -> Tensor:
            drawn = values(slot, target, *parameters, **named)
            return written(target, drawn) if inplace else drawn

        return Draw(
            kind, _rate_of(kind, parameters, named), True, target.shape, original, original, served, flagged=True
        )

    return describe


def _rate_of(kind: str, parameters: Sequence[Any], named: dict[str, Any]) -> float | None:
    p = named.get("p", parameters[0] if parameters else None)
    return 1.0 - p if kind == "bernoulli" and isinstance(p, float | int) else None


def _bernoulli_values(slot: Slot, target: Tensor, p: Any = 0.5) -> Tensor:
    words = slot.words(target.shape)
    below = (p.to(torch.float64) * ONE).round().to(torch.int64) if isinstance(p, Tensor) else threshold(float(p))
    return (words < below).to(target.dtype)


def _uniform_values(slot: Slot, target: Tensor, *limits: Any, **named: Any) -> Tensor:
    low = limits[0] if limits else named.get("from", 0.0)
    high = limits[1] if len(limits) > 1 else named.get("to", 1.0)
    return slot.uniform(target.shape, target.dtype) * (high - low) + low


def _unit_values(slot: Slot, target: Tensor, *_: Any, **__: Any) -> Tensor:
    return slot.uniform(target.shape, target.dtype)


def _normal_values(slot: Slot, target: Tensor, mean: Any = 0.0, std: Any = 1.0) -> Tensor:
    return slot.normal(target.shape, target.dtype) * std + mean


def _normal_target(mean: Any, std: Any = 1.0, size: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
    if size is not None:
        return torch.empty(size, **kwargs)
    return torch.empty_like(torch.add(mean, std))


def _parted_values(slot: Slot, target: Tensor, mean: Any, std: Any = 1.0, *_: Any, **__: Any) -> Tensor:
    return _normal_values(slot, target, mean, std)


def _standard_values(slot: Slot, target: Tensor, *_: Any, **__: Any) -> Tensor:
    return slot.normal(target.shape, target.dtype)


def _exponential_values(slot: Slot, target: Tensor, lambd: float = 1.0) -> Tensor:
    return -torch.log1p(-slot.uniform(target.shape, target.dtype)) / lambd


def _from_probabilities(slot: Slot, target: Tensor, input: Tensor, p: Any = None, **_: Any) -> Tensor:
    return _bernoulli_values(slot, target, input if p is None else p)


def _like(input: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(input, **{name: value for name, value in kwargs.items() if name != "p"})


def _rrelu(
    mode: Mode,
    func: Any,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Draw:
    extra = {"inplace": inplace} if func is F.rrelu else {}

    def served(slot: Slot, _: float) -> Tensor:
        slope = slot.uniform(input.shape, input.dtype) * (upper - lower) + lower
        out = torch.where(input < 0, input * slope, input)
        return written(input, out) if inplace else out

    return Draw(
        "rrelu",
        None,
        training,
        input.shape,
        original=lambda: func(input, lower, upper, training, **extra),
        plain=lambda: func(input, lower, upper, False, **extra),
        served=served,
    )


def describe_other(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Draw:
    """Random functions that keep torch's own numbers: they fire, but depend on how the samples are run."""

    def original() -> Any:
        return func(*args, **kwargs)

    name = getattr(func, "__name__", "other").strip("_")
    return Draw(
        name, None, True, None, original, original, None, flagged=True, loose="torch's own numbers, drawn in one go"
    )


_T = Tensor

DESCRIBE: dict[Any, Callable[..., Draw]] = {
    _rate.apply: _layer,
    F.dropout: _dropout("dropout", functional.dropout),
    F.dropout1d: _dropout("dropout1d", functional.dropout1d),
    F.dropout2d: _dropout("dropout2d", functional.dropout2d),
    F.dropout3d: _dropout("dropout3d", functional.dropout3d),
    F.alpha_dropout: _dropout("alpha_dropout", functional.alpha_dropout),
    F.feature_alpha_dropout: _dropout("feature_alpha_dropout", functional.feature_alpha_dropout),
    torch.dropout: _dropout("dropout", functional.dropout),
    torch.dropout_: _dropout("dropout", functional.dropout, inplace=True),
    torch.feature_dropout: _dropout("feature_dropout", _feature_dropout),
    torch.feature_dropout_: _dropout("feature_dropout", _feature_dropout, inplace=True),
    torch.alpha_dropout: _dropout("alpha_dropout", functional.alpha_dropout),
    torch.alpha_dropout_: _dropout("alpha_dropout", functional.alpha_dropout, inplace=True),
    torch.feature_alpha_dropout: _dropout("feature_alpha_dropout", functional.feature_alpha_dropout),
    torch.feature_alpha_dropout_: _dropout("feature_alpha_dropout", functional.feature_alpha_dropout, inplace=True),
    F.scaled_dot_product_attention: _attention,
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
    F.rrelu: _rrelu,
    torch.rrelu: _rrelu,
    torch.rrelu_: functools.partial(_rrelu, inplace=True),
    torch.bernoulli: _raw("bernoulli", _like, _from_probabilities),
    _T.bernoulli: _raw("bernoulli", _like, _from_probabilities),
    _T.bernoulli_: _raw("bernoulli", _like, _bernoulli_values, inplace=True),
    torch.rand: _raw("uniform", torch.empty, _unit_values),
    torch.rand_like: _raw("uniform", _like, _unit_values),
    _T.uniform_: _raw("uniform", _like, _uniform_values, inplace=True),
    torch.randn: _raw("normal", torch.empty, _standard_values),
    torch.randn_like: _raw("normal", _like, _standard_values),
    torch.normal: _raw("normal", _normal_target, _parted_values),
    _T.normal_: _raw("normal", _like, _normal_values, inplace=True),
    _T.exponential_: _raw("exponential", _like, _exponential_values, inplace=True),
    **dict.fromkeys(
        (
            torch.native_dropout, torch.randint, torch.randint_like, torch.randperm, torch.multinomial,
            torch.poisson, torch.binomial, _T.random_, _T.multinomial, _T.geometric_, _T.cauchy_, _T.log_normal_,
        ),
        describe_other,
    ),
}  # fmt: skip
"""For each function that draws, what describes a call of it."""


def _opened(function: Any) -> Callable[..., Any]:
    """A copy of a Python function of torch that does not hand itself over to function modes: they see inside."""
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
"""Functions of torch that draw inside, by way of others."""

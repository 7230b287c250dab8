"""Keep probabilities by name: `keep_probs`, `set_keep_prob`, `disabled`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..core.checks import unwrapped
from ..core.names import check_patterns, winner
from ..core.rate import Probability
from ..handlers.disable import without_functional_dropout
from ..rules import LayerSize
from ..schedules import Scaled, Schedule
from .rate_sites import RateSite, calls_named, check_keep_prob, compiled_parts, names_of, rate_sites, sizes
from .reach import calls_of

RateOrRule = Probability | Callable[[Sequence[LayerSize]], Sequence[Probability]]
"""A keep_prob for all layers of a pattern, or a rule of `torchdrop.rules` that gives each of them its own."""

WHAT = "layers with a rate"


class KeepProbs(Mapping[str, Probability]):
    """The keep probability of each layer by name: a mapping that prints as a table, and that `set_keep_prob` takes.

    Args:
        found: the places that hold a rate.

    Attributes:
        rows: a plain dict for each: name, kind, keep_prob, p, training, the attribute that holds a number or the name
            of the call, and a note on it.
    """

    def __init__(self, found: list[RateSite]) -> None:
        self._values = {site.name: site.keep_prob for site in found}
        self.rows: list[dict[str, Any]] = [
            {
                "name": site.name,
                "kind": site.kind,
                "keep_prob": site.keep_prob,
                "p": site.module.p if not site.attribute else _dropping(site.keep_prob),
                "training": site.module.training,
                "attribute": site.attribute,
                "note": site.note,
            }
            for site in found
        ]

    def __getitem__(self, name: str) -> Probability:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        if not self.rows:
            return "no layer has a rate"
        cells = [("layer", "kind", "keep_prob", "mode")]
        for row in self.rows:
            note = f"  {row['note']}" if row["note"] else ""
            mode = ("train" if row["training"] else "eval ") + note
            cells.append((row["name"] or "(model)", row["kind"], shown(row["keep_prob"]), mode))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        )


def _dropping(keep_prob: Probability) -> Probability:
    return 1.0 - keep_prob if isinstance(keep_prob, Tensor) else round(1.0 - keep_prob, 15)


def shown(keep_prob: Probability) -> str:
    """Returns a keep probability as tables show it.

    >>> shown(0.8), shown(1 / 3)
    ('0.8', '0.3333')
    """
    return f"tensor {tuple(keep_prob.shape)}" if isinstance(keep_prob, Tensor) else f"{keep_prob:.4g}"


def keep_probs(model: nn.Module) -> KeepProbs:
    """Returns the keep probability of every layer that has one, by name.

    These are the dropout layers of torchdrop and of torch.nn, and the rates that nn.LSTM, nn.GRU, nn.RNN,
    nn.MultiheadAttention and modules of other packages hold as numbers: a float in [0, 1] whose attribute's name
    contains "drop" or "keep_prob", or is p, prob or rate in a class named after dropping. The name of such a number is
    the module's with the attribute's, "encoder.attention.dropout". After `replace`, the calls of dropout functions that
    modules make in their own code are listed, too, once they have been made in train mode and not compiled:
    "encoder.attention.dropout:0" is the first call of the module. They have the rate that the code passes, until
    another is set. Without `replace` a constant that a forward passes has no name: see `audit`.

    Args:
        model: any module; a compiled one has the names of its original.

    Returns:
        A mapping from name to keep_prob, in the order of ``model.named_modules()``, which prints as a table.
        ``set_keep_prob(model, keep_probs(model))`` changes nothing.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torchdrop.Dropout(0.2), torch.nn.LSTM(4, 4, 2, dropout=0.5))
        >>> torchdrop.keep_probs(model)
        layer  kind     keep_prob  mode
        0      Dropout  0.8        train
        1      LSTM     0.5        train  number in .dropout
        >>> torchdrop.keep_probs(model)["0"]
        0.8
    """
    return KeepProbs(rate_sites(model))


def chosen(model: nn.Module, patterns: Mapping[str, Any]) -> dict[str, list[RateSite]]:
    """Returns the rates for which each pattern is the most specific one, in the model's order.

    Raises:
        TypeError: the patterns are no mapping, or one is no string.
        ValueError: a pattern matches no rate, or two are equally specific.
    """
    if not isinstance(patterns, Mapping):
        raise TypeError(f"give patterns and values as a mapping, {{'features.*': 0.9}}, got {type(patterns).__name__}")
    found = [*rate_sites(model), *calls_named(model, patterns)]
    names = {alias for site in found for alias in site.aliases}
    others = {name for all_names in names_of(model).values() for name in all_names if name} - names
    try:
        check_patterns(patterns, sorted(names), sorted(others), WHAT)
    except ValueError as error:
        if any(":" in pattern for pattern in patterns) and any(map(calls_of, names_of(model))):
            raise ValueError(f"{error}; calls are listed once the model has run in train mode") from None
        raise
    result: dict[str, list[RateSite]] = {pattern: [] for pattern in patterns}
    for site in found:
        best = winner(list(patterns), site.aliases)
        if best is not None:
            result[best].append(site)
    return result


def set_keep_prob(model: nn.Module, rates: Mapping[str, RateOrRule]) -> None:
    """Sets keep probabilities by name.

    A pattern is a glob ("*" matches dots too) of the names that `keep_probs` lists; the name of a module matches all
    rates in it. A call that `replace` serves may be named before it was made. If several patterns match, the most
    specific one wins: the full name, then the one with the most literal characters. All is checked before anything is
    set. torchdrop's layers in a compiled model are not recompiled.

    Args:
        model: any module; a compiled one has the names of its original.
        rates: for each pattern a number in [0, 1], a tensor (for torchdrop's layers), or a rule of `torchdrop.rules`,
            which gives each of the pattern's layers its own.

    Raises:
        TypeError: a value is no number, tensor or rule (a schedule belongs to `KeepProbScheduler`).
        ValueError: a pattern that matches no layer with a rate; two equally specific ones; a value outside [0, 1].

    Example:
        >>> import torch, torchdrop
        >>> layers = [torchdrop.Dropout() for _ in range(3)]
        >>> model = torch.nn.ModuleDict({"body": torch.nn.Sequential(*layers[:2]), "head": layers[2]})
        >>> torchdrop.set_keep_prob(model, {"body": 0.9, "body.1": 0.8})
        >>> dict(torchdrop.keep_probs(model))
        {'body.0': 0.9, 'body.1': 0.8, 'head': 0.5}
        >>> torchdrop.set_keep_prob(model, {"*": torchdrop.rules.linear_in_depth(0.7)})
        >>> print(torchdrop.keep_probs(model))
        layer   kind     keep_prob  mode
        body.0  Dropout  0.9        train
        body.1  Dropout  0.8        train
        head    Dropout  0.7        train
    """
    wanted: list[tuple[RateSite, Probability]] = []
    for pattern, of_pattern in chosen(model, rates).items():
        values = _values(model, pattern, rates[pattern], of_pattern)
        wanted += [(site, site.check(one)) for site, one in zip(of_pattern, values, strict=True)]
    for site, value in wanted:
        site.set(value)


def _values(model: nn.Module, pattern: str, value: Any, of_pattern: list[RateSite]) -> Sequence[Any]:
    """Returns the values of a pattern's layers."""
    if isinstance(value, (Schedule, Scaled)):
        raise TypeError(
            f"{pattern!r} has a schedule, {value!r}, which changes with the step: "
            "use torchdrop.KeepProbScheduler(model, rates)"
        )
    if not callable(value) or isinstance(value, (nn.Module, Tensor)):
        if not of_pattern:  # other patterns are more specific, but the value must be right all the same
            check_keep_prob(value)
        return [value] * len(of_pattern)
    if not of_pattern:
        return []
    values = value(sizes(model, of_pattern))
    if not isinstance(values, Sequence) or len(values) != len(of_pattern):
        got = len(values) if isinstance(values, Sequence) else type(values).__name__
        wrong = ValueError if isinstance(values, Sequence) else TypeError
        raise wrong(f"the rule of {pattern!r} must give a keep_prob for each of {len(of_pattern)} layers, got {got}")
    return values


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context every keep_prob in the model is 1. Afterwards it is what it was, or was set to meanwhile.

    It is for debugging with the noise off while everything else stays in train mode. A rate that is set within the
    context, for example by a scheduler's step, holds from its end on. Functional dropout in the model, whose rate has
    no name, is off as well; in a compiled model only the rates that `keep_probs` lists can be reached. Other random
    layers, such as those that draw with torch.rand, go on unless their rate is listed.

    Args:
        model: any module.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: functional dropout runs under activation checkpointing, which would run it again in backward,
            where it cannot be reached.

    Example:
        >>> import torch, torchdrop
        >>> model, x = torch.nn.Sequential(torchdrop.Dropout(0.5)), torch.ones(100)
        >>> with torchdrop.disabled(model):
        ...     y = model(x)
        >>> torch.equal(y, x), torchdrop.keep_probs(model)["0"]
        (True, 0.5)
    """
    found = [site for site in rate_sites(model) if not site.is_disabled]  # by a context around this one
    original = unwrapped(model)
    served = [calls for module in names_of(model) if (calls := calls_of(module)) is not None and not calls.off]
    try:
        for calls in served:
            calls.off = True
        for site in found:
            site.disable()
        with nullcontext() if compiled_parts(model) else without_functional_dropout(original):
            yield
    finally:
        for calls in served:
            calls.off = False
        for site in found:
            site.enable()

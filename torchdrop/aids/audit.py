"""`audit`: what is wrong, or likely wrong, with a model's dropout, found by running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..configure.holders import Holder, holders
from ..monte_carlo.activate import check_model
from ..monte_carlo.inputs import Inputs
from ..monte_carlo.state import flags, random_state, undisturbed
from .flow import Call, Flow

_PROBE = 0.123456789
"""A rate that no one chooses, to see which calls follow the rates that have a name."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or likely wrong.

    Args:
        code: what it is, for programs: "active in eval mode", "before batch norm", "on the output", "two in a row",
            "rate 0", "rate 1", "ignores training", "rate captured elsewhere", "realised rate" or "never called".
        module: where.
        message: what was seen, and what to do.
    """

    code: str
    module: str
    message: str


@dataclass(frozen=True)
class Audit:
    """What `audit` found. Printing it gives a table.

    Args:
        findings: empty if nothing is wrong.
        calls: every call that drops in train mode, with its rate and how many elements it really kept.
    """

    findings: list[Finding]
    calls: list[Call]

    def of(self, code: str) -> list[str]:
        """The modules with a finding of this code."""
        return [finding.module for finding in self.findings if finding.code == code]

    def __str__(self) -> str:
        lines = []
        dropping = [call for call in self.calls if not call.flagged]
        if dropping:
            width = max(5, *(len(call.module or "(model)") for call in dropping))
            lines.append(f"{'layer':{width}}  {'call':<14}  keep_prob  realised  draws")
            for call in dropping:
                nominal = "         " if call.rate is None else f"{1 - call.rate:<9.4g}"
                realised = "not measured" if call.realised is None else f"{call.realised:<8.4f}  {call.draws}"
                lines.append(f"{call.module or '(model)':{width}}  {call.kind:<14}  {nominal}  {realised}")
        else:
            lines.append("No dropout in a forward in train mode.")
        if not self.findings:
            return "\n".join([*lines, "Nothing found."])
        lines.append(f"{len(self.findings)} found:")
        lines += [f"  {f.code}: {f.module or '(model)'}. {f.message}" for f in self.findings]
        return "\n".join(lines)


def audit(model: nn.Module, example_input: Any) -> Audit:
    """Runs a model in train and in eval mode and reports what is wrong, or likely wrong, with its dropout.

    Found are: randomness that is on in eval mode, and functional dropout that ignores `training`; dropout whose output
    batch normalisation takes, as it is or through one linear map (its variance then differs between training and eval
    mode: Li et al.); dropout on the model's output; two dropouts in a row; rates of 0 or 1 left in; rates that are
    constants in a forward, so that no name reaches them; dropout layers that are never called; and layers that keep
    another share of elements than they say. The model is run a few times without gradients, on a copy of nothing:
    flags, buffers, rates and random states are put back.

    Args:
        model: any module, neither compiled nor scripted.
        example_input: what to call it with: a tensor, a tuple or list of arguments, or a mapping of named ones. A few
            rows are enough.

    Returns:
        The findings, as text and as plain data, and each call's realised keep rate against the nominal one. A realised
        rate is a finding if a right layer would show it with a probability below 1e-9.

    Raises:
        TypeError: `model` is no module, or a compiled or scripted one, whose calls cannot be seen.

    References:
        Li, Chen, Hu and Yang, "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift",
        CVPR 2019 (arXiv:1801.05134).

    Example:
        >>> import torch, torchdrop
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2), nn.Dropout(0.0))
        >>> found = torchdrop.audit(model, torch.randn(16, 4))
        >>> [(finding.code, finding.module) for finding in found.findings]
        [('rate 0', '4'), ('before batch norm', '2')]
    """
    check_model(model)
    inputs = Inputs.of(example_input, None)
    training = model.training
    found = [] if training else list(_left_on(model))
    with torch.no_grad(), random_state(), undisturbed(model.modules()):
        with _following(model, measure=True, training=True) as flow:
            output = inputs.copy().call(model)
        with _following(model, measure=False, training=False) as at_rest:
            inputs.copy().call(model)
        with _probed(holders(model)), _following(model, measure=False, training=True) as probed:
            inputs.copy().call(model)
    found += _active(at_rest.calls)
    found += _extreme(holders(model))
    found += _normalised(flow)
    found += [
        Finding("on the output", name, "Its output is the model's output: predictions are zeroed. Leave it out.")
        for name in flow.dropped_outputs(output)
    ]
    found += _in_a_row(flow.calls)
    found += _captured(probed.calls)
    found += _never_called(model, flow.ran | at_rest.ran)
    found += _unlikely(flow.calls)
    return Audit(found, [call for call in flow.calls if call.on])


@contextmanager
def _following(model: nn.Module, measure: bool, training: bool) -> Iterator[Flow]:
    """Normalisation with running statistics stays in eval mode: a single row would be refused otherwise."""
    flow = Flow(model, measure)
    try:
        with flags(model, lambda m: training and not hasattr(m, "running_mean")), flow:
            yield flow
    finally:
        flow.close()


@contextmanager
def _probed(found: list[Holder]) -> Iterator[None]:
    """Every rate that has a name is another one within."""
    states = [holder.state() for holder in found]
    try:
        for holder in found:
            holder.set(1.0 - _PROBE)
        yield
    finally:
        for holder, state in zip(found, states, strict=True):
            holder.restore(state)


def _left_on(model: nn.Module) -> Iterator[Finding]:
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training:
            message = (
                "It is in train mode while the model is in eval mode. Call model.eval(), or use torchdrop.mc_dropout."
            )
            yield Finding("active in eval mode", name, message)


def _active(calls: Iterable[Call]) -> Iterator[Finding]:
    for call in calls:
        if call.on and call.flagged:
            message = f"It draws random numbers ({call.kind}) in eval mode. Make that depend on self.training."
            yield Finding("active in eval mode", call.module, message)
        elif call.on:
            message = f"It calls {call.kind} with dropout on in eval mode. Pass training=self.training."
            yield Finding("ignores training", call.module, message)


def _extreme(found: Iterable[Holder]) -> Iterator[Finding]:
    for holder in found:
        keep_prob = holder.keep_prob
        if isinstance(keep_prob, Tensor):
            continue
        if keep_prob == 1.0 and not holder.attribute:
            message = "Its keep_prob is 1, so it does nothing. Remove it, or give it a rate."
            yield Finding("rate 0", holder.name, message)
        elif keep_prob == 0.0:
            message = (
                "Its keep_prob is 0: it drops everything. p is the probability of dropping, keep_prob that of keeping."
            )
            yield Finding("rate 1", holder.name, message)


def _normalised(flow: Flow) -> Iterator[Finding]:
    for name, dropout, through in flow.normalised:
        way = f"by way of {through}, " if through else "directly, "
        message = (
            f"It takes the output of the dropout {dropout or '(model)'} {way}whose variance is larger in "
            "training than in "
            "eval mode, so that running statistics are off (Li et al., 2019). Put dropout after the last batch norm."
        )
        yield Finding("before batch norm", name, message)


def _in_a_row(calls: Iterable[Call]) -> Iterator[Finding]:
    for call in calls:
        if call.on and call.after is not None:
            message = (
                f"It drops from what {call.after or '(model)'} has dropped from: keep_probs multiply. Keep one of them."
            )
            yield Finding("two in a row", call.module, message)


def _captured(calls: Iterable[Call]) -> Iterator[Finding]:
    seen = set()
    for call in calls:
        if call.flagged or not call.on or call.rate is None or abs(call.rate - _PROBE) < 1e-6:
            continue
        if (call.module, call.kind) in seen:
            continue
        seen.add((call.module, call.kind))
        message = (
            f"The rate of its {call.kind}, {call.rate:.4g}, is held where no name reaches it: set_keep_prob "
            "and schedules do "
            "not change it. Use a layer, or an attribute with 'drop' in its name."
        )
        yield Finding("rate captured elsewhere", call.module, message)


def _never_called(model: nn.Module, ran: set[nn.Module]) -> Iterator[Finding]:
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module not in ran:
            yield Finding("never called", name, "A forward of this input did not call it. Is it left over, or skipped?")


def _unlikely(calls: Iterable[Call]) -> Iterator[Finding]:
    for call in calls:
        if call.unlikely:
            assert call.rate is not None
            message = f"It kept {call.realised:.4f} of {call.draws} elements, and not {1 - call.rate:.4f}."
            yield Finding("realised rate", call.module, message)

"""`audit`: everything that is wrong, or likely wrong, with a model's dropout, found by running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from ..configure.rate_sites import RateSite, rate_sites
from ..configure.reach import calls_of
from ..layers.gaussian import GaussianDropout
from ..monte_carlo.activate import check_model
from ..monte_carlo.inputs import Inputs
from ..monte_carlo.state import flags, own_generators, random_state, undisturbed
from .flow import Call, Flow, leaves
from .realized_rate import RealizedRate, mask_of_layer, measured, zeroes

_PROBE = 0.123456789
"""A rate that no one chooses. It shows which calls follow the rates that have a name."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or likely wrong.

    Args:
        code: its kind, for programs: "active in eval mode", "before batch norm", "on the output", "two in a row",
            "rate 0", "rate 1", "ignores training", "rate captured elsewhere", "realized rate" or "never called".
        module: the name of the module.
        message: the observation, and a remedy.
    """

    code: str
    module: str
    message: str


@dataclass(frozen=True)
class Audit:
    """The result of `audit`. It prints as a table.

    Args:
        findings: the findings; empty if nothing is wrong.
        calls: every call that drops in train mode, with its rate and the fraction of elements that it really kept.
    """

    findings: list[Finding]
    calls: list[Call]

    def of(self, code: str) -> list[str]:
        """Returns the modules with a finding of this code."""
        return [finding.module for finding in self.findings if finding.code == code]

    def __str__(self) -> str:
        lines = []
        dropping = [call for call in self.calls if not call.flagged]
        if dropping:
            width = max(5, *(len(call.module or "(model)") for call in dropping))
            lines.append(f"{'layer':{width}}  {'call':<14}  keep_prob  realized  draws")
            for call in {(call.module, call.kind, call.rate): call for call in reversed(dropping)}.values():
                nominal = "         " if call.rate is None else f"{1 - call.rate:<9.4g}"
                realized = "not measured" if call.realized is None else f"{call.realized:<8.4f}  {call.draws}"
                lines.insert(1, f"{call.module or '(model)':{width}}  {call.kind:<14}  {nominal}  {realized}")
        else:
            lines.append("No dropout in a forward in train mode.")
        if not self.findings:
            return "\n".join([*lines, "Nothing found."])
        lines.append(f"{len(self.findings)} found:")
        lines += [f"  {f.code}: {f.module or '(model)'}. {f.message}" for f in self.findings]
        return "\n".join(lines)


def audit(model: nn.Module, example_input: Any) -> Audit:
    """Runs a model in train and in eval mode and reports what is wrong, or likely wrong, with its dropout.

    It finds randomness that is on in eval mode, and functional dropout that ignores `training`; dropout whose output
    goes to batch normalization, directly or through one linear map (its variance then differs between training and eval
    mode: Li et al.); dropout on the model's output; two dropouts in a row; rates of 0 or 1 left in; rates that are
    constants in a forward, which no name refers to; dropout layers that are never called; and layers that keep another
    share of elements than their rate says. The model is run a few times, and afterwards its flags, buffers, rates and
    random states are as before.

    Args:
        model: any module, neither compiled nor scripted.
        example_input: the arguments of a call: a tensor, a tuple or list of arguments, or a mapping of named ones. A
            few rows are enough.

    Returns:
        The findings, as text and as plain data, and each call's realized keep rate against the nominal one. A realized
        rate is a finding if a right layer would show it with a probability below 1e-9.

    Raises:
        TypeError: `model` is no module, or a compiled or scripted one, whose calls cannot be seen.
        ValueError: a module in it gets its parameters in its first call, which has not been made.

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
    _refuse_compiled(model)
    _refuse_lazy(model)
    inputs = Inputs.of(example_input, None)
    found = list(_find_modules_in_train_mode(model))
    with torch.enable_grad(), random_state(), own_generators(model), undisturbed(model.modules()):
        with _following(model, measure=True, training=True) as flow:
            output = inputs.copy().call(model)
        with _following(model, measure=False, training=False) as at_rest:
            first, second = inputs.copy().call(model), inputs.copy().call(model)
        with _with_other_rates(rate_sites(model)), _following(model, measure=False, training=True) as probed:
            inputs.copy().call(model)
        with flags(model, lambda _: True):
            calls = _with_layers(model, flow)
    noisy = not all(map(torch.equal, leaves(first), leaves(second)))
    found += _find_calls_on_in_eval(at_rest.calls, noisy)
    found += _find_rates_of_0_and_1(rate_sites(model))
    found += _find_dropout_before_norm(flow)
    found += [
        Finding("on the output", name, "Its output is the model's output: predictions are zeroed. Leave it out.")
        for name in flow.dropped_outputs(output)
    ]
    found += _find_two_in_a_row(flow.calls)
    found += _find_captured_rates(model, flow.calls, probed.calls)
    found += _find_never_called(model, flow.ran | at_rest.ran, probed.calls)
    found += _find_unlikely_rates(calls)
    return Audit(list(dict.fromkeys(found)), [call for call in calls if call.on])


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"the model's module {name!r}" if name else "the model"
            raise TypeError(
                f"{where} is compiled, so its layers cannot be followed: use the original (_orig_mod of what "
                "torch.compile returns, or a module on which compile() was not called)"
            )


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) is not initialized: call the model once before it is audited"
            )


@contextmanager
def _following(model: nn.Module, measure: bool, training: bool) -> Iterator[Flow]:
    """Follows forwards. Normalization with running statistics stays in eval mode: it would refuse a single row."""
    flow = Flow(model, measure)
    with flags(model, lambda m: training and not hasattr(m, "running_mean")), flow.follow(model):
        yield flow


@contextmanager
def _with_other_rates(found: list[RateSite]) -> Iterator[None]:
    """Within the context, every rate that has a name is another one."""
    states = [site.state() for site in found]
    try:
        for site in found:
            site.set(1.0 - _PROBE)
        yield
    finally:
        for site, state in zip(found, states, strict=True):
            site.restore(state)


def _with_layers(model: nn.Module, flow: Flow) -> list[Call]:
    """Returns the calls of a forward; those of dropout layers with the layer's rate and the share that it keeps."""
    calls = list(flow.calls)
    for name, layer in model.named_modules():
        input = flow.ran.get(layer)
        if not isinstance(layer, _DropoutNd) or input is None or isinstance(layer.p, Tensor):
            continue
        share = measured(layer.forward, input, mask_of_layer(layer, input)) if zeroes(layer) else RealizedRate(None, 0)
        own = [call for call in calls if call.module == name and not call.flagged]
        if not own:
            own = [Call(name, type(layer).__name__, True, layer.p, layer.p > 0, False, None)]
            calls += own
        for call in own:
            call.rate, call.realized, call.draws = float(layer.p), *share
    return calls


def _find_modules_in_train_mode(model: nn.Module) -> Iterator[Finding]:
    for name, module in model.named_modules():
        holds = any(site.module is module for site in rate_sites(model))
        if holds and module.training and not model.training:
            message = (
                "It is in train mode while the model is in eval mode. Call model.eval(), or use torchdrop.mc_dropout."
            )
            yield Finding("active in eval mode", name, message)
        elif holds and type(module).train is not nn.Module.train and _ignores_eval(module):
            message = (
                "It stays in train mode after eval(). Remove its own train(), and use torchdrop.mc_dropout to sample."
            )
            yield Finding("active in eval mode", name, message)


def _ignores_eval(module: nn.Module) -> bool:
    with undisturbed(module.modules()):
        return module.eval().training


def _find_calls_on_in_eval(calls: Iterable[Call], noisy: bool) -> Iterator[Finding]:
    for call in calls:
        if call.on and call.flagged:
            if noisy and call.kind in ("uniform", "bernoulli"):  # the rest is noise of a model's own, as in a VAE
                message = f"It draws random numbers ({call.kind}) in eval mode. Make that depend on self.training."
                yield Finding("active in eval mode", call.module, message)
        elif call.on and call.kind != "rrelu":
            message = f"It calls {call.kind} with dropout on in eval mode. Pass training=self.training."
            yield Finding("ignores training", call.module, message)


def _find_rates_of_0_and_1(found: Iterable[RateSite]) -> Iterator[Finding]:
    for site in found:
        if site.attribute and not isinstance(site.module, (nn.RNNBase, nn.MultiheadAttention)):
            continue
        keep_prob = torch.as_tensor(site.keep_prob, dtype=torch.float64)
        if bool((keep_prob == 1).all()) and not site.attribute:
            message = "Its keep_prob is 1, so it does nothing. Remove it, or give it a rate."
            yield Finding("rate 0", site.name, message)
        elif bool((keep_prob == 0).all()):
            message = (
                "Its keep_prob is 0: it drops everything. p is the probability of dropping, keep_prob that of keeping."
            )
            yield Finding("rate 1", site.name, message)


def _find_dropout_before_norm(flow: Flow) -> Iterator[Finding]:
    for name, dropout, through in flow.normalized:
        way = f"by way of {through}, " if through else "directly, "
        message = (
            f"It takes the output of the dropout {dropout or '(model)'} {way}whose variance is larger in training than "
            "in eval mode, so that running statistics are off (Li et al., 2019). Put dropout after the last batch norm."
        )
        yield Finding("before batch norm", name, message)


def _find_two_in_a_row(calls: Iterable[Call]) -> Iterator[Finding]:
    for call in calls:
        if call.on and not call.flagged and call.after is not None:
            before = call.after or "(model)"
            message = f"It drops from what {before} has dropped from: keep_probs multiply. Keep one of them."
            yield Finding("two in a row", call.module, message)


def _rates(calls: Iterable[Call]) -> dict[tuple[str, str], set[float]]:
    found: dict[tuple[str, str], set[float]] = {}
    for call in calls:
        if call.rate is not None and call.on and not call.flagged:
            found.setdefault((call.module, call.kind), set()).add(call.rate)
    return found


def _find_captured_rates(model: nn.Module, calls: Iterable[Call], probed: Iterable[Call]) -> Iterator[Finding]:
    """Finds calls whose rate stays the same when every rate that has a name is another.

    The calls of modules that `replace` serves have names, though they are listed only once the model has run.
    """
    before = _rates(calls)
    for (module, kind), rates in _rates(probed).items():
        if calls_of(model.get_submodule(module)) is not None:
            continue
        for rate in sorted(rates & before.get((module, kind), set())):
            message = (
                f"The rate of its {kind}, {rate:.4g}, is held where no name reaches it: set_keep_prob and schedules do "
                "not change it. Use a layer, or an attribute such as self.dropout."
            )
            yield Finding("rate captured elsewhere", module, message)


def _find_never_called(model: nn.Module, ran: Mapping[nn.Module, Any], probed: Iterable[Call]) -> Iterator[Finding]:
    """Finds layers that no forward calls, and whose rate no function around them is given.

    Some variants are used by methods other than their forward, so it looks only at layers that have no such methods.
    """
    users = {call.module for call in probed if call.rate is not None and abs(call.rate - _PROBE) < 1e-6}
    for name, module in model.named_modules():
        plain = isinstance(module, _DropoutNd) and (zeroes(module) or isinstance(module, GaussianDropout))
        if plain and module not in ran and name.rpartition(".")[0] not in users:
            message = "A forward of this input did not call it. Is it left over, or skipped?"
            yield Finding("never called", name, message)


def _find_unlikely_rates(calls: Iterable[Call]) -> Iterator[Finding]:
    for call in calls:
        if call.unlikely:
            assert call.rate is not None
            message = f"It kept {call.realized:.4f} of {call.draws} elements, and not {1 - call.rate:.4f}."
            yield Finding("realized rate", call.module, message)

"""A survey of the randomness in a model: forwards in train mode and in Monte Carlo mode, on two or three rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.torch_state import tree_flatten
from ..handlers.masks import Pass
from ..handlers.sources import AUGMENTS, NOT_CHOSEN, Source
from ..handlers.trace import Trace
from ..layers.layer_drop import LayerDrop
from .copies import UncopyableError
from .inputs import Inputs
from .state import GENERATORS, foreign_states, own_generators, states_of

if TYPE_CHECKING:
    from .activate import Activation

_TRIES = 40
"""The largest number of forwards until all layers have run, if it is random which layers run."""

FOREIGN = (
    "In train mode the model also draws from Python's or numpy's generator (SpecAugment, or a LayerDrop of that kind): "
    "what these decide stays as it is in eval mode"
)

_UNREACHED = "not reached with the model in eval mode"
_CHANGES_OUTPUTS = "its module's training flag changes what the model returns"
_AUGMENTS = re.compile(r"(?i)augment|mixup|cutmix|cutout|masking|rcnntransform")


def _has_statistics(module: nn.Module) -> bool:
    return hasattr(module, "running_mean") or hasattr(module, "num_batches_tracked")


def _may_be_flagged(module: nn.Module) -> bool:
    return not _has_statistics(module) and not _AUGMENTS.search(type(module).__name__)


def _same_structure(first: Any, second: Any) -> bool:
    (a, one), (b, other) = tree_flatten(first), tree_flatten(second)
    return one == other and all(
        getattr(x, "shape", None) == getattr(y, "shape", None) for x, y in zip(a, b, strict=True)
    )


class Survey:
    """A survey of the randomness in a call of a model, or of a part of it.

    Args:
        activation: the activation of the model; its server and report get the result.
        module: the module that is called.
        method: the name of its method that is called.
        sample: begins a pass of the server in Monte Carlo mode, of the sample of this number for these arguments.
    """

    def __init__(
        self,
        activation: Activation,
        module: nn.Module,
        method: str,
        sample: Callable[[int, Inputs], None] | None = None,
    ) -> None:
        self._activation, self._module, self._method = activation, module, method
        self._sample = sample or self._begin
        self._model, self._shells, self._tracker = activation.model, activation.shells, activation.tracker
        self._server, self._report = activation.server, activation.report
        self._modules = dict(self._model.named_modules())
        self._failing: dict[str, str] = {}
        self._branching = False
        self._counted = False
        self._hooks = True

    def run(self, inputs: Inputs, hooks: bool = False) -> Any:
        """Makes the forwards; afterwards all random states are as before.

        Args:
            inputs: the arguments of the call.
            hooks: whether the user's hooks see the forwards. They do if the forwards fail without them.

        Returns:
            The output of the call for the first three rows.
        """
        server, activation = self._server, self._activation
        differentiated, server.differentiated, server.prefix = server.differentiated, False, None
        try:
            with GENERATORS, activation.kept_states() as states, own_generators(self._model):
                states.keep()
                returned = self._attempts(inputs, hooks)
            activation.complete = self._hooks or not self._shells.has_foreign_hooks
            return returned
        finally:
            server.differentiated, server.surveyed = differentiated, True
            self._tracker.restart()

    def _attempts(self, inputs: Inputs, hooks: bool) -> Any:
        """Makes the forwards without the user's hooks and without autograd, and where that fails, with them."""
        known, failed = self._copied(), None
        every = [True] if hooks or not self._shells.has_foreign_hooks else [False, True]
        gradients = [False, True] if torch.is_grad_enabled() or self._activation.may_differentiate else [False]
        for grad in gradients:
            for self._hooks in every:
                try:
                    with torch.set_grad_enabled(grad):
                        returned = self._run(inputs)
                    self._activation.differentiates |= grad
                    return returned
                except UncopyableError:
                    raise
                except Exception as error:
                    self._restore(known)
                    if failed is None:
                        failed = error
                        self._check_whole(inputs, error)
        assert failed is not None
        if inputs.rows is None:
            raise failed
        raise RuntimeError(
            f"the model works with its {inputs.rows} rows, but not with the first two or three of them "
            f"({type(failed).__name__}: {failed}). Pass batch_dim=None to take the inputs as one whole"
        ) from failed

    def _check_whole(self, inputs: Inputs, error: Exception) -> None:
        """Calls the model with all of its inputs after a failure: a broken model raises an error of its own here."""
        self._hooks = True
        if torch.is_grad_enabled() or not self._activation.may_differentiate:
            self._forward(inputs.copy())
            return
        try:
            self._forward(inputs.copy())
        except Exception:
            with torch.enable_grad():
                self._forward(inputs.copy())

    def _copied(self) -> tuple[Any, ...]:
        """Returns what attempts change."""
        report = self._report
        return (
            dict(self._server.sources),
            set(self._server.others),
            set(self._activation.flagged),
            list(report.notes),
            report.expected,
        )

    def _restore(self, known: tuple[Any, ...]) -> None:
        sources, others, flagged, notes, self._report.expected = known
        self._server.sources, self._server.others = dict(sources), set(others)
        self._activation.flagged, self._report.notes[:] = set(flagged), notes
        self._failing.clear()

    def _run(self, inputs: Inputs) -> Any:
        if inputs.rows is None and self._activation.dim is not None:
            self._report.rows = None
            self._report.notes.append(
                "The inputs' tensors do not agree in a number of rows, so they are taken as one whole: masks depend on "
                "the whole of them"
            )
        self._report.called = True
        self._tracker.entered.clear()
        two, three = inputs.first(2), inputs.first(3)
        recorded = self._train(two)
        flagged = {self._modules[name] for name in recorded.flagged if self._chosen(name)} if recorded else set()
        self._activation.flagged |= set(filter(_may_be_flagged, flagged))
        if recorded is None:  # shapes at another number of rows, in its place
            self._forward(two)
        returned = self._reach(three)
        returned = self._keep_outputs(three, returned)
        for source in self._missing():
            if not self._branching or source.module in self._tracker.entered:
                augments = _AUGMENTS.search(type(self._modules[source.module]).__name__)
                source.active, source.reason = False, source.reason or (AUGMENTS if augments else _UNREACHED)
        self._activation.list_sources()
        return returned

    def _chosen(self, name: str) -> bool:
        return self._activation.chosen(name)

    def _missing(self) -> list[Source]:
        return [source for source in self._server.sources.values() if source.active and not source.served]

    def _train(self, inputs: Inputs) -> Trace | None:
        """Makes forwards in train mode: more than one if it is random which layers run, until all have been seen."""
        recorder = self._train_forward(inputs)
        stacks = any(isinstance(module, LayerDrop) for module in self._model.modules())
        self._branching = stacks or (recorder is not None and recorder.branching)
        if recorder is None or not self._branching:
            return recorder
        trained = set(self._tracker.entered)
        with Trace(self._tracker, inputs.rows):  # it finds nothing random in eval mode
            self._call(inputs)
        every = set(self._tracker.entered)
        for _ in range(_TRIES):
            if every <= trained:
                break
            self._tracker.entered.clear()
            other = self._train_forward(inputs)
            trained |= self._tracker.entered
            recorder.flagged |= other.flagged if other is not None else set()
        return recorder

    def _train_forward(self, inputs: Inputs) -> Trace | None:
        """Traces a forward in train mode. Layers with running statistics stay in eval mode, and so do modules whose
        code fails in train mode, for example a detector that needs targets."""
        before, states = foreign_states(), states_of(self._model)
        self._counted = self._counted or inputs.device.type not in ("cpu", "cuda")
        while True:
            recorder = Trace(self._tracker, inputs.rows, states, self._counted)
            self._tracker.failed = None
            try:
                with recorder, recorder.unseen if self._counted else nullcontext():
                    self._call(
                        inputs,
                        lambda m: not _has_statistics(m) and self._shells.names[m] not in self._failing,
                    )
                recorder.look()
                if self._counted or not recorder.hidden:
                    break
                self._counted = True  # a dispatch mode sees each operator, and takes several times as long
            except Exception as error:
                name, what = self._tracker.failed, f"{type(error).__name__}: {error}"
                if name is None or name in self._failing:
                    self._note(
                        f"A forward in train mode failed ({what}), so what is active could not be compared with it"
                    )
                    return None
                self._failing[name] = what
        for name, what in self._failing.items():
            self._note(
                f"The forward fails with {name or 'the model'} in train mode ({what}), so its own flag was left off: "
                "what is random in its code by that flag alone stays off"
            )
        if before != foreign_states():
            self._note(FOREIGN)
        self._take(recorder)
        return recorder

    def _take(self, recorder: Trace) -> None:
        for source in recorder.sources:
            if source.site in self._server.sources:
                continue
            if source.active:
                self._report.expected += source.draws
                source.active = self._chosen(source.module)
                source.reason = source.reason if source.active else NOT_CHOSEN
            self._server.sources[source.site] = source
        self._server.others |= recorder.others
        self._report.unseen = max(self._report.unseen, recorder.unseen.count - recorder.seen)

    def _note(self, note: str) -> None:
        if note not in self._report.notes:
            self._report.notes.append(note)

    def _call(self, inputs: Inputs, training: Callable[[nn.Module], bool] = lambda _: False) -> Any:
        self._tracker.restart()
        self._shells.refresh(training, lambda _: True, contexts=False, hooks=self._hooks)
        return inputs.fresh().call(self._shells.method(self._module, self._method))

    def _forward(self, inputs: Inputs, sample: int = 0) -> Any:
        """Makes a forward in Monte Carlo mode."""
        self._sample(sample, inputs)
        with self._activation.serving():
            out = self._call(inputs, self._activation.flagged.__contains__)
        self._activation.stateful |= self._shells.written()
        self._report.draws = self._server.draws
        return out

    def _begin(self, sample: int, inputs: Inputs) -> None:
        number = torch.full((), sample, dtype=torch.int64, device=inputs.device)
        self._server.begin(Pass(0, number, inputs.rows))

    def _reach(self, inputs: Inputs) -> Any:
        """Sets training flags until every source is served, as far as that helps: that of the module that makes the
        call, those of the modules around it, one after another, and those of all of them."""
        self._tracker.entered.clear()
        returned = self._forwards(inputs)
        depth = max((len(source.within) for source in self._missing()), default=0)
        for levels in [*([level] for level in range(1, depth + 1)), range(1, depth + 1)]:
            missing = self._missing()
            if not missing:
                break
            names = {s.within[-level] for s in missing for level in levels if len(s.within) >= level}
            added = set(filter(_may_be_flagged, (self._modules[name] for name in names))) - self._activation.flagged
            if not added:
                continue
            before = set(self._activation.flagged)
            self._activation.flagged |= added
            try:
                tried = self._forwards(inputs)
            except Exception:  # with that flag its code may need more inputs: targets, for example
                tried = None
            reached = {name for s in missing if s.served for name in s.within}
            helped = {module for module in added if self._shells.names[module] in reached}
            self._activation.flagged = before | helped
            if helped == added and tried is not None:
                returned = tried
            elif helped or tried is None:
                returned = self._forwards(inputs)
        return returned

    def _forwards(self, inputs: Inputs) -> Any:
        """Makes a forward in Monte Carlo mode, and more of them if it is random which layers run."""
        returned = self._forward(inputs)
        for sample in range(1, _TRIES if self._branching else 1):
            if not self._missing():
                break
            self._forward(inputs, sample)
        return returned

    def _keep_outputs(self, inputs: Inputs, returned: Any) -> Any:
        """Takes the flag from modules whose flag changes the model's output: auxiliary heads, losses."""
        flagged = self._activation.flagged
        wide = {m for m in flagged if any(True for _ in m.parameters()) or any(True for _ in m.children())}
        if not wide or _same_structure(self._call(inputs), returned):
            return returned
        flagged -= wide
        for source in self._server.sources.values():
            source.served = False
        returned = self._forwards(inputs)
        for source in self._missing():
            if self._within(source, wide):
                source.reason = _CHANGES_OUTPUTS
        return returned

    def _within(self, source: Source, modules: Iterable[nn.Module]) -> bool:
        names = {self._shells.names[module] for module in modules}
        return not names.isdisjoint((source.module, *source.within))

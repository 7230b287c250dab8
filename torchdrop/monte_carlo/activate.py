"""Turning a model's randomness on as in train mode, and nothing else: `mc_dropout`.

Random calls are not guessed from names. A forward in train mode, on two or three rows of the data, shows which calls
draw (see `survey`). Then, in eval mode, a function mode serves exactly those calls, and only the modules that decide
from their own training flag whether to draw (DropPath, LayerDrop) get that flag. A forward in this mode is compared
with the one in train mode, and the report has the result. All of it happens to shells of the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..core.checks import check_integer, unwrapped
from ..core.names import fits, matches, near
from ..core.torch_state import transforms_active
from ..handlers.masks import Pass
from ..handlers.substitute import Substitute
from ..handlers.tracker import Tracker, inner_names
from ..seeding import start
from .inputs import Inputs
from .redirect import next_level
from .report import Report
from .shells import Shells
from .state import GENERATORS, KeptStates
from .survey import FOREIGN, Survey


class Activation:
    """A model whose random calls are served.

    Args:
        model: the model.
        patterns: glob patterns of names of modules in which sources are active; None for all.
        dim: the dimension of the inputs that counts rows of data; None if they are one whole.
        method: the name of the model's method that is called; the model itself if None.

    Attributes:
        flagged: the modules whose shells have the training flag.
        stateful: the modules that write to their own buffers and tensors, in eval mode, too.
        complete: whether the survey has seen all calls, those that the user's hooks make, too.
        may_differentiate: whether a model that needs autograd in its forward gets it, where the caller has switched it
            off.
        differentiates: whether the model needs it.
    """

    def __init__(
        self, model: nn.Module, patterns: Sequence[str] | None, dim: int | None, method: str = "__call__"
    ) -> None:
        self.model = model
        self.dim = dim
        self._patterns, self._method = patterns, method
        self.report: Report = Report(rows=dim)
        self.flagged: set[nn.Module] = set()
        self.stateful: set[nn.Module] = set()
        self.complete: bool = True
        self.may_differentiate: bool = False
        self.differentiates: bool = False
        self.tracker: Tracker = Tracker()
        self.shells: Shells = Shells(model, self.tracker, next_level())
        self.server: Substitute = Substitute(self.tracker, self.chosen, inner_names(model))

    def serving(self) -> AbstractContextManager[Any]:
        """Returns the mode that serves, unless it is on already."""
        return nullcontext() if self.server.entered else self.server

    def chosen(self, name: str) -> bool:
        """Whether sources in the module of this name are wanted."""
        if self._patterns is None:
            return True
        return any(matches(pattern, name) for pattern in self._patterns)

    def survey(
        self,
        inputs: Inputs,
        module: nn.Module | None = None,
        method: str | None = None,
        hooks: bool = False,
        sample: Callable[[int, Inputs], None] | None = None,
    ) -> Any:
        """Finds the randomness in a call of the model or of a part of it: see `Survey`."""
        return Survey(self, module or self.model, method or self._method, sample).run(inputs, hooks)

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Within it, a random call that the survey has not seen, because hooks did not run in it, raises an error."""
        self.server.strict = not self.complete
        try:
            yield
        finally:
            self.server.strict = False

    def call(self, inputs: Inputs, again: bool = False) -> Any:
        """Returns the model's output in a pass that the server has begun. Its mode is on. The model does not change.

        Args:
            inputs: the arguments of the pass.
            again: whether the last use of the shells was such a pass, and the model is taken to be as it was then.
        """
        self.tracker.restart()
        if again:
            self.shells.renew()
        else:
            self.shells.refresh(self.flagged.__contains__, self._is_apart)
        with self.own_numbers(), torch.set_grad_enabled(self.differentiates):
            return inputs.call(self.shells.method(self.model, self._method))

    def deterministic(self, inputs: Inputs) -> Any:
        """Returns the model's output in eval mode, with nothing random."""
        self.shells.refresh(apart=self.stateful.__contains__)
        with torch.set_grad_enabled(self.differentiates):
            return inputs.call(self.shells.method(self.model, self._method))

    def _is_apart(self, module: nn.Module) -> bool:
        return module in self.flagged or module in self.stateful

    def list_sources(self) -> None:
        """Brings the report up to date with the sources that have been found."""
        if len(self.report.sources) == len(self.server.sources):
            return
        known = set(map(id, self.report.sources))
        self.report.sources += [
            s for s in self.server.sources.values() if (s.active or s.reason) and id(s) not in known
        ]

    @property
    def draws_foreign(self) -> bool:
        """Whether a pass draws numbers that are not served."""
        return FOREIGN in self.report.notes or not self.report.replayable

    def own_numbers(self) -> AbstractContextManager[Any]:
        """Seeds PyTorch's generators for a pass that draws from them. Only one thread at a time can do so."""
        run = self.server.run
        if FOREIGN in self.report.notes:
            self.server.draws_own()
        return nullcontext() if self.report.replayable or run is None else self._seeded(run)

    @contextmanager
    def _seeded(self, run: Pass) -> Iterator[None]:
        self.server.draws_own()
        with GENERATORS:
            if not run.folded and not transforms_active():
                start(run.seed, f"torch {int(run.samples)}", torch.manual_seed)
            yield

    @contextmanager
    def kept_states(self) -> Iterator[KeptStates]:
        """Restores the generators' states at the end if a pass has drawn from them: other threads do so, too."""
        before = self.server.draws_own
        try:
            with KeptStates() as states:
                self.server.draws_own = states.keep
                yield states
        finally:
            self.server.draws_own = before

    def omissions(self) -> list[str]:
        """Lists sources that stay off although they draw in train mode and were not left out on purpose."""
        report, said = self.report, []
        if report.unreached:
            listed = "; ".join(f"{s.module or '(model)'}: {s.kind}, {s.reason}" for s in report.unreached)
            said.append(f"{len(report.unreached)} of {len(report.sources)} sources of randomness stay off ({listed})")
        if report.unseen:
            said.append(
                f"{report.unseen} random draws of a forward in train mode stay as they are in eval mode, since they "
                "are made where they cannot be seen, as in a TorchScript function"
            )
        if report.outside:
            said.append(
                f"{report.outside} calls of dropout that is off, with a rate above 0, belong to no forward or method "
                "of the model, so they stayed off: call a module of the model, or one of its methods"
            )
        return [". ".join(said)] if said else []


def new_seed() -> int:
    """Draws a seed from PyTorch's default generator, so that it follows from torch.manual_seed."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def check_model(model: Any) -> nn.Module:
    """Returns the module itself, or the original of a compiled one. Compiled modules in it run without compilation.

    Raises:
        TypeError: it is no module, or one whose calls cannot be seen, which has a TorchScript module in it.
    """
    original = unwrapped(model)
    for name, module in original.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"the model's module {name!r}" if name else "the model"
            raise TypeError(f"{where} is a TorchScript module, whose random calls cannot be seen: use the original")
    return original


def check_masks(masks: str) -> bool:
    """Returns whether all rows share a mask."""
    if masks not in ("independent", "shared"):
        raise ValueError(f"masks must be 'independent' or 'shared', got {masks!r}")
    return masks == "shared"


def check_sources(model: nn.Module, sources: str | Sequence[str] | None) -> Sequence[str] | None:
    """Returns the patterns as a sequence.

    Raises:
        ValueError: a pattern matches no module.
    """
    if sources is None:
        return None
    patterns = (sources,) if isinstance(sources, str) else tuple(sources)
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fits(pattern, name) for name in names):
            raise ValueError(
                f"sources must name modules of the model, but {pattern!r} matches none: {near(pattern, names[1:])}"
            )
    return patterns


ADVICE = (
    "Does the model have dropout with a rate above 0, do the patterns of `sources` match it, and is the model that was "
    "called the one that was given?"
)


def check_seed(seed: Any) -> int:
    check_integer("seed", seed)
    return seed

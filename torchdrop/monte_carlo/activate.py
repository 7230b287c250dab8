"""Making a model's randomness fire as in train mode, and nothing else: `mc_dropout`.

What is random is not guessed from names. A forward in train mode, on two or three rows of the data and with everything
it might change put back, shows which calls draw. Then, in eval mode, a function mode serves exactly those calls, and
the modules that decide from their own training flag whether to draw (DropPath, LayerDrop) get that flag, alone. A
forward in this mode is compared with the one in train mode, and the report says what came of it.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ..layers.layer_drop import LayerDrop
from .inputs import Inputs
from .masks import Pass, source_seed
from .mode import Recorder, Server, Tracker
from .report import Report
from .state import flags, foreign_states, random_state, undisturbed

_transformed = torch._C._are_functorch_transforms_active

_BRANCHES = 7
"""How often a forward in train mode is repeated if it is random which layers it has."""

_FOREIGN = (
    "In train mode the model also draws from Python's or numpy's generator (SpecAugment, or a LayerDrop of that kind): "
    "what these decide stays as it is in eval mode"
)

_AUGMENTS = re.compile(r"(?i)augment|mixup|cutmix|cutout|masking")


def _has_statistics(module: nn.Module) -> bool:
    return hasattr(module, "running_mean") or hasattr(module, "num_batches_tracked")


def _same_structure(first: Any, second: Any) -> bool:
    (a, one), (b, other) = tree_flatten(first), tree_flatten(second)
    return one == other and all(
        getattr(x, "shape", None) == getattr(y, "shape", None) for x, y in zip(a, b, strict=True)
    )


class Activation:
    """A model whose random calls are served, from `attach` to `detach`.

    Args:
        model: the model.
        patterns: glob patterns of names of modules in which sources are active; None for all.
        dim: the dimension of the inputs that counts rows of data; None if they are one whole.
        begin: called at the start of each forward of the model or of a part of it, whose random state is then put back;
            None if the caller sees to both.
    """

    def __init__(
        self,
        model: nn.Module,
        patterns: Sequence[str] | None,
        dim: int | None,
        begin: Callable[[nn.Module, Inputs], None] | None = None,
    ) -> None:
        self.model, self._patterns, self._dim, self._begin = model, patterns, dim, begin
        self.report = Report(rows=dim)
        self.flagged: set[nn.Module] = set()
        self._surveying = False
        self._forward: ExitStack | None = None
        self._tracker = Tracker(model, self._enter, self._leave)
        self.server = Server(self._tracker, self._chosen)

    def detach(self) -> None:
        self._tracker.close()

    def serving(self) -> AbstractContextManager[Any]:
        """The mode that serves, unless it is on already."""
        return nullcontext() if self.server.entered else self.server

    def _chosen(self, name: str) -> bool:
        if self._patterns is None:
            return True
        parts = name.split(".")
        around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]  # the module itself and those it is a part of
        return any(fnmatch.fnmatchcase(module, pattern) for module in around for pattern in self._patterns)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._surveying:
            return
        self._forward = ExitStack()
        if self._begin is not None:
            self.server.differentiated = torch.is_grad_enabled()
            self._begin(module, Inputs(args, kwargs, self._dim))
            self._tracker.restart()
            self._forward.enter_context(random_state())
        self._forward.enter_context(undisturbed(self.flagged))
        self._forward.enter_context(flags(self.model, self.flagged.__contains__))
        run = self.server.run
        if run is not None and not self.report.replayable and not run.folded and not _transformed():
            torch.manual_seed(source_seed(run.seed, "torch", int(run.samples)) % 2**32)

    def _leave(self) -> None:
        if self._forward is not None and not self._surveying:
            self._forward.close()
            self._forward = None
            self.report.draws = self.server.draws

    def survey(self, module: nn.Module, inputs: Inputs) -> Any:
        """Finds out what is random in a forward of `module`, a part of the model or the whole.

        Returns:
            What it returns for the first three rows.
        """
        self._surveying, differentiated, self.server.differentiated = True, self.server.differentiated, False
        try:
            with torch.no_grad(), random_state(), undisturbed(self.model.modules()):
                try:
                    return self._survey(module, inputs)
                except Exception as error:
                    if inputs.rows is None:
                        raise
                    self._forward_once(module, inputs.copy())  # a model that is broken has an error of its own here
                    raise RuntimeError(
                        f"the model works with its {inputs.rows} rows, but not with the first two or three of them "
                        f"({type(error).__name__}: {error}). Pass batch_dim=None to take the inputs as one whole"
                    ) from error
        finally:
            self._surveying, self.server.differentiated = False, differentiated
            self.server.surveyed = True
            self._tracker.restart()

    def _survey(self, module: nn.Module, inputs: Inputs) -> Any:
        if inputs.rows is None and self._dim is not None:
            self.report.rows = None
            self.report.notes.append(
                "The inputs' tensors do not agree in a number of rows, so they are taken as one whole: masks depend on "
                "the whole of them"
            )
        two, three = inputs.first(2), inputs.first(3)
        stacks = (m for m in self.model.modules() if isinstance(m, LayerDrop))
        skippable = {inner for stack in stacks for inner in stack.modules()}
        recorded = self._train_forward(module, two)
        if recorded is not None and (recorded.branching or skippable):
            for _ in range(_BRANCHES):  # a skipped layer is met another time
                self._train_forward(module, two)
        modules = dict(self.model.named_modules())
        flagged = {modules[name] for name in recorded.flagged if self._chosen(name)} if recorded is not None else set()
        self.flagged = {m for m in flagged if _may_be_flagged(m)}
        if recorded is None:  # shapes at another number of rows, in its place
            self._forward_once(module, two)
        returned = self._forward_once(module, three)
        missing = {modules[s.module] for s in self.server.sources.values() if s.active and not s.served} - self.flagged
        missing = {m for m in missing if _may_be_flagged(m)}
        if missing:
            self.flagged |= missing
            returned = self._forward_once(module, three)
        returned = self._keep_outputs(module, three, returned)
        for source in self.server.sources.values():
            if source.active and not source.served and modules[source.module] not in skippable:
                source.active = False
                source.reason = source.reason or "not reached with the model in eval mode"
        known = set(map(id, self.report.sources))
        self.report.sources += [
            s for s in self.server.sources.values() if (s.active or s.reason) and id(s) not in known
        ]
        return returned

    def _train_forward(self, module: nn.Module, inputs: Inputs) -> Recorder | None:
        """What a forward in train mode draws. Layers with running statistics stay in eval mode."""
        recorder = Recorder(self._tracker, inputs.rows)
        before = foreign_states()
        try:
            with flags(self.model, lambda m: not _has_statistics(m)), recorder, recorder.unseen:
                inputs.call(module)
        except Exception as error:
            self.report.notes.append(
                f"A forward in train mode failed ({type(error).__name__}: {error}), so what is active could not be "
                "compared with it"
            )
            return None
        if before != foreign_states() and _FOREIGN not in self.report.notes:
            self.report.notes.append(_FOREIGN)
        for source in recorder.sources:
            if source.site in self.server.sources:
                continue
            if source.active:
                self.report.expected += source.draws
                source.active = self._chosen(source.module)
                source.reason = source.reason if source.active else "not chosen by the patterns of `sources`"
            self.server.sources[source.site] = source
        self.server.others |= recorder.others
        return recorder

    def _forward_once(self, module: nn.Module, inputs: Inputs) -> Any:
        self.server.begin(Pass(0, torch.zeros((), dtype=torch.int64, device=inputs.device), inputs.rows))
        with flags(self.model, self.flagged.__contains__), self.serving():
            out = inputs.call(module)
        self.report.draws = self.server.draws
        return out

    def _keep_outputs(self, module: nn.Module, inputs: Inputs, returned: Any) -> Any:
        """Takes the flag from modules whose flag changes what the model returns: auxiliary heads, losses."""
        wide = {m for m in self.flagged if any(True for _ in m.parameters()) or any(True for _ in m.children())}
        if not wide:
            return returned
        with flags(self.model, lambda _: False):
            plain = inputs.call(module)
        if _same_structure(plain, returned):
            return returned
        self.flagged -= wide
        for source in self.server.sources.values():
            source.served = False
        returned = self._forward_once(module, inputs)
        modules = dict(self.model.named_modules())
        for source in self.server.sources.values():
            if source.active and not source.served and modules[source.module] in wide:
                source.reason = "its module's training flag changes what the model returns"
        return returned


def _may_be_flagged(module: nn.Module) -> bool:
    return not _has_statistics(module) and not _AUGMENTS.search(type(module).__name__)


def new_seed() -> int:
    """A seed from PyTorch's default generator, so that torch.manual_seed governs."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def check_model(model: Any) -> nn.Module:
    """The module itself.

    Raises:
        TypeError: it is no module, or one whose calls cannot be seen: compiled or scripted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"the model's module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{where} is a TorchScript module, whose random calls cannot be seen: use the original")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"{where} is compiled, so its random calls cannot be seen: use the original (_orig_mod of what "
                "torch.compile returns, or a module on which compile() was not called)"
            )
    return model


def check_masks(masks: str) -> bool:
    """Whether all rows share a mask."""
    if masks not in ("independent", "shared"):
        raise ValueError(f"masks must be 'independent' or 'shared', got {masks!r}")
    return masks == "shared"


def check_sources(model: nn.Module, sources: str | Sequence[str] | None) -> Sequence[str] | None:
    """The patterns as a sequence.

    Raises:
        ValueError: a pattern matches no module.
    """
    if sources is None:
        return None
    patterns = (sources,) if isinstance(sources, str) else tuple(sources)
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, 3, 0.4)
            hint = (
                f"near misses: {', '.join(near)}"
                if near
                else f"there are {', '.join(names[1:9])}{', ...' if len(names) > 9 else ''}"
            )
            raise ValueError(f"sources must name modules of the model, but {pattern!r} matches none: {hint}")
    return patterns


@contextmanager
def mc_dropout(
    model: nn.Module,
    *,
    seed: int | None = None,
    masks: str = "independent",
    sources: str | Sequence[str] | None = None,
    batch_dim: int | None = 0,
) -> Iterator[Report]:
    """Within the context a call of the model is one stochastic pass, whatever mode the model is in.

    Everything random fires that would fire in train mode, and nothing else changes: layers of torchdrop and of
    torch.nn, functional dropout, the dropout inside nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention,
    nn.TransformerEncoder and scaled_dot_product_attention, DropPath, StochasticDepth, DropBlock, StableDropout and
    LayerDrop of other packages. Normalisation uses its running statistics and leaves them alone; auxiliary heads stay
    off. Training flags and all random states are as before after each call.

    The first call of the model, or of a part of it, is preceded by a few forwards on two or three rows of its inputs
    that find out what is random; the report holds the result. The n-th call in the context is sample n: with the same
    seed it has the same masks, row by row, in batches of any size. Gradients flow.

    Args:
        model: the model, in train or eval mode.
        seed: of all masks; drawn from PyTorch's default generator if None.
        masks: "independent": each row of the inputs has its own mask. "shared": all rows have one, so that each call
            evaluates one function.
        sources: glob patterns of the names of modules in which randomness is wanted ("head": all that is in it);
            everything if None.
        batch_dim: the dimension of the inputs that counts rows; None if they are one whole.

    Yields:
        The `Report`, which is filled by the first call.

    Raises:
        TypeError: `model` is no module, or a compiled or scripted one.
        ValueError: a pattern that matches no module, or another value of `masks`.

    Warns:
        UserWarning: at the end, if nothing random was active.

    References:
        Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)).eval()
        >>> x = torch.randn(3, 4)
        >>> with torchdrop.mc_dropout(model, seed=0) as report:
        ...     first, second = model(x), model(x)
        >>> torch.equal(first, second), len(report.active), model.training
        (False, 1, False)
    """
    check_model(model)
    shared = check_masks(masks)
    patterns = check_sources(model, sources)
    chosen_seed = new_seed() if seed is None else check_seed(seed)
    numbers = itertools.count()
    surveyed: set[nn.Module] = set()

    def begin(module: nn.Module, inputs: Inputs) -> None:
        if module not in surveyed:
            activation.survey(module, inputs)
            surveyed.add(module)
        number = torch.tensor(next(numbers), device=inputs.device)
        activation.server.begin(Pass(chosen_seed, number, inputs.rows, shared=shared))

    activation = Activation(model, patterns, batch_dim, begin)
    try:
        with activation.server:
            yield activation.report
    finally:
        activation.detach()
    if not activation.report.active:
        what = "nothing random is active in the model" if surveyed else "the model was not called"
        warnings.warn(f"mc_dropout: {what}. {ADVICE}", UserWarning, stacklevel=3)


ADVICE = (
    "Does the model have dropout with a rate above 0, do the patterns of `sources` match it, and is the model that was "
    "called the one that was given?"
)


def check_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    return seed

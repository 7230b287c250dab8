"""Turning a model's randomness on as in train mode, and nothing else: `mc_dropout`.

Random calls are not guessed from names. A forward in train mode, on two or three rows of the data, shows which calls
draw (see `survey`). Then, in eval mode, a function mode serves exactly those calls, and only the modules that decide
from their own training flag whether to draw (DropPath, LayerDrop) get that flag. A forward in this mode is compared
with the one in train mode, and the report has the result. All of it happens to shells of the modules.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..core import sites
from ..core.checks import check_integer, unwrapped
from ..core.names import fits, matches, near
from ..core.torch_state import transforms_active, tree_flatten
from ..handlers.base import refuse_backward
from ..handlers.calls import RandomCall
from ..handlers.masks import Pass
from ..handlers.random_functions import DESCRIBE
from ..handlers.substitute import Substitute, UnknownSourceError
from ..handlers.tracker import Tracker, inner_names
from ..seeding import start
from .copies import UncopyableError
from .inputs import Inputs
from .redirect import Redirected, next_level
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
        self, inputs: Inputs, module: nn.Module | None = None, method: str | None = None, hooks: bool = False
    ) -> Any:
        """Finds the randomness in a call of the model or of a part of it: see `Survey`."""
        return Survey(self, module or self.model, method or self._method).run(inputs, hooks)

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Within it, a random call that the survey has not seen, because hooks did not run in it, raises an error."""
        self.server.strict = not self.complete
        try:
            yield
        finally:
            self.server.strict = False

    def call(self, inputs: Inputs) -> Any:
        """Returns the model's output in a pass that the server has begun. Its mode is on. The model does not change."""
        self.tracker.restart()
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

    def warn_of_omissions(self, caller: str, stacklevel: int) -> None:
        """Warns of sources that stay off although they draw in train mode and were not left out on purpose."""
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
        if said:
            warnings.warn(f"{caller}: {'. '.join(said)}", UserWarning, stacklevel=stacklevel + 1)


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


@contextmanager
def mc_dropout(
    model: nn.Module,
    *,
    seed: int | None = None,
    masks: str = "independent",
    sources: str | Sequence[str] | None = None,
    batch_dim: int | None = 0,
) -> Iterator[Report]:
    """Within the context, a call of the model is one stochastic pass, in either mode of the model.

    Everything draws that would draw in train mode, and nothing else changes: layers of torchdrop and of torch.nn,
    functional dropout, the dropout inside nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention, nn.TransformerEncoder and
    scaled_dot_product_attention, DropPath, StochasticDepth, DropBlock, StableDropout and LayerDrop of other packages.
    Normalization uses its running statistics and does not update them; auxiliary heads and augmentation stay off.
    Training flags are never changed, and random states are as before after each call.

    Before the first call of the model, or of a part of it, a few forwards on two or three rows of its inputs find the
    random calls; the report has the result. The n-th call in the context is sample n: with the same seed it has the
    same masks, row by row, in batches of any size. A call of another method of the model, such as ``model.encode(x)``,
    is a sample as well; dropout in its own code is served, with masks that depend on the batch. Gradients flow.

    The context belongs to the thread that enters it: calls in other threads are ordinary ones, and several threads can
    be in contexts of one model at once.

    Args:
        model: the model, in train or eval mode. What is compiled in it runs without compilation.
        seed: the seed of all masks; drawn from PyTorch's default generator if None.
        masks: "independent": each row of the inputs has its own mask. "shared": all rows have one, so that each call
            evaluates one function.
        sources: glob patterns of the names of modules whose randomness is wanted ("head" includes all modules in it);
            everything if None.
        batch_dim: the dimension of the inputs that counts rows; None if they are one whole.

    Yields:
        The `Report`, which is filled by the first call.

    Raises:
        TypeError: `model` is no module, or has a scripted one in it.
        ValueError: a pattern that matches no module, or another value of `masks`.

    Warns:
        UserWarning: at the end, if nothing random was active, if something that is random in train mode could not be
            made to draw, or if dropout was called, off, outside of all forwards and methods of the model.

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
    original = check_model(model)
    shared = check_masks(masks)
    activation = Activation(original, check_sources(original, sources), batch_dim)
    context = _Context(activation, model, new_seed() if seed is None else check_seed(seed), shared)
    with context:
        yield context.activation.report
    context.activation.warn_of_omissions("mc_dropout", 3)
    report = context.activation.report
    if not report.active:
        what = "nothing random is active in the model" if report.called else "the model was not called"
        warnings.warn(f"mc_dropout: {what}. {ADVICE}{report.noted()}", UserWarning, stacklevel=3)


class _Context:
    """The handler of calls of the model's modules, and of its methods, within `mc_dropout`."""

    def __init__(self, activation: Activation, called: nn.Module, seed: int, shared: bool) -> None:
        self.activation, self._called = activation, called
        self._seed, self._shared = seed, shared
        self._next = 0
        self._surveyed: set[tuple[nn.Module, str]] = set()
        self._redirected = Redirected(called, self._call)
        self._around: set[Any] = set()  # the frames that the block is in
        self._outermost: Any = None

    def __enter__(self) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            self._around.add(frame)
            frame = frame.f_back
        self.activation.server.elsewhere = self._elsewhere
        self._redirected.__enter__()
        self.activation.server.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.activation.server.__exit__(*exception)
        self._redirected.__exit__(*exception)
        self._around.clear()
        self._outermost = None

    def _call(self, module: nn.Module, attribute: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serves a call of a module of the model, or of the compiled form of it."""
        module = self.activation.model if module is self._called else module
        activation, inputs = self.activation, Inputs(args, kwargs, self.activation.dim)
        server, shells = activation.server, activation.shells
        method = "forward" if attribute == "forward" else "__call__"
        if activation.tracker.running:  # through a reference that the shells do not have
            return inputs.call(shells.method(module, method))
        refuse_backward()
        server.differentiated = torch.is_grad_enabled()
        if (module, method) not in self._surveyed:
            self._surveyed.add((module, method))
            self._survey(inputs, module, method)
        before, outermost = self._next, self._frames()[1]
        try:
            return self._sampled(module, method, inputs, outermost)
        except UnknownSourceError:  # so a hook draws: it has to see the forwards of a survey, too
            self._next, self._outermost = before, None
            activation.survey(inputs, module, method, hooks=True)
            return self._sampled(module, method, inputs, outermost)

    def _survey(self, inputs: Inputs, module: nn.Module, method: str) -> None:
        """Surveys a call before it is made, if its arguments can be copied."""
        report = self.activation.report
        try:
            self.activation.survey(inputs, module, method)
        except UncopyableError as error:
            report.called = True
            report.notes.append(
                f"There was no survey: {error}. What draws only in train mode stays off, and masks depend on the batch"
            )
        except Exception:
            report.called = True
            self._surveyed.discard((module, method))
            raise

    def _sampled(self, module: nn.Module, method: str, inputs: Inputs, outermost: Any) -> Any:
        """Makes a pass that is a sample, or a part of one."""
        activation, shells = self.activation, self.activation.shells
        self._begin(outermost, inputs.rows, inputs.device)
        apart = activation.flagged.__contains__
        with activation.kept_states(), activation.own_numbers(), activation.strict():
            shells.refresh(apart, apart, copies=False)
            out = inputs.call(shells.method(module, method))
            shells.write_back(apart)
        self._told()
        return out

    def _begin(self, outermost: Any, rows: int | None, device: torch.device) -> None:
        """Begins the next sample, or goes on with the one that a method of the model has begun."""
        server, draws = self.activation.server, 0
        if outermost is None or outermost is not self._outermost:
            self._number = torch.tensor(self._next, device=device)
            self._next += 1
            self.activation.tracker.restart()
            self._outermost = outermost
        else:
            draws = server.draws
        server.begin(Pass(self._seed, self._number.to(device), rows, shared=self._shared))
        server.draws = draws

    def _told(self) -> None:
        self.activation.report.draws = self.activation.server.draws
        self.activation.list_sources()

    def _elsewhere(self, server: Substitute, func: Any, args: Any, kwargs: Any) -> Any:
        """Serves a random call, or a layer's question if it is on, while no module of the model runs."""
        owner, outermost, foreign = self._frames()
        if owner is None:
            if not foreign and _is_left_off(server, func, args, kwargs):
                self.activation.report.outside += 1
            return func(*args, **kwargs)
        refuse_backward()
        tensor = next((leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)), None)
        if outermost is not self._outermost or server.run is None:
            server.differentiated = torch.is_grad_enabled()
        self._begin(outermost, None, torch.device("cpu") if tensor is None else tensor.device)
        out = server.serve_in(owner, func, args, kwargs)
        self._told()
        return out

    def _frames(self) -> tuple[str | None, Any, bool]:
        """Returns the module of the model whose method makes this call within the block, the frame of the first such
        method, and whether another model's module makes the call."""
        names, owner, outermost, foreign = self.activation.shells.names, None, None, False
        frame: Any = sys._getframe(2)
        while frame is not None and frame not in self._around:
            code = frame.f_code
            if code.co_varnames[:1] == ("self",) and frame.f_globals.get("__name__") != nn.Module.__module__:
                module = frame.f_locals.get("self")
                if isinstance(module, nn.Module):
                    if module in names:
                        owner, outermost = names[module] if owner is None else owner, frame
                    elif owner is None:
                        foreign = True
            frame = frame.f_back
        return (None if foreign else owner), outermost, foreign


def _is_left_off(server: Substitute, func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is dropout that has a rate and is off."""
    if func is sites.is_on:
        return not args[0]
    if func not in DESCRIBE or "dropout" not in func.__name__:
        return False
    draw: RandomCall = DESCRIBE[func](server, func, *args, **kwargs)
    return not draw.on and not draw.flagged and bool(draw.rate)


ADVICE = (
    "Does the model have dropout with a rate above 0, do the patterns of `sources` match it, and is the model that was "
    "called the one that was given?"
)


def check_seed(seed: Any) -> int:
    check_integer("seed", seed)
    return seed

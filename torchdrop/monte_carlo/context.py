"""`mc_dropout`: a context in which each call of a model is one stochastic pass."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core import sites
from ..core.torch_state import tree_flatten, without_function_modes
from ..handlers.base import refuse_backward
from ..handlers.calls import RandomCall
from ..handlers.masks import Pass
from ..handlers.random_functions import DESCRIBE
from ..handlers.substitute import Substitute, UnknownSourceError
from .activate import ADVICE, Activation, check_masks, check_model, check_seed, check_sources, new_seed
from .copies import UncopyableError
from .inputs import Inputs
from .redirect import Redirected
from .report import Report


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
    same masks, row by row, in batches of any size. Within ``report.sample(n)`` every call has those of sample n. A call
    of another method of the model, such as ``model.encode(x)``, is a sample as well; dropout in its own code is served,
    with masks that depend on the batch. Gradients flow.

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
    context = Context(activation, model, new_seed() if seed is None else check_seed(seed), shared)
    with context:
        yield context.activation.report
    for what in context.activation.omissions():
        warnings.warn(f"mc_dropout: {what}", UserWarning, stacklevel=3)
    report = context.activation.report
    if not report.active and not context.failed:
        what = "nothing random is active in the model" if report.called else "the model was not called"
        warnings.warn(f"mc_dropout: {what}. {ADVICE}{report.noted()}", UserWarning, stacklevel=3)


class Context:
    """The handler of calls of the model's modules, and of its methods, within `mc_dropout`.

    Attributes:
        watch: is called with the inputs of each call of the model, or of a part of it, before that is made.
    """

    def __init__(self, activation: Activation, called: nn.Module, seed: int, shared: bool) -> None:
        self.activation, self._called = activation, called
        self._seed, self._shared = seed, shared
        self._next = 0
        self._fixed: int | None = None
        self._surveyed: set[tuple[nn.Module, str]] = set()
        self._redirected = Redirected(called, self._call)
        self.failed = False
        self.watch: Callable[[Inputs], None] = lambda inputs: None
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
        self.activation.report._fix = self._sample

    def __exit__(self, *exception: Any) -> None:
        self.activation.report._fix = None
        self.activation.server.__exit__(*exception)
        self._redirected.__exit__(*exception)
        self._around.clear()
        self._outermost = None

    def _call(self, module: nn.Module, attribute: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serves a call of a module of the model, or of the compiled form of it."""
        activation = self.activation
        module = activation.model if module is self._called else module
        method = "forward" if attribute == "forward" else "__call__"
        if activation.tracker.running:  # through a reference that the shells do not have
            return activation.shells.method(module, method)(*args, **kwargs)
        refuse_backward()
        try:
            with without_function_modes():  # the server's mode would see each look at a tensor
                inputs = Inputs(args, kwargs, activation.dim)
            return self._served(module, method, inputs)
        except Exception:
            self.failed = True
            raise

    def _served(self, module: nn.Module, method: str, inputs: Inputs) -> Any:
        activation = self.activation
        activation.server.differentiated = torch.is_grad_enabled()
        if (module, method) not in self._surveyed:
            self._survey(inputs, module, method)
            self._surveyed.add((module, method))
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

    def _sampled(self, module: nn.Module, method: str, inputs: Inputs, outermost: Any) -> Any:
        """Makes a pass that is a sample, or a part of one."""
        activation, shells = self.activation, self.activation.shells
        with without_function_modes():
            self._begin(outermost, inputs.rows, inputs.device)
            self.watch(inputs)
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
        if self._fixed is not None:
            self._number = torch.tensor(self._fixed, device=device)
            self.activation.tracker.restart()
        elif outermost is None or outermost is not self._outermost:
            self._number = torch.tensor(self._next, device=device)
            self._next += 1
            self.activation.tracker.restart()
            self._outermost = outermost
        else:
            draws = server.draws
        server.begin(Pass(self._seed, self._number.to(device), rows, shared=self._shared))
        server.draws = draws

    @contextmanager
    def _sample(self, number: int) -> Iterator[None]:
        """Gives every call within it the masks of this sample."""
        before, self._fixed = self._fixed, number
        try:
            yield
        finally:
            self._fixed, self._outermost = before, None

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

"""`KeepProbScheduler`: keep probabilities that follow schedules. The one stateful piece; its state is the step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ._extras import axes_or_new
from .configure.rate_sites import RateSite, check_keep_prob, compiled_parts, names_of
from .configure.rates import chosen, shown
from .core.checks import check_integer, unwrapped
from .core.names import near
from .core.rate import Probability
from .rules import Rule
from .schedules import Scaled, ScheduleLike, as_schedule, keep_prob_at

_POINTS = 500


@dataclass
class _Scheduled:
    """A layer, the pattern that chose it, the rate asked for it, and its own keep_prob from before, which is None for a
    call that has not been made yet."""

    site: RateSite
    pattern: str
    asked: Any
    own: Probability | None
    last: Probability = 1.0

    def at(self, step: int) -> float:
        """Returns the layer's keep_prob.

        Raises:
            TypeError, ValueError: the schedule gives no keep_prob at that step. The message names the layer.
        """
        schedule, name = self.asked, self.site.name
        if isinstance(schedule, Scaled):
            if self.own is None:
                raise ValueError(
                    f"{schedule!r} cannot scale the rate of {name!r}, which the model's code has not passed yet: run "
                    "the model once in train mode first"
                )
            if isinstance(self.own, Tensor):
                raise TypeError(
                    f"{schedule!r} cannot scale the rate of {name!r}, a tensor: give the layer a number first"
                )
            try:
                schedule = schedule.of(self.own)
            except ValueError as error:
                raise ValueError(f"{error}, for {name!r}") from None
        return keep_prob_at(schedule, step, name)

    def checked(self, step: int) -> Probability:
        """Returns the layer's keep_prob, in a form that the layer can hold."""
        value = self.at(step)
        try:
            return self.site.check(value)
        except ValueError as error:
            raise ValueError(f"{error}, at step {step} of the schedule of {self.site.name!r}") from None


class KeepProbScheduler:
    """Lets keep probabilities follow schedules, layer by layer.

    As with PyTorch's learning-rate schedulers, creating one sets the rates of step 0, and ``step()``, called after the
    optimizer's, sets those of the next step. The caller calls it once a batch or once an epoch. Layers of torchdrop in
    a compiled model are not recompiled.

    Args:
        model: any module; a compiled one has the names of its original.
        rates: for each pattern (see `set_keep_prob`) a schedule of `torchdrop.schedules`, a number, or a function from
            step to keep_prob. ``schedules.scale`` multiplies each layer's own rate, as it is now.

    Attributes:
        model: the model that has these layers; the original of a compiled one.
        last_step: the number of the step whose rates are set.

    Raises:
        TypeError: a value is none of these.
        ValueError: a pattern that matches no layer with a rate, or a keep_prob outside [0, 1] at step 0. A layer keeps
            its rate then, and in ``step()``, which also raises if a layer is no longer in the model.

    Warns:
        UserWarning: the model is compiled and a layer is not torchdrop's, so that every new rate would recompile it.

    References:
        Morerio et al., "Curriculum Dropout", ICCV 2017; Rennie et al., "Annealed dropout training of deep networks",
        SLT 2014; Liu et al., "Dropout Reduces Underfitting", ICML 2023: schedules of this kind.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop import schedules
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torchdrop.Dropout(0.2), torchdrop.Dropout(0.4))
        >>> scheduler = torchdrop.KeepProbScheduler(model, {"1": schedules.linear(1.0, 0.5, 10), "2": 0.6})
        >>> for _ in range(4):
        ...     scheduler.step()
        >>> scheduler.get_last_keep_prob()
        {'1': 0.8, '2': 0.6}
        >>> state = scheduler.state_dict()
        >>> scheduler.load_state_dict(state)
    """

    def __init__(self, model: nn.Module, rates: Mapping[str, ScheduleLike | Scaled]) -> None:
        self.model: nn.Module = unwrapped(model)
        self._layers = [
            _Scheduled(site, pattern, asked, site.keep_prob if site.is_known else None)
            for pattern, found in chosen(model, rates).items()
            for asked in (_readable(pattern, rates[pattern]),)
            for site in found
        ]
        self.last_step: int = 0
        self.seek(0)
        compiled = {inner for part in compiled_parts(model) for inner in part.modules()}
        stock = [layer.site.name for layer in self._layers if layer.site.module in compiled and layer.site.recompiles]
        if stock:
            warnings.warn(
                f"KeepProbScheduler: the model is compiled, and a new rate of {', '.join(stock)} recompiles "
                "it, because "
                "these are not torchdrop's layers: torchdrop.replace(model) makes torch.nn's so",
                UserWarning,
                stacklevel=2,
            )

    def step(self) -> None:
        """Goes on by one step and sets its rates.

        Raises:
            ValueError: a schedule leaves [0, 1] at that step, or a layer is no longer in the model. Nothing is changed.
        """
        self.seek(self.last_step + 1)

    def seek(self, step: int) -> None:
        """Goes to a step, such as a trainer's global step, and sets its rates. Raises as `step` does.

        Args:
            step: 0 or more.
        """
        step = check_integer("step", step, least=0)
        self._check_layers()
        values = [layer.checked(step) for layer in self._layers]
        for layer, value in zip(self._layers, values, strict=True):
            layer.site.set(value)
            layer.last = value if layer.site.is_disabled else layer.site.keep_prob
        self.last_step = step

    def _check_layers(self) -> None:
        moved = [layer for layer in self._layers if not _is_there(self.model, layer.site)]
        if not moved:
            return
        there = names_of(self.model)
        names = [name for every in there.values() for name in every if name]
        for layer in moved:
            site = layer.site
            if site.module in there and site.is_there:  # under another name, or in a part that has been compiled
                continue
            hint = "another one has its name" if site.name in names else near(site.name, names)
            raise ValueError(
                f"the layer {site.name!r}, scheduled by {layer.pattern!r}, is no longer in the model ({hint}): "
                "create the scheduler after changing the model"
            )

    def get_last_keep_prob(self) -> dict[str, Probability]:
        """Returns the keep_prob that this scheduler has set last, for each of its layers by name."""
        return {layer.site.name: layer.last for layer in self._layers}

    def state_dict(self) -> dict[str, Any]:
        """Returns the step, and the layers with the rates that they had before, which ``schedules.scale`` multiplies.

        The schedules are not in it: as with learning rates, create the scheduler with them and then load.
        """
        return {"step": self.last_step, "layers": {layer.site.name: layer.own for layer in self._layers}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes to the step of a state, and sets its rates.

        Raises:
            ValueError: it is not the state of a scheduler of these layers. Nothing is changed.
        """
        if (
            not isinstance(state_dict, Mapping)
            or set(state_dict) != {"step", "layers"}
            or not isinstance(state_dict["layers"], Mapping)
        ):
            raise ValueError(
                "state_dict must be what KeepProbScheduler.state_dict() returned, with 'step' and 'layers'"
            )
        layers, own = state_dict["layers"], [layer.site.name for layer in self._layers]
        missing, unknown = [n for n in own if n not in layers], [n for n in layers if n not in own]
        if missing or unknown:
            raise ValueError(
                "this is the state of another model's scheduler, or of one with other patterns: "
                f"it lacks {missing or 'nothing'} and has {unknown or 'nothing'} that is not scheduled here"
            )
        for value in layers.values():
            if value is not None:
                check_keep_prob(value)
        before = [layer.own for layer in self._layers]
        for layer in self._layers:
            layer.own = layers[layer.site.name]
        try:
            self.seek(state_dict["step"])
        except Exception:
            for layer, value in zip(self._layers, before, strict=True):
                layer.own = value
            raise

    def __repr__(self) -> str:
        names = [layer.site.name or "(model)" for layer in self._layers]
        width = max(map(len, names), default=0)
        lines = [f"KeepProbScheduler at step {self.last_step}"]
        for name, layer in zip(names, self._layers, strict=True):
            lines.append(f"  {name:{width}}  {shown(layer.last):8}  {layer.asked!r}")
        return "\n".join(lines)

    def plot(self, steps: int, ax: Any = None) -> Any:
        """Plots the keep_prob of every layer over the steps from 0 on; layers that share all values share a line.

        Args:
            steps: the number of steps, at least 1.
            ax: the matplotlib Axes to draw on; new ones if None (``pip install 'torchdrop[uncertainty]'``).

        Returns:
            The Axes.

        Raises:
            ValueError: a schedule leaves [0, 1] at one of the steps shown.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
        ax = axes_or_new(ax)
        shown_at = sorted({round(i * steps / _POINTS) for i in range(_POINTS + 1)})
        lines: dict[tuple[float, ...], list[str]] = {}
        for layer in self._layers:
            values = tuple(layer.at(step) for step in shown_at)
            lines.setdefault(values, []).append(layer.site.name or "(model)")
        for values, names in lines.items():
            label = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            ax.plot(shown_at, values, label=f" {label}" if label.startswith("_") else label)  # matplotlib hides those
        ax.set(xlabel="step", ylabel="keep_prob", ylim=(-0.03, 1.03))
        ax.legend(frameon=False, fontsize=8)
        return ax


def _readable(pattern: str, asked: Any) -> Any:
    if isinstance(asked, Scaled):
        return asked
    if isinstance(asked, Rule):
        raise TypeError(
            f"{pattern!r} has a rule over layers, {asked!r}, and no schedule over steps: set it with "
            "torchdrop.set_keep_prob, and let schedules.scale(...) multiply the rates it gives"
        )
    if callable(asked) and not _takes_a_step(asked):
        raise TypeError(
            f"{pattern!r} has {getattr(asked, '__name__', asked)}{inspect.signature(asked)}, which cannot be called "
            "with a step alone: give what it makes, as in schedules.linear(1.0, 0.5, 1000), or a function of the step"
        )
    try:
        return as_schedule(asked)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, for the pattern {pattern!r}") from None


def _takes_a_step(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:  # some builtin functions have no signature
        pass
    return True


def _is_there(model: nn.Module, site: RateSite) -> bool:
    """Whether the layer is under its name in the model, without a search for other layers."""
    module: nn.Module | None = model
    names = site.name.split(".") if site.name else []
    for part in names[:-1] if names and site.attribute and names[-1] == site.attribute else names:
        module = module._modules.get(part) if module is not None else None
    return module is site.module and site.is_there

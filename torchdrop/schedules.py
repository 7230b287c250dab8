"""Keep probabilities over training: pure functions step -> keep_prob, and functions that combine them.

Values come first, then steps. Values are probabilities of keeping, in [0, 1]; `steps` and `period` are positive
integers, boundaries positive integers that increase. A factory raises a TypeError for another type and a ValueError for
another value. A step is a real number >= 0: any `numbers.Real`, or a 0-d array or tensor; updates or epochs alike.
Wherever a schedule is taken, any callable step -> float will do, and so will a number, which is constant.
"""

from __future__ import annotations

import math
import numbers
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

StepFunction = Callable[[Any], float]
ScheduleLike = StepFunction | float


@dataclass(frozen=True, repr=False)
class Schedule:
    """A function step -> keep_prob, made by a factory of this module; called with a step it returns a float in [0, 1].

    It is immutable. It is printed and pickled as the call that made it, and is equal to the result of an equal call.

    Example:
        >>> schedule = linear(1.0, 0.5, 100)
        >>> schedule, schedule(50), schedule == linear(1, 0.5, 100)
        (linear(1.0, 0.5, 100), 0.75, True)
    """

    factory: Callable[..., Schedule]
    arguments: tuple[Any, ...]
    function: Callable[[float, str], float] = field(compare=False)
    keywords: tuple[tuple[str, Any], ...] = ()

    def __call__(self, step: Any) -> float:
        return keep_prob_at(self, step)

    def __repr__(self) -> str:
        given = [repr(list(a) if isinstance(a, tuple) else a) for a in self.arguments]
        given += [f"{name}={value!r}" for name, value in self.keywords]
        return f"{self.factory.__qualname__}({', '.join(given)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(self.factory, **dict(self.keywords)), self.arguments


@dataclass(frozen=True, repr=False)
class Scaled:
    """The result of `scale`: not a schedule itself, but a source of one for each layer, from its own keep_prob."""

    factor: StepFunction | float

    def of(self, keep_prob: float) -> Schedule:
        """Returns the schedule keep = 1 - (1 - keep_prob) factor(t) of a layer whose own keep probability this is.

        A constant factor that would drop with a probability above 1 is refused here, any other one at its step.
        """
        keep_prob = _rate("keep_prob", keep_prob)
        if isinstance(self.factor, float):
            _scaled(keep_prob, self.factor, "")
        return Schedule(Scaled.of, (self, keep_prob), lambda t, at: _scaled(keep_prob, self._factor_at(t, at), at))

    def _factor_at(self, step: float, place: str) -> float:
        if isinstance(self.factor, Schedule):
            return _evaluate(self.factor, step, place)
        return _real("factor", self.factor(step), place) if callable(self.factor) else self.factor

    def __repr__(self) -> str:
        return f"scale({self.factor!r})"


def keep_prob_at(schedule: ScheduleLike, step: Any, where: str = "") -> float:
    """Returns the checked keep probability at a step of a schedule, a callable or a number.

    Args:
        where: a pattern or the name of a layer that has the schedule, for the error message.

    Raises:
        TypeError: the step, or the result of the schedule, is no number.
        ValueError: the step is negative or not finite, or the keep probability is outside [0, 1].

    Example:
        >>> keep_prob_at(lambda step: 0.1 * step, 12, where="fc*")
        Traceback (most recent call last):
        ValueError: keep_prob must be in [0, 1], got 1.2000000000000002 at step 12 from the schedule of 'fc*'
    """
    number = _real("step", step)
    if not 0 <= number < math.inf:
        raise ValueError(f"step must be finite and not negative, got {step}")
    step = int(step) if isinstance(step, numbers.Integral) else number
    place = f" at step {step}" + (f" from the schedule of {where!r}" if where else "")
    return _evaluate(as_schedule(schedule), step, place)


def as_schedule(value: ScheduleLike) -> StepFunction:
    """Returns a number as a constant schedule, and a callable as it is; raises a TypeError for anything else.

    Example:
        >>> as_schedule(0.9), as_schedule(math.exp) is math.exp
        (constant(0.9), True)
    """
    if isinstance(value, Scaled):
        raise TypeError(f"a schedule must be a number or a callable, got {value!r}: take its .of(keep_prob) of a layer")
    return value if callable(value) else constant(_real("a schedule that is not callable", value))


def constant(keep_prob: float) -> Schedule:
    """keep = keep_prob at every step.

    Example:
        >>> constant(0.8)(0), constant(0.8)(1000)
        (0.8, 0.8)
    """
    keep_prob = _rate("keep_prob", keep_prob)
    return Schedule(constant, (keep_prob,), lambda t, _: keep_prob)


def linear(start: float, end: float, steps: int) -> Schedule:
    """keep = start + (end - start) min(1, t / steps): `end` is held from step `steps` on.

    Example:
        >>> [linear(1.0, 0.5, 100)(t) for t in (0, 50, 100, 1000)]
        [1.0, 0.75, 0.5, 0.5]
    """
    start, end, steps = _rate("start", start), _rate("end", end), _count("steps", steps)
    return Schedule(linear, (start, end, steps), lambda t, _: _between(start, end, _progress(t, steps)))


def cosine(start: float, end: float, steps: int) -> Schedule:
    """keep = end + (start - end) (1 + cos(pi min(1, t / steps))) / 2: half a cosine, then `end`.

    Example:
        >>> [round(cosine(1.0, 0.5, 100)(t), 12) for t in (0, 50, 100, 1000)]
        [1.0, 0.75, 0.5, 0.5]
    """
    start, end, steps = _rate("start", start), _rate("end", end), _count("steps", steps)
    return Schedule(cosine, (start, end, steps), lambda t, _: _between(start, end, _wave(_progress(t, steps) / 2)))


def exponential(start: float, end: float, steps: int) -> Schedule:
    """keep = start (end / start) ** min(1, t / steps): geometric, from a `start` > 0 to an `end` > 0, then `end`.

    Example:
        >>> [exponential(1.0, 0.25, 100)(t) for t in (0, 50, 100, 1000)]
        [1.0, 0.5, 0.25, 0.25]
    """
    start, end, steps = _rate("start", start), _rate("end", end), _count("steps", steps)
    if start == 0 or end == 0:
        raise ValueError(f"start and end must be positive, got {start} and {end}: no geometric sequence reaches 0")
    return Schedule(exponential, (start, end, steps), lambda t, _: _geometric(start, end, _progress(t, steps)))


def piecewise(values: Iterable[float], boundaries: Iterable[int]) -> Schedule:
    """keep = values[i] from step boundaries[i - 1] on, values[0] before the first: one more value than boundaries.

    Example:
        >>> [piecewise([1.0, 0.8, 0.5], [10, 20])(t) for t in (0, 9, 10, 19, 20, 1000)]
        [1.0, 1.0, 0.8, 0.8, 0.5, 0.5]
    """
    rates = tuple(_rate(f"values[{i}]", value) for i, value in enumerate(_items("values", values)))
    steps = _boundaries(boundaries, "values", len(rates))
    return Schedule(piecewise, (rates, steps), lambda t, _: rates[bisect_right(steps, t)])


def triangular(start: float, end: float, period: int) -> Schedule:
    """keep goes linearly from `start` to `end` in period / 2 steps and back in as many, for ever.

    Example:
        >>> [triangular(1.0, 0.5, 100)(t) for t in (0, 25, 50, 75, 100, 150)]
        [1.0, 0.75, 0.5, 0.75, 1.0, 0.5]
    """
    start, end, period = _rate("start", start), _rate("end", end), _count("period", period)
    return Schedule(triangular, (start, end, period), lambda t, _: _between(start, end, _tent(t % period / period)))


def cyclic(start: float, end: float, period: int) -> Schedule:
    """keep = end + (start - end) (1 + cos(2 pi t / period)) / 2: `end` at half a period and back, for ever.

    Example:
        >>> [round(cyclic(1.0, 0.5, 100)(t), 12) for t in (0, 25, 50, 75, 100, 150)]
        [1.0, 0.75, 0.5, 0.75, 1.0, 0.5]
    """
    start, end, period = _rate("start", start), _rate("end", end), _count("period", period)
    return Schedule(cyclic, (start, end, period), lambda t, _: _between(start, end, _wave(t % period / period)))


def v_shaped(start: float, middle: float, steps: int) -> Schedule:
    """keep goes linearly from `start` to `middle` at steps / 2 and back to `start` at `steps`, which it holds.

    Example:
        >>> [v_shaped(1.0, 0.5, 100)(t) for t in (0, 25, 50, 75, 100, 150)]
        [1.0, 0.75, 0.5, 0.75, 1.0, 1.0]
    """
    start, middle, steps = _rate("start", start), _rate("middle", middle), _count("steps", steps)
    return Schedule(v_shaped, (start, middle, steps), lambda t, _: _between(start, middle, _tent(_progress(t, steps))))


def curriculum(keep_prob: float, steps: int) -> Schedule:
    """keep = (1 - keep_prob) exp(-10 t / steps) + keep_prob: no dropout at first, within 5e-5 of keep_prob at `steps`.

    References:
        Morerio et al., "Curriculum Dropout", ICCV 2017: gamma = 10 / T, T the number of updates.

    Example:
        >>> [round(curriculum(0.5, 100)(t), 4) for t in (0, 10, 100, 1000)]
        [1.0, 0.6839, 0.5, 0.5]
    """
    k, n = _rate("keep_prob", keep_prob), _count("steps", steps)
    return Schedule(curriculum, (k, n), lambda t, _: k + (1 - k) * math.exp(-10 * (t / n)))


def annealed(start: float, steps: int) -> Schedule:
    """keep = 1 - (1 - start) max(0, 1 - t / steps): the drop probability falls linearly to 0 at `steps`.

    References:
        Rennie, Goel, Thomas, "Annealed dropout training of deep networks", SLT 2014.

    Example:
        >>> [annealed(0.5, 100)(t) for t in (0, 50, 100, 1000)]
        [0.5, 0.75, 1.0, 1.0]
    """
    start, steps = _rate("start", start), _count("steps", steps)
    return Schedule(annealed, (start, steps), lambda t, _: _between(start, 1.0, _progress(t, steps)))


def early(keep_prob: float, steps: int, *, decay: Literal["linear", "constant"] = "linear") -> Schedule:
    """Dropout in the first `steps` steps only: p = (1 - keep_prob) (1 - t / steps), or 1 - keep_prob, and then 0.

    The linear decay of the authors' code is at 0 one step sooner: at `steps` - 1, the last step of the early phase.

    References:
        Liu et al., "Dropout Reduces Underfitting", ICML 2023, arXiv:2303.01500: early dropout.

    Example:
        >>> [early(0.5, 100)(t) for t in (0, 50, 100)], [early(0.5, 100, decay="constant")(t) for t in (0, 99, 100)]
        ([0.5, 0.75, 1.0], [0.5, 0.5, 1.0])
    """
    if decay not in ("linear", "constant"):
        raise ValueError(f"decay must be 'linear' or 'constant', got {decay!r}")
    keep_prob, steps = _rate("keep_prob", keep_prob), _count("steps", steps)
    if decay == "linear":
        return Schedule(early, (keep_prob, steps), annealed(keep_prob, steps).function, (("decay", decay),))
    return Schedule(early, (keep_prob, steps), lambda t, _: 1.0 if t >= steps else keep_prob, (("decay", decay),))


def late(keep_prob: float, steps: int) -> Schedule:
    """No dropout in the first `steps` steps, keep_prob afterwards: late dropout, from the paper of `early`.

    Example:
        >>> [late(0.5, 100)(t) for t in (0, 99, 100)]
        [1.0, 1.0, 0.5]
    """
    keep_prob, steps = _rate("keep_prob", keep_prob), _count("steps", steps)
    return Schedule(late, (keep_prob, steps), lambda t, _: keep_prob if t >= steps else 1.0)


def warm_up(then: ScheduleLike, steps: int) -> Schedule:
    """keep = 1 - (1 - then(t)) min(1, t / steps): the drop probability of `then`, ramped in while `then` goes on.

    Example:
        >>> [warm_up(0.5, 100)(t) for t in (0, 50, 100, 1000)]
        [1.0, 0.75, 0.5, 0.5]
    """
    then, steps = as_schedule(then), _count("steps", steps)
    return Schedule(warm_up, (then, steps), lambda t, at: _scaled(_evaluate(then, t, at), _progress(t, steps), at))


def join(schedules: Iterable[ScheduleLike], boundaries: Iterable[int]) -> Schedule:
    """``keep = schedules[i](t - boundaries[i - 1])`` from step boundaries[i - 1] on: each has its own start.

    Example:
        >>> [join([linear(1.0, 0.5, 10), linear(0.5, 1.0, 10)], [20])(t) for t in (0, 10, 20, 25, 30)]
        [1.0, 0.5, 0.5, 0.75, 1.0]
    """
    parts = tuple(as_schedule(schedule) for schedule in _items("schedules", schedules))
    starts = _boundaries(boundaries, "schedules", len(parts))

    def function(step: float, place: str) -> float:
        i = bisect_right(starts, step)
        return _evaluate(parts[i], step - starts[i - 1] if i else step, place)

    return Schedule(join, (parts, starts), function)


def repeat(schedule: ScheduleLike, period: int) -> Schedule:
    """keep = schedule(t mod period): starts again every `period` steps.

    Example:
        >>> [repeat(linear(1.0, 0.5, 10), 20)(t) for t in (0, 5, 10, 19, 20, 25)]
        [1.0, 0.75, 0.5, 0.5, 1.0, 0.75]
    """
    schedule, period = as_schedule(schedule), _count("period", period)
    return Schedule(repeat, (schedule, period), lambda t, at: _evaluate(schedule, t % period, at))


def scale(factor: ScheduleLike) -> Scaled:
    """p = p_own factor(t): multiplies each layer's own drop probability, so that the ratios between layers stay.

    A schedule is a factor in [0, 1]; a number or another callable may be above 1, as long as p is not.

    Example:
        >>> scale(0.5).of(0.5)(0), scale(0.5).of(0.8)(0)
        (0.75, 0.9)
        >>> [scale(linear(0.0, 1.0, 100)).of(0.5)(t) for t in (0, 50, 100)]
        [1.0, 0.75, 0.5]
    """
    if callable(factor):
        return Scaled(factor)
    factor = _real("factor", factor)
    _scaled(1.0, factor, "")
    return Scaled(factor)


def _evaluate(schedule: StepFunction, step: float, place: str) -> float:
    """Returns the checked value. Errors name `place`: the step and the layer of the outermost schedule."""
    value = schedule.function(step, place) if isinstance(schedule, Schedule) else schedule(step)
    return _rate("keep_prob", value, place)


def _scaled(keep_prob: float, factor: float, place: str) -> float:
    """Returns 1 - (1 - keep_prob) factor, in a form that is keep_prob itself at factor 1, and 1 at factor 0."""
    if not 0 <= factor < math.inf:
        raise ValueError(f"factor must be finite and not negative, got {factor}{place}")
    scaled = keep_prob + (1 - keep_prob) * (1 - factor)
    if scaled < -(2.0**-50):  # less is rounding of a factor that means 1 / (1 - keep_prob)
        most = 1 / (1 - keep_prob)
        raise ValueError(f"factor must be at most {most:.6g} for a layer of keep_prob {keep_prob}, got {factor}{place}")
    return max(scaled, 0.0)


def _between(start: float, end: float, fraction: float) -> float:
    """Returns start + (end - start) fraction, exact at both ends, between them everywhere else, and monotone."""
    if fraction < 0.5:
        return start + (end - start) * fraction
    return end - (end - start) * (1 - fraction)


def _geometric(start: float, end: float, fraction: float) -> float:
    return min(max(start ** (1 - fraction) * end**fraction, min(start, end)), max(start, end))


def _progress(step: float, steps: int) -> float:
    return 1.0 if step >= steps else step / steps


def _tent(phase: float) -> float:
    return 1 - abs(1 - 2 * phase)


def _wave(phase: float) -> float:
    return (1 - math.cos(2 * math.pi * phase)) / 2


def _real(name: str, value: Any, place: str = "") -> float:
    kind = str(getattr(value, "dtype", type(value).__name__))
    scalar = isinstance(value, numbers.Real) or (hasattr(value, "__float__") and getattr(value, "ndim", None) == 0)
    if not scalar or "bool" in kind or "complex" in kind:
        raise TypeError(f"{name} must be a number, got {value!r}{place}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _rate(name: str, value: Any, place: str = "") -> float:
    number = _real(name, value, place)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {number}{place}")
    return number


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return int(value)


def _items(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence, got {values!r}")
    return list(values)


def _boundaries(boundaries: Any, name: str, parts: int) -> tuple[int, ...]:
    steps = tuple(_count(f"boundaries[{i}]", step) for i, step in enumerate(_items("boundaries", boundaries)))
    if not steps:
        raise ValueError(f"boundaries must not be empty: they say where one of the {name} ends and the next begins")
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"boundaries must increase strictly, got {list(steps)}")
    if parts != len(steps) + 1:
        raise ValueError(f"{name} must be one more than boundaries, got {parts} {name} and {len(steps)} boundaries")
    return steps

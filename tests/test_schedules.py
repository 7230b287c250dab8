"""Schedules: their formulas, their values at the boundaries to the bit, how they are put together, what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from torchdrop.schedules import (
    Scaled,
    Schedule,
    annealed,
    as_schedule,
    constant,
    cosine,
    curriculum,
    cyclic,
    early,
    exponential,
    join,
    keep_prob_at,
    late,
    linear,
    piecewise,
    repeat,
    scale,
    triangular,
    v_shaped,
    warm_up,
)

rates = st.floats(0.0, 1.0)
counts = st.integers(1, 10**6)
times = st.one_of(st.integers(0, 10**7), st.floats(0.0, 1e7), st.just(1e300), st.just(5e-324))

FROM_TO: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "triangular": triangular,
    "cyclic": cyclic,
    "v_shaped": v_shaped,
}
HOLDS = {"linear": linear, "cosine": cosine, "exponential": exponential}
OF_ONE: dict[str, Callable[..., Schedule]] = {
    "curriculum": curriculum,
    "annealed": annealed,
    "early": early,
    "early constant": lambda keep_prob, steps: early(keep_prob, steps, decay="constant"),
    "late": late,
    "warm_up": warm_up,
}


def square_root(step: float) -> float:
    """A user's own schedule, at the top of a module so that it can be pickled."""
    return 1 / (1 + math.sqrt(step))


EXAMPLES: list[tuple[Schedule, str]] = [
    (constant(0.8), "constant(0.8)"),
    (linear(1, 0.5, 100), "linear(1.0, 0.5, 100)"),
    (cosine(1.0, 0.5, 100), "cosine(1.0, 0.5, 100)"),
    (exponential(1.0, 0.5, 100), "exponential(1.0, 0.5, 100)"),
    (piecewise([1, 0.5], [10]), "piecewise([1.0, 0.5], [10])"),
    (triangular(1.0, 0.5, 100), "triangular(1.0, 0.5, 100)"),
    (cyclic(1.0, 0.5, 100), "cyclic(1.0, 0.5, 100)"),
    (v_shaped(1.0, 0.5, 100), "v_shaped(1.0, 0.5, 100)"),
    (curriculum(0.5, 100), "curriculum(0.5, 100)"),
    (annealed(0.5, 100), "annealed(0.5, 100)"),
    (early(0.5, 100), "early(0.5, 100, decay='linear')"),
    (early(0.5, 100, decay="constant"), "early(0.5, 100, decay='constant')"),
    (late(0.5, 100), "late(0.5, 100)"),
    (warm_up(0.5, 100), "warm_up(constant(0.5), 100)"),
    (join([1, linear(1.0, 0.5, 10)], [20]), "join([constant(1.0), linear(1.0, 0.5, 10)], [20])"),
    (repeat(late(0.5, 5), 10), "repeat(late(0.5, 5), 10)"),
    (scale(2).of(0.75), "Scaled.of(scale(2.0), 0.75)"),
    (scale(late(0.5, 5)).of(0.5), "Scaled.of(scale(late(0.5, 5)), 0.5)"),
]


class TestSchedule:
    @pytest.mark.parametrize(("schedule", "text"), EXAMPLES, ids=[text for _, text in EXAMPLES])
    def test_is_the_call_that_made_it(self, schedule: Schedule, text: str) -> None:
        assert repr(schedule) == text
        again = eval(text)
        for other in (again, pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), copy.copy(schedule)):
            assert other == schedule
            assert hash(other) == hash(schedule)
            assert repr(other) == text
            assert [other(t) for t in range(250)] == [schedule(t) for t in range(250)]

    def test_differs_where_the_call_does(self) -> None:
        schedules = [schedule for schedule, _ in EXAMPLES]
        assert len(set(schedules)) == len(schedules)
        assert linear(1.0, 0.5, 100) != linear(1.0, 0.5, 101)
        assert linear(1.0, 0.5, 100) != cosine(1.0, 0.5, 100)
        assert scale(0.5) == scale(0.5) != scale(0.6)

    def test_of_a_users_function_is_pickled(self) -> None:
        schedule = warm_up(square_root, 7)
        again = pickle.loads(pickle.dumps(schedule))
        assert again == schedule
        assert again(5) == schedule(5)

    def test_is_immutable(self) -> None:
        schedule = linear(1.0, 0.5, 100)
        with pytest.raises(AttributeError, match="cannot assign to field"):
            schedule.arguments = (1.0, 0.9, 100)  # type: ignore[misc]
        with pytest.raises(AttributeError, match="cannot assign to field"):
            scale(0.5).factor = 1.0  # type: ignore[misc]

    @pytest.mark.parametrize(
        "step",
        [25, 25.0, Fraction(25), np.int64(25), np.float32(25), np.array(25), torch.tensor(25), torch.tensor(25.0)],
        ids=lambda step: type(step).__name__,
    )
    def test_takes_steps_of_any_real_type(self, step: Any) -> None:
        value = linear(1.0, 0.5, 100)(step)
        assert value == 0.875
        assert type(value) is float

    @pytest.mark.parametrize("schedule", [linear(1.0, 0.5, 100), constant(0.5), join([1, 0.5], [10])], ids=repr)
    @pytest.mark.parametrize(
        ("step", "error", "message"),
        [
            (-1, ValueError, "step must be finite and not negative, got -1"),
            (-1e-9, ValueError, "step must be finite and not negative, got -1e-09"),
            (math.nan, ValueError, "step must be finite and not negative, got nan"),
            (math.inf, ValueError, "step must be finite and not negative, got inf"),
            (10**400, ValueError, "step must be finite and not negative, got 1000"),
            ("3", TypeError, "step must be a number, got '3'"),
            (None, TypeError, "step must be a number, got None"),
            (True, TypeError, "step must be a number, got True"),
            (1j, TypeError, "step must be a number, got 1j"),
            (Decimal(3), TypeError, "step must be a number, got Decimal('3')"),
            (np.bool_(True), TypeError, "step must be a number, got "),
            (np.complex128(1), TypeError, "step must be a number, got "),
            (np.array([3]), TypeError, "step must be a number, got array([3])"),
            (torch.tensor([3]), TypeError, "step must be a number, got tensor([3])"),
            (torch.tensor(True), TypeError, "step must be a number, got tensor(True)"),
        ],
    )
    def test_refuses_other_steps(self, schedule: Schedule, step: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match="^" + re.escape(message)):
            schedule(step)
        with pytest.raises(error, match="^" + re.escape(message)):
            keep_prob_at(0.5, step)


class TestFormulas:
    """Values against the published or usual formula, written out in another way."""

    @given(rates, rates, counts, times)
    def test_linear(self, a: float, b: float, n: int, t: float) -> None:
        assert linear(a, b, n)(t) == pytest.approx(np.interp(t, [0, n], [a, b]), rel=1e-12, abs=1e-300)

    @given(rates, rates, counts, times)
    def test_cosine(self, a: float, b: float, n: int, t: float) -> None:
        expected = (a + b) / 2 + (a - b) / 2 * math.cos(math.pi * min(t, n) / n)
        assert cosine(a, b, n)(t) == pytest.approx(expected, rel=1e-12, abs=1e-15)

    @given(st.floats(1e-9, 1.0), st.floats(1e-9, 1.0), counts, times)
    def test_exponential(self, a: float, b: float, n: int, t: float) -> None:
        expected = math.exp(np.interp(t, [0, n], [math.log(a), math.log(b)]))
        assert exponential(a, b, n)(t) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(("a", "b"), [(5e-324, 1.0), (1.0, 5e-324), (5e-324, 5e-324)])
    def test_exponential_does_not_overflow_where_the_ratio_would(self, a: float, b: float) -> None:
        halfway = exponential(a, b, 10)(5)
        assert halfway == pytest.approx(math.sqrt(a) * math.sqrt(b), rel=1e-12)
        assert halfway > 0

    @given(rates, rates, counts, st.integers(0, 10**7))
    def test_triangular(self, a: float, b: float, n: int, t: int) -> None:
        phase = Fraction(t % n, n)
        expected = np.interp(float(phase), [0.0, 0.5, 1.0], [a, b, a])
        assert triangular(a, b, n)(t) == pytest.approx(expected, rel=1e-9, abs=1e-15)

    @given(rates, rates, counts, st.integers(0, 10**7))
    def test_cyclic(self, a: float, b: float, n: int, t: int) -> None:
        expected = (a + b) / 2 + (a - b) / 2 * math.cos(2 * math.pi * (t % n) / n)
        assert cyclic(a, b, n)(t) == pytest.approx(expected, rel=1e-12, abs=1e-14)

    @given(rates, rates, counts, times)
    def test_v_shaped(self, a: float, b: float, n: int, t: float) -> None:
        expected = np.interp(t / n, [0.0, 0.5, 1.0], [a, b, a])
        assert v_shaped(a, b, n)(t) == pytest.approx(expected, rel=1e-9, abs=1e-15)

    @given(rates, counts, times)
    def test_curriculum(self, k: float, n: int, t: float) -> None:
        gamma = 10 / n
        assert curriculum(k, n)(t) == pytest.approx((1 - k) * math.exp(-gamma * t) + k, rel=1e-9)
        assert 0 <= curriculum(k, n)(n) - k <= 5e-5

    @given(rates, counts, times)
    def test_annealed(self, k: float, n: int, t: float) -> None:
        assert 1 - annealed(k, n)(t) == pytest.approx((1 - k) * max(0.0, 1 - t / n), abs=1e-12)

    @given(rates, counts, times)
    def test_early(self, k: float, n: int, t: float) -> None:
        decays = early(k, n)(t), early(k, n, decay="linear")(t)
        assert decays[0] == decays[1] == annealed(k, n)(t)
        assert early(k, n, decay="constant")(t) == (k if t < n else 1.0)

    def test_early_against_the_authors_array(self) -> None:
        """Theirs goes from p to 0 over the steps 0..n - 1, both ends included; ours over the steps 0..n."""
        p, n = 0.3, 50
        ours = [1 - early(1 - p, n)(t) for t in range(n + 1)]
        assert ours == pytest.approx(np.linspace(p, 0, n + 1), abs=1e-12)
        theirs = np.linspace(p, 0, n)
        assert theirs[n - 1] == 0 < ours[n - 1]
        assert ours[n] == 0

    @given(rates, counts, times)
    def test_late(self, k: float, n: int, t: float) -> None:
        assert late(k, n)(t) == (k if t >= n else 1.0)

    @given(rates, counts, times)
    def test_warm_up(self, k: float, n: int, t: float) -> None:
        expected = 1 - (1 - k) * min(1.0, t / n)
        assert warm_up(k, n)(t) == pytest.approx(expected, abs=1e-15)

    def test_warm_up_goes_on_with_what_it_ramps_in(self) -> None:
        schedule = warm_up(linear(0.2, 0.8, 40), 20)
        assert [round(schedule(t), 12) for t in (0, 10, 20, 30, 40)] == [1.0, 1 - 0.65 / 2, 0.5, 0.65, 0.8]

    @given(st.lists(rates, min_size=2, max_size=6), st.data())
    def test_piecewise(self, values: list[float], data: st.DataObject) -> None:
        size = len(values) - 1
        boundaries = sorted(data.draw(st.sets(st.integers(1, 50), min_size=size, max_size=size)))
        schedule = piecewise(values, boundaries)
        for t in range(60):
            assert schedule(t) == values[sum(boundary <= t for boundary in boundaries)]
        assert schedule(boundaries[0] - 1e-9) == values[0]


class TestExactness:
    """In [0, 1] in spite of rounding, and to the bit what was asked for at the boundaries."""

    @pytest.mark.parametrize("name", FROM_TO)
    @given(a=rates, b=rates, n=counts, t=times)
    @example(a=0.1, b=1.0, n=3, t=1)
    @example(a=1.0, b=0.1, n=7, t=3)
    @example(a=1 - 2.0**-53, b=1.0, n=10, t=9)
    @example(a=5e-324, b=1e-323, n=10, t=3)
    def test_stays_between_its_values(self, name: str, a: float, b: float, n: int, t: float) -> None:
        if name == "exponential":
            a, b = max(a, 5e-324), max(b, 5e-324)
        value = FROM_TO[name](a, b, n)(t)
        assert min(a, b) <= value <= max(a, b)
        assert FROM_TO[name](a, b, n)(0) == a

    @pytest.mark.parametrize("name", HOLDS)
    @given(a=rates, b=rates, n=counts, later=times)
    @example(a=1.0, b=0.1, n=3, later=0)
    def test_hits_and_holds_its_end(self, name: str, a: float, b: float, n: int, later: float) -> None:
        if name == "exponential":
            a, b = max(a, 5e-324), max(b, 5e-324)
        schedule = HOLDS[name](a, b, n)
        assert schedule(n) == schedule(n + later) == b

    @pytest.mark.parametrize("name", ["triangular", "cyclic"])
    @given(a=rates, b=rates, half=counts, rounds=st.integers(0, 1000))
    def test_comes_back_for_ever(self, name: str, a: float, b: float, half: int, rounds: int) -> None:
        schedule = FROM_TO[name](a, b, 2 * half)
        assert schedule(2 * half * rounds) == a
        assert schedule(2 * half * rounds + half) == b

    @given(a=rates, b=rates, half=counts, later=times)
    def test_v_shaped_touches_its_middle_and_holds_its_start(self, a: float, b: float, half: int, later: float) -> None:
        schedule = v_shaped(a, b, 2 * half)
        assert schedule(half) == b
        assert schedule(2 * half) == schedule(2 * half + later) == a

    @pytest.mark.parametrize("name", OF_ONE)
    @given(k=rates, n=counts, t=times)
    @example(k=0.1, n=3, t=1)
    @example(k=2.0**-54, n=3, t=1)
    @example(k=1 - 2.0**-53, n=3, t=2)
    def test_stays_between_keep_prob_and_1(self, name: str, k: float, n: int, t: float) -> None:
        assert k <= OF_ONE[name](k, n)(t) <= 1.0

    @given(rates, counts)
    @example(0.1, 3)
    @example(2.0**-54, 3)
    def test_ends_of_the_published_ones(self, k: float, n: int) -> None:
        assert curriculum(k, n)(0) == 1.0
        assert curriculum(k, n)(1e300) == k
        assert (annealed(k, n)(0), annealed(k, n)(n)) == (k, 1.0)
        assert (early(k, n)(0), early(k, n)(n)) == (k, 1.0)
        assert (late(k, n)(0), late(k, n)(n)) == (1.0, k)
        assert (warm_up(k, n)(0), warm_up(k, n)(n), warm_up(k, n)(2 * n)) == (1.0, k, k)

    @given(rates, rates, counts, st.lists(times, min_size=2, max_size=5))
    def test_linear_is_monotone(self, a: float, b: float, n: int, steps: list[float]) -> None:
        values = [linear(a, b, n)(t) for t in sorted(steps)]
        assert values == sorted(values, reverse=b < a)

    @given(rates, st.floats(0.0, 1.0))
    @example(0.1, 1.0)
    def test_scaled_down(self, k: float, factor: float) -> None:
        assert k <= scale(factor).of(k)(3) <= 1.0
        assert scale(1.0).of(k)(3) == k
        assert scale(0.0).of(k)(3) == 1.0

    @given(rates.filter(lambda k: k < 1))
    @example(0.1)
    @example(1 - 1e-6)
    def test_scaled_up_to_dropping_all(self, k: float) -> None:
        """The factor 1 / p is rounded, and p times it may be above 1 by that."""
        assert scale(1 / (1 - k)).of(k)(0) == pytest.approx(0.0, abs=1e-15)
        assert scale(lambda t: 1 / (1 - k)).of(k)(0) >= 0.0

    def test_a_factor_beyond_rounding_is_refused(self) -> None:
        with pytest.raises(ValueError, match="factor must be at most"):
            scale((1 + 1e-14) / 0.9).of(0.1)


class TestComposition:
    def test_join_counts_each_from_its_own_boundary(self) -> None:
        seen: list[float] = []

        def remember(step: float) -> float:
            seen.append(step)
            return 0.5

        schedule = join([linear(1.0, 0.5, 10), 0.9, remember], [5, 20])
        assert [schedule(t) for t in (0, 4, 5, 19, 20, 27, 27.5)] == [1.0, 0.8, 0.9, 0.9, 0.5, 0.5, 0.5]
        assert seen == [0, 7, 7.5]

    @given(times, counts)
    def test_repeat(self, t: float, period: int) -> None:
        schedule = linear(1.0, 0.0, 10**6)
        assert repeat(schedule, period)(t) == schedule(t % period)

    def test_users_functions_get_plain_numbers(self) -> None:
        types: list[type] = []

        def remember(step: float) -> float:
            types.append(type(step))
            return 0.5

        for step in (3, np.int32(3), 3.0, np.float32(3), torch.tensor(3.0)):
            keep_prob_at(remember, step)
        assert types == [int, int, float, float, float]

    def test_nests(self) -> None:
        inner = join([warm_up(0.5, 4), repeat(triangular(0.5, 1.0, 4), 3)], [10])
        schedule = scale(repeat(inner, 20)).of(0.6)
        factors = [inner(t % 20) for t in range(40)]
        assert min(factors) == 0.5
        assert [1 - schedule(t) for t in range(40)] == pytest.approx([0.4 * f for f in factors], abs=1e-12)

    def test_scale_keeps_the_ratios_between_layers(self) -> None:
        ramp = scale(linear(0.0, 1.0, 100))
        layers = [ramp.of(k) for k in (0.9, 0.8, 0.5)]
        for t in (1, 37, 99, 100, 500):
            p = [1 - layer(t) for layer in layers]
            assert p == pytest.approx([0.1 * min(1, t / 100), 0.2 * min(1, t / 100), 0.5 * min(1, t / 100)], abs=1e-12)
        assert [layer(100) for layer in layers] == [0.9, 0.8, 0.5]

    def test_scale_by_more_than_one(self) -> None:
        assert scale(2).of(0.75)(0) == 0.5
        assert scale(lambda t: 1 + t).of(0.75)(3) == 0.0
        assert scale(1e9).of(1.0)(0) == 1.0
        assert repr(scale(2)) == "scale(2.0)"
        assert pickle.loads(pickle.dumps(scale(2))) == scale(2)

    def test_scaled_is_no_schedule(self) -> None:
        assert not callable(scale(0.5))
        for use in (as_schedule, lambda s: warm_up(s, 3), lambda s: join([s, 0.5], [3]), lambda s: keep_prob_at(s, 3)):
            with pytest.raises(TypeError, match=re.escape("got scale(0.5): take its .of(keep_prob) of a layer")):
                use(scale(0.5))  # type: ignore[arg-type]


class TestKeepProbAt:
    @pytest.mark.parametrize(
        ("result", "expected"),
        [(0.5, 0.5), (1, 1.0), (0, 0.0), (np.float32(0.5), 0.5), (np.array(0.5), 0.5), (torch.tensor(0.5), 0.5)],
    )
    def test_gives_a_float(self, result: Any, expected: float) -> None:
        value = keep_prob_at(lambda step: result, 3)
        assert value == expected
        assert type(value) is float

    def test_takes_schedules_and_numbers(self) -> None:
        assert keep_prob_at(linear(1.0, 0.5, 100), 50, where="fc1") == 0.75
        assert keep_prob_at(0.3, 50) == 0.3

    @pytest.mark.parametrize(
        ("result", "error", "message"),
        [
            (1.2, ValueError, "keep_prob must be in [0, 1], got 1.2"),
            (-0.1, ValueError, "keep_prob must be in [0, 1], got -0.1"),
            (math.nan, ValueError, "keep_prob must be in [0, 1], got nan"),
            (math.inf, ValueError, "keep_prob must be in [0, 1], got inf"),
            (-(10**400), ValueError, "keep_prob must be in [0, 1], got -inf"),
            (np.nextafter(1.0, 2.0), ValueError, "keep_prob must be in [0, 1], got 1.0000000000000002"),
            (torch.tensor(2.0), ValueError, "keep_prob must be in [0, 1], got 2.0"),
            ("0.5", TypeError, "keep_prob must be a number, got '0.5'"),
            (None, TypeError, "keep_prob must be a number, got None"),
            (True, TypeError, "keep_prob must be a number, got True"),
            ([0.5], TypeError, "keep_prob must be a number, got [0.5]"),
            (torch.tensor([0.5]), TypeError, "keep_prob must be a number, got tensor([0.5000])"),
        ],
    )
    def test_names_value_step_and_place(self, result: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=re.escape(f"{message} at step 12 from the schedule of 'fc*'") + "$"):
            keep_prob_at(lambda step: result, 12, where="fc*")
        with pytest.raises(error, match=re.escape(f"{message} at step 12") + "$"):
            keep_prob_at(lambda step: result, 12)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda f: warm_up(f, 100),
            lambda f: join([0.5, f], [10]),
            lambda f: repeat(f, 5),
            lambda f: repeat(join([0.5, warm_up(f, 7)], [1]), 10),
            lambda f: scale(join([0.5, f], [10])).of(0.5),
        ],
        ids=["warm_up", "join", "repeat", "nested", "scale"],
    )
    def test_names_the_outermost_step_of_composed_schedules(self, wrap: Callable[[Any], Schedule]) -> None:
        """Also where the sum would have come out in range, as a warm-up's does at its first steps."""
        for wrong, message in ((1.2, "in [0, 1], got 1.2"), (-0.1, "in [0, 1], got -0.1"), ("x", "a number, got 'x'")):
            schedule = wrap(lambda step, wrong=wrong: wrong)
            whole = f"keep_prob must be {message} at step 12 from the schedule of 'fc*'"
            with pytest.raises((ValueError, TypeError), match="^" + re.escape(whole) + "$"):
                keep_prob_at(schedule, 12, where="fc*")

    @pytest.mark.parametrize(
        ("factor", "error", "message"),
        [
            (3.0, ValueError, "factor must be at most 2 for a layer of keep_prob 0.5, got 3.0"),
            (-1.0, ValueError, "factor must be finite and not negative, got -1.0"),
            (math.nan, ValueError, "factor must be finite and not negative, got nan"),
            (math.inf, ValueError, "factor must be finite and not negative, got inf"),
            ("2", TypeError, "factor must be a number, got '2'"),
        ],
    )
    def test_names_a_wrong_factor(self, factor: Any, error: type[Exception], message: str) -> None:
        schedule = scale(lambda step: factor).of(0.5)
        with pytest.raises(error, match="^" + re.escape(f"{message} at step 12 from the schedule of 'fc*'") + "$"):
            keep_prob_at(schedule, 12, where="fc*")

    def test_leaves_a_users_own_error_alone(self) -> None:
        with pytest.raises(ZeroDivisionError):
            keep_prob_at(warm_up(lambda step: 1 / (step - 12), 3), 12)


class TestAsSchedule:
    def test_passes_callables_and_wraps_numbers(self) -> None:
        schedule = linear(1.0, 0.5, 3)
        assert as_schedule(schedule) is schedule
        assert as_schedule(square_root) is square_root
        assert as_schedule(1) == constant(1.0)
        assert as_schedule(np.float64(0.5)) == as_schedule(torch.tensor(0.5)) == constant(0.5)  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j], ids=repr)
    def test_refuses_other_types(self, value: Any) -> None:
        whole = f"a schedule that is not callable must be a number, got {value!r}"
        with pytest.raises(TypeError, match="^" + re.escape(whole) + "$"):
            as_schedule(value)

    @pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
    def test_refuses_other_numbers(self, value: float) -> None:
        with pytest.raises(ValueError, match=re.escape(f"keep_prob must be in [0, 1], got {value}")):
            as_schedule(value)


VALUES: list[tuple[str, Callable[[Any], Any]]] = [
    ("keep_prob", constant),
    *[("start", lambda v, f=f: f(v, 0.5, 10)) for name, f in FROM_TO.items()],
    *[("end", lambda v, f=f: f(0.5, v, 10)) for name, f in FROM_TO.items() if name != "v_shaped"],
    ("middle", lambda v: v_shaped(0.5, v, 10)),
    ("keep_prob", lambda v: curriculum(v, 10)),
    ("start", lambda v: annealed(v, 10)),
    ("keep_prob", lambda v: early(v, 10)),
    ("keep_prob", lambda v: early(v, 10, decay="constant")),
    ("keep_prob", lambda v: late(v, 10)),
    ("values[1]", lambda v: piecewise([1.0, v], [10])),
    ("keep_prob", lambda v: scale(0.5).of(v)),
]  # fmt: skip
STEPS: list[tuple[str, Callable[[Any], Any]]] = [
    *[
        ("period" if name in ("triangular", "cyclic") else "steps", lambda n, f=f: f(1.0, 0.5, n))
        for name, f in FROM_TO.items()
    ],
    *[("steps", lambda n, f=f: f(0.5, n)) for f in OF_ONE.values()],
    ("period", lambda n: repeat(0.5, n)),
    ("boundaries[1]", lambda n: piecewise([1.0, 0.9, 0.8], [10, n])),
    ("boundaries[0]", lambda n: join([1.0, 0.9], [n])),
]


class TestArguments:
    @pytest.mark.parametrize(("name", "make"), VALUES)
    def test_values_are_keep_probs(self, name: str, make: Callable[[Any], Any]) -> None:
        wrong = [(value, float(value)) for value in (1.5, -0.1, math.nan, math.inf, 2, np.float64(1.5))]
        for value, shown in [*wrong, (10**400, math.inf)]:
            with pytest.raises(ValueError, match="^" + re.escape(f"{name} must be in [0, 1], got {shown}") + "$"):
                make(value)
        for other in ("0.5", None, True, [0.5], 1j):
            with pytest.raises(TypeError, match="^" + re.escape(f"{name} must be a number, got {other!r}") + "$"):
                make(other)
        make(np.float32(0.5))

    @pytest.mark.parametrize(("name", "make"), STEPS)
    def test_steps_are_positive_integers(self, name: str, make: Callable[[Any], Any]) -> None:
        for value in (0, -1, np.int64(-5)):
            with pytest.raises(ValueError, match="^" + re.escape(f"{name} must be positive, got {value}") + "$"):
                make(value)
        for other in (10.0, math.nan, "10", None, True):
            with pytest.raises(TypeError, match="^" + re.escape(f"{name} must be an integer, got {other!r}") + "$"):
                make(other)
        make(np.int64(50))

    @pytest.mark.parametrize(("a", "b"), [(0.0, 0.5), (0.5, 0.0), (0, 0)])
    def test_exponential_wants_positive_values(self, a: float, b: float) -> None:
        message = f"start and end must be positive, got {float(a)} and {float(b)}: no geometric sequence reaches 0"
        with pytest.raises(ValueError, match=re.escape(message)):
            exponential(a, b, 10)

    @pytest.mark.parametrize("decay", ["cosine", "", None, 1])
    def test_early_knows_two_decays(self, decay: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(f"decay must be 'linear' or 'constant', got {decay!r}")):
            early(0.5, 10, decay=decay)

    @pytest.mark.parametrize(("name", "make"), [("values", piecewise), ("schedules", join)])
    def test_boundaries(self, name: str, make: Callable[..., Schedule]) -> None:
        def refused(values: Any, boundaries: Any, error: type[Exception], message: str) -> None:
            with pytest.raises(error, match="^" + re.escape(message)):
                make(values, boundaries)

        refused([0.5], [], ValueError, f"boundaries must not be empty: they say where one of the {name} ends")
        refused([], [], ValueError, "boundaries must not be empty")
        refused([1, 0.9, 0.8], [20, 10], ValueError, "boundaries must increase strictly, got [20, 10]")
        refused([1, 0.9, 0.8], [10, 10], ValueError, "boundaries must increase strictly, got [10, 10]")
        count = f"{name} must be one more than boundaries, got 2 {name} and 2 boundaries"
        refused([1, 0.9], [10, 20], ValueError, count)
        refused([], [10], ValueError, f"{name} must be one more than boundaries, got 0 {name} and 1 boundaries")
        refused([1, 0.9], 10, TypeError, "boundaries must be a sequence, got 10")
        refused([1, 0.9], "1", TypeError, "boundaries must be a sequence, got '1'")
        refused(0.9, [10], TypeError, f"{name} must be a sequence, got 0.9")
        refused("ab", [10], TypeError, f"{name} must be a sequence, got 'ab'")
        made = make(np.array([1.0, 0.5]), np.array([10]))
        assert made == make((1.0, 0.5), (10,))
        assert (made(9), made(10)) == (1.0, 0.5)

    @pytest.mark.parametrize("make", [lambda s: warm_up(s, 3), lambda s: repeat(s, 3), lambda s: join([1, s], [3])])
    def test_schedules_are_callables_or_numbers(self, make: Callable[[Any], Schedule]) -> None:
        with pytest.raises(ValueError, match=re.escape("keep_prob must be in [0, 1], got 1.5")):
            make(1.5)
        with pytest.raises(TypeError, match="a schedule that is not callable must be a number, got 'linear'"):
            make("linear")

    @pytest.mark.parametrize(
        ("factor", "error", "message"),
        [
            (-0.5, ValueError, "factor must be finite and not negative, got -0.5"),
            (math.nan, ValueError, "factor must be finite and not negative, got nan"),
            (math.inf, ValueError, "factor must be finite and not negative, got inf"),
            ("1", TypeError, "factor must be a number, got '1'"),
            (None, TypeError, "factor must be a number, got None"),
            (True, TypeError, "factor must be a number, got True"),
            (Scaled(0.5), TypeError, "factor must be a number, got scale(0.5)"),
        ],
    )
    def test_scale_wants_factors(self, factor: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match="^" + re.escape(message) + "$"):
            scale(factor)

    def test_a_constant_factor_that_drops_too_much_is_refused_at_once(self) -> None:
        tripled = scale(3)
        assert tripled.of(0.8)(0) == pytest.approx(0.4)
        message = "factor must be at most 2 for a layer of keep_prob 0.5, got 3.0"
        with pytest.raises(ValueError, match=re.escape(message) + "$"):
            tripled.of(0.5)
        later = scale(lambda step: 1.0 if step < 5 else 3.0).of(0.5)
        assert later(4) == 0.5
        with pytest.raises(ValueError, match=re.escape(message + " at step 5") + "$"):
            later(5)

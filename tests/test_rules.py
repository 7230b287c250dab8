"""Rules over layers: the published formulas, exact ends, order and position, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from torchdrop.rules import LayerSize, Rule, by_weight_size, linear_in_depth, linspace_in_depth, uniform

rates = st.floats(0.0, 1.0)
sizes = st.builds(LayerSize, st.text(), st.none() | st.integers(1, 10**12), st.booleans())
networks = st.lists(sizes, min_size=1, max_size=40)

OF_ONE: dict[str, Callable[[float], Rule]] = {
    "uniform": uniform,
    "linear_in_depth": linear_in_depth,
    "linspace_in_depth": linspace_in_depth,
    "by_weight_size": by_weight_size,
}
EXAMPLES = [
    (uniform(1), "uniform(1.0)"),
    (linear_in_depth(0.5), "linear_in_depth(0.5)"),
    (linspace_in_depth(0.5), "linspace_in_depth(0.5)"),
    (by_weight_size(), "by_weight_size(0.5, smallest=1.0, input=0.9, output=1.0)"),
    (by_weight_size(0.4, input=1, output=0.95), "by_weight_size(0.4, smallest=1.0, input=1.0, output=0.95)"),
]


def blocks(n: int) -> list[LayerSize]:
    return [LayerSize(f"block{i}", 576) for i in range(n)]


class TestRule:
    @pytest.mark.parametrize(("rule", "text"), EXAMPLES, ids=[text for _, text in EXAMPLES])
    def test_is_shown_compared_and_pickled(self, rule: Rule, text: str) -> None:
        assert repr(rule) == text
        layers = [LayerSize("x", None), *blocks(3), LayerSize("y", 10, last=True)]
        for other in (eval(text), pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
            assert other == rule
            assert hash(other) == hash(rule)
            assert other(layers) == rule(layers)

    def test_differs_where_the_call_does(self) -> None:
        assert len({rule for rule, _ in EXAMPLES}) == len(EXAMPLES)
        assert by_weight_size(0.5) == by_weight_size()

    def test_is_immutable(self) -> None:
        with pytest.raises(AttributeError, match="cannot assign to field"):
            uniform(0.5).arguments = (0.9,)  # type: ignore[misc]

    @pytest.mark.parametrize("rule", [rule for rule, _ in EXAMPLES], ids=repr)
    @given(networks)
    def test_gives_one_keep_prob_for_each_layer(self, rule: Rule, layers: list[LayerSize]) -> None:
        before = list(layers)
        keep_probs = rule(layers)
        assert layers == before
        assert len(keep_probs) == len(layers)
        assert all(type(keep_prob) is float and 0 <= keep_prob <= 1 for keep_prob in keep_probs)
        assert rule(tuple(layers)) == keep_probs

    @pytest.mark.parametrize("name", OF_ONE)
    @given(rates, networks)
    @example(0.1, blocks(7))
    @example(2.0**-54, blocks(3))
    @example(1 - 2.0**-53, blocks(3))
    def test_drops_no_more_than_it_was_told(self, name: str, keep_prob: float, layers: list[LayerSize]) -> None:
        hidden = [layer for layer in layers if layer.weights is not None and not layer.last]
        if name != "by_weight_size":
            hidden = layers
        if hidden:
            assert all(keep_prob <= k <= 1 for k in OF_ONE[name](keep_prob)(hidden))


class TestDepth:
    @given(rates, networks)
    def test_uniform(self, keep_prob: float, layers: list[LayerSize]) -> None:
        assert uniform(keep_prob)(layers) == [keep_prob] * len(layers)

    @given(rates, st.integers(1, 200))
    @example(0.1, 3)
    def test_linear_in_depth(self, keep_prob: float, depth: int) -> None:
        """Survival p_l = 1 - l/L (1 - p_L), in exact fractions."""
        keep_probs = linear_in_depth(keep_prob)(blocks(depth))
        for layer, k in enumerate(keep_probs, start=1):
            assert abs(k - (1 - Fraction(layer, depth) * (1 - Fraction(keep_prob)))) <= Fraction(2, 2**53)
        assert keep_probs[-1] == keep_prob
        assert keep_probs == sorted(keep_probs, reverse=True)

    @pytest.mark.parametrize("depth", [1, 2, 3, 54, 110])
    def test_expected_depth_is_the_published_one(self, depth: int) -> None:
        assert sum(linear_in_depth(0.5)(blocks(depth))) == pytest.approx((3 * depth - 1) / 4, rel=1e-12)

    @given(rates, st.integers(2, 200))
    @example(0.1, 3)
    def test_linspace_in_depth(self, keep_prob: float, depth: int) -> None:
        keep_probs = linspace_in_depth(keep_prob)(blocks(depth))
        assert (keep_probs[0], keep_probs[-1]) == (1.0, keep_prob)
        assert 1 - np.array(keep_probs) == pytest.approx(np.linspace(0, 1 - keep_prob, depth), abs=1e-15)

    @pytest.mark.parametrize("depth", [1, 2, 12])
    def test_linspace_in_depth_is_that_of_torch(self, depth: int) -> None:
        """One layer included: torch.linspace(0, p, 1) is [0]."""
        theirs = torch.linspace(0, 0.3, depth, dtype=torch.float64)
        ours = 1 - torch.tensor(linspace_in_depth(0.7)(blocks(depth)), dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)

    def test_the_two_differ_in_the_first_layer(self) -> None:
        assert linear_in_depth(0.5)(blocks(5))[0] == 0.9
        assert linspace_in_depth(0.5)(blocks(5))[0] == 1.0
        assert linear_in_depth(0.5)(blocks(1)) == [0.5]
        assert linspace_in_depth(0.5)(blocks(1)) == [1.0]


class TestWeightSize:
    def test_ngs_network(self) -> None:
        layers = [
            LayerSize("x", None),
            LayerSize("a1", 7 * 3),
            LayerSize("a2", 7 * 7),
            LayerSize("a3", 3 * 7),
            LayerSize("a4", 2 * 3),
            LayerSize("y", 1 * 2, last=True),
        ]
        expected = [0.9, 1 - 0.5 * 21 / 49, 0.5, 1 - 0.5 * 21 / 49, 1 - 0.5 * 6 / 49, 1.0]
        assert by_weight_size()(layers) == pytest.approx(expected, rel=1e-15)
        stricter = by_weight_size(0.2, input=0.95, output=0.99)(layers)
        assert stricter == pytest.approx(
            [0.95, 1 - 0.8 * 3 / 7, 0.2, 1 - 0.8 * 3 / 7, 1 - 0.8 * 6 / 49, 0.99], rel=1e-15
        )

    @given(rates, networks)
    def test_formula(self, largest: float, layers: list[LayerSize]) -> None:
        hidden = [layer.weights for layer in layers if layer.weights is not None and not layer.last]
        for layer, k in zip(layers, by_weight_size(largest, input=0.875, output=0.9375)(layers), strict=True):
            if layer.last:
                assert k == 0.9375
            elif layer.weights is None:
                assert k == 0.875
            else:
                exact = 1 - (1 - Fraction(largest)) * Fraction(layer.weights, max(hidden))
                assert abs(k - exact) <= Fraction(2, 2**53)
                assert k == largest or layer.weights < max(hidden)

    def test_the_output_does_not_count_for_the_largest(self) -> None:
        layers = [LayerSize("a1", 100), LayerSize("a2", 50), LayerSize("y", 10**6, last=True)]
        assert by_weight_size()(layers) == [0.5, 0.75, 1.0]

    def test_small_matrices_approach_the_keep_prob_given_for_them(self) -> None:
        layers = [LayerSize("a1", 1000), LayerSize("a2", 500), LayerSize("a3", 1)]
        assert by_weight_size(0.5, smallest=0.75)(layers) == pytest.approx([0.5, 0.625, 0.74975], rel=1e-15)
        assert by_weight_size(0.5, smallest=0.5)(layers) == [0.5, 0.5, 0.5]

    def test_networks_without_hidden_layers(self) -> None:
        assert by_weight_size()([LayerSize("x", None)]) == [0.9]
        assert by_weight_size()([LayerSize("x", None), LayerSize("y", 30, last=True)]) == [0.9, 1.0]
        assert by_weight_size()([LayerSize("x", None, last=True)]) == [1.0]

    def test_several_inputs_and_outputs(self) -> None:
        layers = [LayerSize("x1", None), LayerSize("a", 8), LayerSize("x2", None), LayerSize("y1", 4, last=True)]
        assert by_weight_size()([*layers, LayerSize("y2", 9, last=True)]) == [0.9, 0.5, 0.9, 1.0, 1.0]

    def test_takes_integers_of_numpy(self) -> None:
        assert by_weight_size()([LayerSize("a", np.int64(6)), LayerSize("b", 12)]) == [0.75, 0.5]


NAMED: list[tuple[str, Callable[[Any], Rule]]] = [
    ("keep_prob", uniform),
    ("keep_prob", linear_in_depth),
    ("keep_prob", linspace_in_depth),
    ("largest", by_weight_size),
    ("smallest", lambda value: by_weight_size(smallest=value)),
    ("input", lambda value: by_weight_size(input=value)),
    ("output", lambda value: by_weight_size(output=value)),
]


class TestRefusals:
    @pytest.mark.parametrize(("name", "make"), NAMED)
    @pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf, 2, -(10**400)], ids=lambda v: str(v)[:5])
    def test_values_outside_the_unit_interval(self, name: str, make: Callable[[Any], Rule], value: float) -> None:
        with pytest.raises(ValueError, match="^" + re.escape(f"{name} must be in [0, 1], got {value}") + "$"):
            make(value)

    @pytest.mark.parametrize(("name", "make"), NAMED)
    @pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j], ids=repr)
    def test_other_types(self, name: str, make: Callable[[Any], Rule], value: Any) -> None:
        with pytest.raises(TypeError, match="^" + re.escape(f"{name} must be a number, got {value!r}") + "$"):
            make(value)

    @pytest.mark.parametrize("rule", [rule for rule, _ in EXAMPLES], ids=repr)
    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            ([], ValueError, "layers must not be empty: there is nothing that could get a keep_prob"),
            (None, TypeError, "layers must be a sequence of LayerSize, got None"),
            (3, TypeError, "layers must be a sequence of LayerSize, got 3"),
            ("fc1", TypeError, "layers must be a sequence of LayerSize, got 'fc1'"),
            (LayerSize("a", 1), TypeError, "layers must be a sequence of LayerSize, got LayerSize(name='a'"),
            ([LayerSize("a", 1), ("b", 2, False)], TypeError, "layers[1] must be a LayerSize, got ('b', 2, False)"),
            ([LayerSize("a", 0)], ValueError, "weights of layer 'a' must be positive, got 0"),
            ([LayerSize("a", -3, True)], ValueError, "weights of layer 'a' must be positive, got -3"),
            ([LayerSize("a", 2.0)], TypeError, "weights of layer 'a' must be an integer or None, got 2.0"),
            ([LayerSize("a", math.nan)], TypeError, "weights of layer 'a' must be an integer or None, got nan"),
            ([LayerSize("a", True)], TypeError, "weights of layer 'a' must be an integer or None, got True"),
            ([LayerSize("a", "9")], TypeError, "weights of layer 'a' must be an integer or None, got '9'"),
            ([LayerSize("a", 9, 1)], TypeError, "last of layer 'a' must be True or False, got 1"),
            ([LayerSize("a", None, None)], TypeError, "last of layer 'a' must be True or False, got None"),
        ],
    )
    def test_layers(self, rule: Rule, layers: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match="^" + re.escape(message)):
            rule(layers)

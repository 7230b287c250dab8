"""Sparsity and co-adaptation of hidden activations, against their definitions, and what the pictures show."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchdrop
from torchdrop.aids.diagnostics import (
    ACTIVATIONS,
    BINS,
    CHUNK,
    FeatureStatistics,
    LayerStatistics,
    _statistics,
    feature_statistics,
)

matplotlib_figure = pytest.importorskip("matplotlib.figure")


def of(rows: Tensor) -> LayerStatistics:
    """The statistics of activations (data, units)."""
    return feature_statistics(nn.Sequential(nn.Identity()), rows, "0")["0"]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), torchdrop.Dropout(0.5), nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)
    )


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_against_numpy(self, dtype: torch.dtype) -> None:
        rows = (torch.randn(300, 12) @ torch.randn(12, 12) + 1).relu().to(dtype)
        rows[:, 3] = 0
        rows[:, 5] = 2.5
        rows[7] = 0
        a = rows.double().numpy()
        found = of(rows)
        assert (found.units, found.data, found.name) == (12, 300, "0")
        assert found.mean_activation == pytest.approx(a.mean(), rel=1e-9)
        assert np.allclose(found.unit_means.numpy(), a.mean(0), rtol=1e-9)
        assert found.zeros == (a == 0).mean()
        assert found.dead == 1 / 12
        active = a[(a != 0).any(1)]
        assert len(active) == 299 - int((a[:, 5] == 0).sum() - 1)
        hoyer = (12**0.5 - np.abs(active).sum(1) / np.sqrt((active**2).sum(1))) / (12**0.5 - 1)
        assert found.sparseness == pytest.approx(hoyer.mean(), rel=1e-9)
        varying = a[:, a.std(0) > 0]
        assert found.constant == 12 - varying.shape[1] >= 1
        correlations = np.abs(np.corrcoef(varying.T))
        n = len(correlations)
        assert found.correlation == pytest.approx((correlations.sum() - n) / (n * (n - 1)), rel=1e-9)
        eigenvalues = np.linalg.eigvalsh(np.cov(a.T))
        expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
        assert found.effective_features == pytest.approx(expected, rel=1e-9)
        counts, edges = np.histogram(a, BINS)
        assert np.array_equal(found.counts.numpy(), counts)
        assert np.allclose(found.edges.numpy(), edges)

    @pytest.mark.slow
    @given(
        st.integers(2, 40),
        st.integers(1, 9),
        st.integers(0, 2**31),
        st.sampled_from([1e-300, 1e-30, 1.0, 1e150, 1e300]),
    )
    def test_ranges(self, data: int, units: int, seed: int, size: float) -> None:
        rows = (
            torch.randn(data, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu() * size
        )
        found = of(rows)
        for value in (found.zeros, found.dead):
            assert 0 <= value <= 1
        for value in (found.sparseness, found.correlation):
            assert math.isnan(value) or -1e-12 <= value <= 1 + 1e-12
        varying = units - found.constant
        assert math.isnan(found.effective_features) == (varying == 0)
        assert math.isnan(found.correlation) == (varying < 2)
        assert varying == 0 or 1 - 1e-12 <= found.effective_features <= varying + 1e-9
        assert found.counts.sum() == data * units

    def test_copies_are_one_feature(self) -> None:
        one = torch.randn(100, 1)
        found = of(torch.cat([one, -2 * one, 3 * one + 1], 1))
        assert found.correlation == pytest.approx(1, abs=1e-6)
        assert found.effective_features == pytest.approx(1, abs=1e-6)

    def test_independent_features_are_many(self) -> None:
        """All sign patterns: exactly uncorrelated, with equal variances."""
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
        found = of(signs)
        assert found.correlation == pytest.approx(0, abs=1e-12)
        assert found.effective_features == pytest.approx(6)
        assert found.sparseness == pytest.approx(0)

    def test_one_active_unit_is_as_sparse_as_can_be(self) -> None:
        assert of(torch.eye(5)).sparseness == pytest.approx(1)
        assert of(torch.eye(5)).zeros == 0.8

    def test_constant_units_are_those_with_one_value(self) -> None:
        """A mean that is rounded must not make them vary."""
        rows = torch.cat([torch.full((999, 2), 0.1), torch.randn(999, 2)], 1).double()
        rows[:, :2] = 0.1
        assert (rows[:, 0].mean() != 0.1).item()
        found = of(rows)
        assert found.constant == 2
        assert found.dead == 0
        assert found.correlation == pytest.approx(abs(np.corrcoef(rows[:, 2:].double().numpy().T)[0, 1]))

    def test_undefined_is_nan(self) -> None:
        dead = of(torch.zeros(5, 3))
        assert (dead.dead, dead.zeros, dead.constant) == (1, 1, 3)
        assert all(math.isnan(value) for value in (dead.sparseness, dead.correlation, dead.effective_features))
        single = of(torch.randn(5, 1))
        assert math.isnan(single.sparseness)
        assert math.isnan(single.correlation)
        assert single.effective_features == pytest.approx(1)

    @pytest.mark.slow
    def test_parts_make_the_whole(self) -> None:
        """More data than are looked at at once."""
        units = 1 << 11
        rows = torch.randn(CHUNK // units + 7, units).relu()
        found = _statistics("x", rows)
        assert found.counts.sum() == rows.numel()
        assert found.zeros == (rows == 0).double().mean().item()
        few = rows[:, :2].double().numpy()
        assert found.unit_means[:2].tolist() == pytest.approx(few.mean(0).tolist())
        total = np.trace(np.cov(rows.numpy().T)) ** 2 / np.square(np.cov(rows.numpy().T)).sum()
        assert found.effective_features == pytest.approx(total, rel=1e-6)

    @pytest.mark.slow
    def test_memory(self) -> None:
        """A covariance and a part of the data, not copies of all of it."""
        rows = torch.randn(20_000, 512)
        seen: list[int] = []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                outs = out if isinstance(out, (tuple, list)) else [out]
                seen.extend(one.numel() for one in outs if isinstance(one, Tensor) and one._base is None)
                return out

        with Sizes():
            _statistics("x", rows)
        assert max(seen) <= CHUNK


class TestLayers:
    def test_all_activations_by_default(self) -> None:
        model = mlp().train()
        model[5].eval()
        x = torch.randn(30, 5)
        found = feature_statistics(model, x)
        assert [one.name for one in found.layers] == ["1", "4"]
        hidden = model[0](x).relu()
        assert found["1"].mean_activation == pytest.approx(hidden.mean().item(), rel=1e-6)
        tanh = model[3](hidden).tanh()
        assert found["4"].mean_activation == pytest.approx(tanh.mean().item(), rel=1e-5)
        assert [one.training for one in model] == [True, True, True, True, True, False, True]

    def test_each_activation_is_known(self) -> None:
        """All of torch.nn that act on elements; the others normalize over units, or are layers of attention."""
        others = {"MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
        assert {one.__name__ for one in ACTIVATIONS} == set(nn.modules.activation.__all__) - others

    def test_named_layers(self) -> None:
        model, x = mlp(), torch.randn(30, 5)
        assert [one.name for one in feature_statistics(model, x, "0").layers] == ["0"]
        assert [one.name for one in feature_statistics(model, x, ["[36]", "0"]).layers] == ["0", "3", "6"]
        nested = nn.Sequential(model)
        assert [one.name for one in feature_statistics(nested, x, "0.[14]").layers] == ["0.1", "0.4"]

    def test_nothing_stays(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        before = [one.clone() for one in model.buffers()]
        random = torch.get_rng_state()
        x = torch.randn(9, 3, generator=torch.Generator())
        feature_statistics(model, x)
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
        assert torch.equal(torch.get_rng_state(), random)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            feature_statistics(model, torch.randn(9, 4))
        assert all(one.training for one in model.modules())
        assert not any(one._forward_hooks for one in model.modules())

    def test_what_is_written_over_later_is_measured_as_it_was(self) -> None:
        x = torch.randn(20, 3)
        model = nn.Sequential(nn.Identity(), nn.Tanh(), nn.Threshold(2.0, 7.0, inplace=True))
        found = feature_statistics(model, x)
        assert found["1"].mean_activation == pytest.approx(x.tanh().mean().item(), rel=1e-6)
        assert found["2"].mean_activation == 7

    def test_a_layer_called_twice_has_two_rows(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.relu = nn.Linear(3, 4), nn.Linear(4, 6), nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                return self.relu(self.b(self.relu(self.a(x))))

        found = feature_statistics(Twice(), torch.randn(10, 3))
        assert [(one.name, one.units) for one in found.layers] == [("relu", 4), ("relu (call 2)", 6)]

    def test_arguments_by_position_and_name(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.Tanh()

            def forward(self, x: Tensor, scale: float) -> Tensor:
                return self.act(scale * x)

        x = torch.randn(10, 3)
        expected = (2 * x).tanh().mean().item()
        assert feature_statistics(Scaled(), (x, 2.0))["act"].mean_activation == pytest.approx(expected, rel=1e-5)
        found = feature_statistics(Scaled(), {"x": x, "scale": 2.0})
        assert found["act"].mean_activation == pytest.approx(expected, rel=1e-5)

    def test_dropout_is_off(self) -> None:
        x = torch.ones(50, 4)
        assert feature_statistics(nn.Sequential(nn.Dropout(0.5), nn.ReLU()), x)["1"].zeros == 0


class TestUnits:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_channels_of_convolutions(self, dims: int, transposed: bool) -> None:
        conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")(2, 3, 2)
        norm = getattr(nn, f"BatchNorm{dims}d")(3)
        x = torch.randn(4, 2, *[5] * dims)
        found = feature_statistics(nn.Sequential(conv, norm, nn.ReLU()).eval(), x)["2"]
        out = norm(conv(x)).relu()
        assert (found.units, found.data) == (3, out.numel() // 3)
        assert torch.allclose(found.unit_means.float(), out.transpose(0, 1).flatten(1).mean(1), rtol=1e-5)

    def test_sequences_have_units_last(self) -> None:
        model = nn.Sequential(nn.Linear(5, 7), nn.GELU())
        found = feature_statistics(model, torch.randn(4, 3, 5))["1"]
        assert (found.units, found.data) == (7, 12)

    def test_transformer(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, activation=nn.GELU(), batch_first=True)
        found = feature_statistics(layer, torch.randn(5, 3, 4))
        assert [(one.name, one.units, one.data) for one in found.layers] == [("activation", 8, 15)]

    def test_what_follows_a_convolution(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.ReLU(), nn.Unflatten(1, (2, 9)), nn.Linear(9, 5), nn.ReLU()
        )
        found = feature_statistics(model, torch.randn(6, 1, 5, 5))
        assert [(one.units, one.data) for one in found.layers] == [(2, 54), (18, 6), (5, 12)]

    def test_flattened_positions_are_units(self) -> None:
        found = feature_statistics(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.ReLU()), torch.randn(6, 1, 5, 5))
        assert [(one.units, one.data) for one in found.layers] == [(9, 12)]

    def test_dim_decides(self) -> None:
        x = torch.randn(4, 3, 5)
        for dim, units in ((0, 4), (1, 3), (2, 5), (-2, 3)):
            assert feature_statistics(nn.ReLU(), x, dim=dim)["(model)"].units == units


class TestTable:
    def test_table(self) -> None:
        rows = torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 2.0]])
        lines = str(feature_statistics(nn.Sequential(nn.ReLU()), rows)).splitlines()
        assert lines[0] == "Hidden activations: sparsity and co-adaptation"
        assert lines[1].split() == [
            "layer", "units", "mean", "zeros", "dead", "sparseness", "|correlation|", "effective", "features",
        ]  # fmt: skip
        assert lines[2].split()[:7] == ["0", "3", "1", "50", "%", "33", "%"]
        assert lines[2].split()[8:] == ["1.000", "1.0", "of", "3"]
        assert lines[3] == "  constant units, left out of the correlation: 0 (1)"
        assert len(lines) == 4

    def test_columns_line_up(self) -> None:
        model = nn.Sequential()
        model.a_long_name = nn.Linear(3, 2000)
        model.act_with_a_longer_name = nn.ReLU()
        model.b = nn.Linear(2000, 3)
        model.z = nn.Sigmoid()
        lines = str(feature_statistics(model, 1000 * torch.randn(20, 3))).splitlines()[1:4]
        assert len({line.index(" of ") for line in lines[1:]}) == 1
        assert len({line.index(" %") for line in lines[1:]}) == 1

    def test_plain_data(self) -> None:
        found = feature_statistics(mlp(), torch.randn(30, 5))
        rows = found.rows()
        assert [row["name"] for row in rows] == ["1", "4"]
        assert all(isinstance(value, (int, float, str)) for row in rows for value in row.values())
        assert set(rows[0]) == {
            "name", "units", "data", "mean_activation", "zeros", "dead", "sparseness", "correlation", "constant",
            "effective_features",
        }  # fmt: skip
        with pytest.raises(KeyError, match="'2': there are 1, 4"):
            found["2"]


class TestPlot:
    def test_each_layer_has_a_histogram_of_area_one(self) -> None:
        found = feature_statistics(mlp(), torch.randn(200, 5))
        for quantity in ("mean activations", "activations"):
            ax = found.plot(of=quantity)  # type: ignore[arg-type]
            assert len(ax.patches) == 2
            for patch, layer in zip(ax.patches, found.layers, strict=True):
                heights, edges, _ = patch.get_data()
                assert (heights * np.diff(edges)).sum() == pytest.approx(1)
                values = layer.unit_means if quantity == "mean activations" else layer.edges
                assert edges[0] <= values.min().item() + 1e-12
                assert edges[-1] >= values.max().item() - 1e-12
            assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1", "4"]
            assert ax.get_xlabel() == quantity[:-1]
            assert ax.get_yscale() == ("log" if quantity == "activations" else "linear")

    def test_heights(self) -> None:
        rows = torch.tensor([[0.0, 0.0, 0.0, 3.0]]).repeat(2, 1)
        heights, edges, _ = of_plot(rows, "mean activations")
        assert edges[[0, -1]].tolist() == [0, 3]
        assert heights[[0, -1]].tolist() == pytest.approx([7.5, 2.5])
        assert heights[1:-1].sum() == 0
        heights, edges, _ = of_plot(rows, "activations")
        assert heights[0] / heights[-1] == pytest.approx(3)

    def test_models_in_one_picture(self, tmp_path: Path) -> None:
        x = torch.randn(100, 5)
        ax = matplotlib_figure.Figure().subplots()
        for label in ("dropout", "none", "both"):
            assert feature_statistics(mlp(), x).plot(ax, label=label) is ax
        texts = [text.get_text() for text in ax.get_legend().get_texts()]
        assert texts == ["dropout 1", "dropout 4", "none 1", "none 4", "both 1", "both 4"]
        looks = {(patch.get_edgecolor(), patch.get_linestyle()) for patch in ax.patches}
        assert len(looks) == 6
        ax.figure.savefig(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 5000

    def test_constant_activations(self) -> None:
        for value in (0.0, 1e-3, -5.0):
            for quantity in ("mean activations", "activations"):
                _, edges, _ = of_plot(torch.full((3, 2), value), quantity)
                assert edges[0] < value < edges[-1]

    def test_unknown_quantity(self) -> None:
        found = feature_statistics(mlp(), torch.randn(9, 5))
        with pytest.raises(ValueError, match="of must be one of 'mean activations', 'activations', got 'means'"):
            found.plot(of="means")  # type: ignore[arg-type]

    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"this needs matplotlib.figure: pip install 'torchdrop\[uncertainty\]'"):
            feature_statistics(mlp(), torch.randn(9, 5)).plot()


def of_plot(rows: Tensor, quantity: Any) -> Any:
    (patch,) = FeatureStatistics((of(rows),)).plot(of=quantity).patches
    return patch.get_data()


class Calls(nn.Module):
    """Does not call `spare`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.act, self.spare = nn.LSTM(3, 4), nn.ReLU(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lstm(x)[0])


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
            ({"inputs": [1.0]}, TypeError, "inputs must be a tensor, a tuple .* mapping of named ones, got list"),
            ({"layers": 1}, TypeError, "layers must be a name, a list of names or None, got int"),
            ({"layers": [1]}, TypeError, "a pattern must be a string, got int"),
            ({"layers": []}, ValueError, "give at least one pattern for the names of modules, got none"),
            ({"layers": "lstn"}, ValueError, "the pattern 'lstn' matches none of the modules: near misses: lstm"),
            ({"layers": ["act", "head.*"]}, ValueError, r"the pattern 'head.\*' matches none of the modules"),
            ({"layers": "lstm"}, TypeError, "lstm must return one floating-point tensor, got tuple: choose a layer"),
            ({}, ValueError, "the model did not call spare on these inputs: leave it out of layers"),
            ({"layers": ["act", "spare"]}, ValueError, "did not call spare"),
            ({"layers": "act", "dim": 3}, ValueError, r"dim must be in \[-3, 3\) for the output of act, got 3"),
            ({"layers": "act", "dim": 1.0}, TypeError, "dim must be an integer or None, got float"),
            ({"layers": "act", "dim": True}, TypeError, "dim must be an integer or None, got bool"),
            (
                {"layers": "act", "inputs": torch.ones(1, 1, 3)},
                ValueError,
                "act must have units with at least 2 .* with 1",
            ),
            (
                {"layers": "act", "inputs": torch.full((2, 1, 3), math.nan)},
                ValueError,
                "act has activations that are not f",
            ),
            (
                {"model": nn.Linear(3, 3)},
                ValueError,
                "layers must be given for Linear, which has no .*; it has no modules",
            ),
            (
                {"model": nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1))},
                ValueError,
                "layers must be given for Sequential, which has no activation, .* as a module; it has 0, 1",
            ),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        usual: dict[str, Any] = {"model": Calls(), "inputs": torch.randn(2, 1, 3)}
        model = (usual | arguments)["model"]
        with pytest.raises(error, match=message):
            feature_statistics(**usual | arguments)
        if isinstance(model, nn.Module):
            assert all(one.training and not one._forward_hooks for one in model.modules())

    def test_integers(self) -> None:
        with pytest.raises(TypeError, match=r"0 must return one floating-point tensor, got torch.int64"):
            feature_statistics(nn.Sequential(nn.Identity()), torch.ones(3, 3, dtype=torch.int64), "0")

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_not_finite(self, value: float) -> None:
        rows = torch.randn(5, 3)
        rows[2, 1] = value
        with pytest.raises(ValueError, match="0 has activations that are not finite"):
            of(rows)

    def test_no_data_and_no_units(self) -> None:
        for shape in ((0, 3), (3, 0)):
            with pytest.raises(ValueError, match="0 must have units with at least 2 activations each"):
                of(torch.zeros(shape))

    def test_zero_dimensions(self) -> None:
        with pytest.raises(ValueError, match=r"dim must be in \[0, 0\) for the output of 0"):
            of(torch.tensor(1.0))

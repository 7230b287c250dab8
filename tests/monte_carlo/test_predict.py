"""`mc_predict`: one result whatever the batches, chunks and strategies; and what it says where it cannot."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchdrop
from torchdrop.monte_carlo import ClassificationPrediction, Prediction, RegressionPrediction
from torchdrop.monte_carlo.sample import STRATEGIES

T = 12


def mlp(p: float = 0.5) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 8), nn.Dropout(p), nn.Linear(8, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(2, 8, 2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unflatten(1, (3, 2)))[0][:, -1])


class Skipping(nn.Module):
    """Skips its layer at random, in Python, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.rand([]) < 0.5):
            x = x + self.layer(x)
        return self.head(x)


def attention() -> nn.Module:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.3, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), encoder, nn.Flatten(), nn.Linear(6, 3))


class MaskOnly(nn.Module):
    """Its outputs are its masks, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.ones_like(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "recurrent": Recurrent,
    "attention": attention,
    "skipping": Skipping,
    "masks": MaskOnly,
}


def data(rows: int = 10) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))


def predict(model: nn.Module, inputs: Any, samples: int = T, **options: Any) -> Prediction:
    return torchdrop.mc_predict(model, inputs, samples, **{"seed": 5, "keep_samples": True, **options})


def close(one: Prediction, other: Prediction) -> bool:
    assert one.samples is not None
    assert other.samples is not None
    return torch.allclose(one.samples, other.samples, atol=1e-5) and torch.allclose(one.mean, other.mean, atol=1e-5)


class TestOneResult:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("sampling", ["iid", "latin"])
    @pytest.mark.parametrize("masks", ["independent", "shared"])
    def test_strategies(self, name: str, sampling: str, masks: str) -> None:
        model = MODELS[name]().eval()
        loop = predict(model, data(), strategy="loop", sampling=sampling, masks=masks)
        assert loop.std.max() > 0
        served = {"loop"}
        for strategy in ("vectorized", "repeated"):
            try:
                other = predict(model, data(), strategy=strategy, sampling=sampling, masks=masks)
            except RuntimeError:
                continue
            served.add(strategy)
            assert other.strategy == strategy
            assert close(loop, other)
            if name == "masks":
                assert loop.samples is not None
                assert other.samples is not None
                assert torch.equal(loop.samples, other.samples)
        assert (
            served
            == {
                "mlp": {*STRATEGIES},
                "recurrent": {"loop", "repeated"},
                "attention": {*STRATEGIES},
                "skipping": {"loop"},
                "masks": {*STRATEGIES},
            }[name]
        )

    @pytest.mark.parametrize("name", ["mlp", "masks"])
    @pytest.mark.parametrize("sampling", ["iid", "latin"])
    def test_backends(self, name: str, sampling: str, backend: str) -> None:
        if backend == "triton" and name != "masks":
            pytest.skip("triton: its interpreter takes a second for a model's layer")
        model = MODELS[name]().eval()
        served = predict(model, data(4), 4, sampling=sampling)
        assert served.std.max() > 0
        with torchdrop.use_backend("reference"):
            reference = predict(model, data(4), 4, sampling=sampling)
        assert close(served, reference)
        if name == "masks":
            assert torch.equal(served.samples, reference.samples)

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("sampling", ["iid", "latin"])
    @pytest.mark.parametrize("size", [1, 7, 16])
    @pytest.mark.slow
    def test_batch_sizes_and_ragged_last_batches(self, name: str, sampling: str, size: int) -> None:
        model, x = MODELS[name]().eval(), data(20)
        whole = predict(model, x, sampling=sampling)
        batches = predict(model, DataLoader(TensorDataset(x), batch_size=size), sampling=sampling)
        assert close(whole, batches)
        if name == "masks":
            assert whole.samples is not None
            assert batches.samples is not None
            assert torch.equal(whole.samples, batches.samples)

    @pytest.mark.parametrize("strategy", ["vectorized", "repeated"])
    @pytest.mark.parametrize("chunk", [1, 5, 12, 100])
    def test_chunks(self, strategy: str, chunk: int) -> None:
        one, other = (predict(mlp().eval(), data(), strategy=strategy, chunk=size) for size in (None, chunk))
        assert close(one, other)
        assert other.report.chunk == chunk  # type: ignore[attr-defined]
        masks = [predict(MaskOnly(), data(), strategy=strategy, chunk=size).samples for size in (None, chunk)]
        assert masks[0] is not None
        assert torch.equal(*masks)  # type: ignore[arg-type]

    def test_more_samples_begin_with_the_same(self) -> None:
        few, many = predict(mlp().eval(), data(), 4), predict(mlp().eval(), data(), 20)
        assert few.samples is not None
        assert many.samples is not None
        assert torch.allclose(few.samples, many.samples[:4], atol=1e-6)

    def test_seeds(self) -> None:
        model = mlp().eval()
        assert not torch.equal(predict(model, data(), seed=1).mean, predict(model, data(), seed=2).mean)
        torch.manual_seed(0)
        first = torchdrop.mc_predict(model, data(), T)
        torch.manual_seed(0)
        again = torchdrop.mc_predict(model, data(), T)
        assert torch.equal(first.mean, again.mean)
        assert torch.equal(torchdrop.mc_predict(model, data(), T, seed=first.seed).mean, first.mean)
        assert not torch.equal(torchdrop.mc_predict(model, data(), T).mean, first.mean)

    def test_shared_masks_are_one_function_of_all_data(self) -> None:
        """Each sample of a linear model under shared masks is a linear function, over all batches."""
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)).eval()
        x = data(8)
        loader = DataLoader(TensorDataset(torch.cat([x, 2 * x])), batch_size=3)
        samples = predict(model, loader, masks="shared").samples
        assert samples is not None
        bias = model[1].bias
        assert torch.allclose((samples[:, :8] - bias) * 2, samples[:, 8:] - bias, atol=1e-5)

    def test_sample_numbers_are_those_of_mc_dropout(self) -> None:
        model = mlp().eval()
        samples = predict(model, data(), 4).samples
        assert samples is not None
        with torchdrop.mc_dropout(model, seed=5), torch.no_grad():
            for sample in samples:
                assert torch.allclose(model(data()), sample, atol=1e-6)

    def test_second_dimension_counts_rows(self) -> None:
        torch.manual_seed(1)
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2), 1, enable_nested_tensor=False)
        x = torch.randn(4, 9, 6)
        whole = predict(model.eval(), x, batch_dim=1)
        assert whole.mean.shape == (9, 4, 6)
        parts = predict(model, iter([x[:, :2], x[:, 2:]]), batch_dim=1, strategy="loop")
        assert close(whole, parts)
        with pytest.warns(UserWarning, match="depend on the other rows.*batch_dim"):
            predict(model, x)


class TestPrefix:
    """What comes before the first draw runs once for each batch."""

    @pytest.mark.parametrize("strategy", ["vectorized", "loop"])
    def test_runs_once(self, strategy: str) -> None:
        calls: list[int] = []

        class Body(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x

        class Counting(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                out = super().forward(x)
                calls.append(len(x) if out.device.type != "meta" else 0)
                return out

        model = nn.Sequential(Counting(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
        seen: list[int] = []

        class Seen(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten.addmm.default and args[1].shape == (50, 6):
                    seen.append(1)
                return func(*args, **(kwargs or {}))

        with Seen():
            predict(model, data(50), strategy=strategy, chunk=3)
        assert seen == [1]
        assert calls.count(50) == (T if strategy == "loop" else T // 3)

    def test_kept_tensor_that_is_written_to(self) -> None:
        class Adding(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Tensor:
                y = self.body(x)
                return y.add_(self.drop(y))

        class Copying(Adding):
            def forward(self, x: Tensor) -> Tensor:
                y = self.body(x)
                return y + self.drop(y)

        torch.manual_seed(2)
        model, same = Adding().eval(), Copying().eval()
        same.load_state_dict(model.state_dict())
        assert close(predict(model, data(), strategy="loop"), predict(same, data(), strategy="loop"))
        assert close(predict(model, data()), predict(same, data()))

    def test_python_that_reads_values(self) -> None:
        class Reading(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Tensor:
                y = self.body(x)
                scale = float(self.body.weight.sum()) + y.dim() + y.numpy().shape[1] + float(x.isnan().any())
                return self.drop(y * scale)

        model = Reading().eval()
        assert close(predict(model, data(), strategy="loop"), predict(model, data(), strategy="repeated", chunk=1))

    def test_python_that_takes_another_way(self) -> None:
        class Turning(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.drop, self.turn = nn.Linear(6, 6), nn.Dropout(0.5), 0

            def forward(self, x: Tensor) -> Tensor:
                self.turn += 1
                y = self.body(x) if self.turn % 2 else torch.sin(self.body(x))
                return self.drop(y)

        samples = predict(Turning().eval(), data(), strategy="loop").samples
        assert samples is not None
        assert samples.isfinite().all()


@functools.cache
def repeated(sampling: str) -> list[Any]:
    """Predictions of one model under 60 seeds."""
    model, x = mlp().eval(), data(40)
    return [torchdrop.mc_predict(model, x, 20, sampling=sampling, seed=seed) for seed in range(60)]


class TestLatin:
    def test_linear_mean_is_the_deterministic_pass(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).double().eval()
        x = data().double()
        result = torchdrop.mc_predict(model, x, samples=20, sampling="latin", weight_scaling=True, seed=1)
        assert result.weight_scaling is not None
        assert torch.allclose(result.mean, model(x), rtol=1e-8, atol=1e-9)
        assert torch.allclose(result.weight_scaling, model(x))
        iid = torchdrop.mc_predict(model, x, samples=20, seed=1)
        assert (iid.mean - model(x)).abs().max() > 1e-3
        assert result.std.min() > 0

    @pytest.mark.slow
    def test_lowers_the_variance_of_the_mean(self) -> None:
        def spread(sampling: str) -> float:
            return float(torch.stack([result.mean for result in repeated(sampling)]).var(0).mean())

        assert spread("latin") < 0.6 * spread("iid")

    @pytest.mark.slow
    def test_standard_error_is_no_less_than_the_truth(self) -> None:
        results = repeated("latin")
        truth = torch.stack([r.mean for r in results]).var(0).mean().sqrt()
        assert torch.stack([r.standard_error for r in results]).square().mean().sqrt() > truth


class TestTolerance:
    def test_stops_when_it_is_met(self) -> None:
        result = predict(mlp().eval(), data(), 2000, tolerance=0.05)
        assert 20 <= result.num_samples < 2000
        assert result.num_samples % 20 == 0
        assert result.standard_error.max() <= 0.05

    def test_says_what_was_reached(self) -> None:
        with pytest.warns(UserWarning, match=r"tolerance=1e-06 was not met after 40 samples: .* is 0\.") as caught:
            result = predict(mlp().eval(), data(), 40, tolerance=1e-6)
        assert result.num_samples == 40
        assert f"{result.standard_error.max():.3g}" in str(caught[0].message)

    def test_latin_rounds(self) -> None:
        """With rounds of 20, latin needs fewer samples for the same error, and its error is measured, not bounded."""
        iid = predict(mlp().eval(), data(), 4000, tolerance=0.02)
        latin = predict(mlp().eval(), data(), 4000, tolerance=0.02, sampling="latin")
        assert latin.num_samples < iid.num_samples
        assert latin.num_samples >= 80
        assert latin.standard_error.max() <= 0.02


class TestAgainstAllMasks:
    """A network with six units that are dropped with probability 1/2: its 64 masks are equally likely."""

    @pytest.mark.slow
    @pytest.mark.parametrize("sampling", ["iid", "latin"])
    @pytest.mark.parametrize("masks", ["independent", "shared"])
    def test_every_statistic(self, sampling: str, masks: str) -> None:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3), nn.Tanh()).double().eval()
        x = torch.randn(5, 4, dtype=torch.float64)
        every = torch.tensor(list(itertools.product([0.0, 2.0], repeat=6)), dtype=torch.float64)
        outputs = model[4](model[3](model[1](model[0](x)) * every[:, None])).detach()
        options: dict[str, Any] = {"samples": 4_000, "seed": 3, "sampling": sampling, "masks": masks}

        plain = torchdrop.mc_predict(model, x, **options)
        self.agree(plain, "mean", outputs.mean(0))
        self.agree(plain, "variance", outputs.var(0, correction=0))
        classes = torchdrop.mc_predict(model, x, task="classification", scores="logits", **options)
        p = outputs.softmax(-1)
        entropy = torch.special.entr(p).sum(-1).mean(0)
        self.agree(classes, "mean", p.mean(0))
        self.agree(classes, "variance", p.var(0, correction=0))
        self.agree(classes, "expected_entropy", entropy)
        self.agree(classes, "predictive_entropy", torch.special.entr(p.mean(0)).sum(-1))
        self.agree(classes, "mutual_information", torch.special.entr(p.mean(0)).sum(-1) - entropy)
        votes = F.one_hot(p.argmax(-1), 3).double().mean(0)
        self.agree(classes, "variation_ratio", 1 - votes.amax(-1))

    def agree(self, result: Prediction, name: str, exact: Tensor) -> None:
        """Within seven standard errors, which a right sampler leaves once in 10^11, and small beside the statistic."""
        error = result.standard_errors[name]
        assert ((getattr(result, name) - exact).abs() <= 7 * error + 1e-9).all(), name
        assert error.mean() < 0.07 * exact.abs().mean() + 1e-9, name


class TestTasks:
    def test_classification(self) -> None:
        result = predict(mlp().eval(), data(), task="classification", weight_scaling=True)
        assert isinstance(result, ClassificationPrediction)
        assert torch.allclose(result.mean.sum(1), torch.ones(10))
        assert result.samples is not None
        assert torch.allclose(result.samples.mean(0), result.mean, atol=1e-6)
        entropy = -(result.samples * result.samples.log()).sum(-1).mean(0)
        assert torch.allclose(result.expected_entropy, entropy, atol=1e-5)
        assert (result.mutual_information >= 0).all()
        assert "active" in str(result)

    def test_regression_with_the_models_noise(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = mlp()

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                out = self.body(x)
                return out[:, :1], out[:, 1:2]

        result = predict(Two().eval(), data(), task="regression", noise="log_variance")
        assert isinstance(result, RegressionPrediction)
        assert result.aleatoric_variance is not None
        assert torch.allclose(result.variance, result.epistemic_variance + result.aleatoric_variance)
        with_tau = predict(mlp().eval(), data(), task="regression", tau=4.0)
        assert isinstance(with_tau, RegressionPrediction)
        assert torch.allclose(with_tau.aleatoric_variance, torch.full((10, 3), 0.25))  # type: ignore[arg-type]


class TestInputs:
    def test_mappings_and_tuples(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = mlp()

            def forward(self, x: Tensor, shift: Tensor | None = None) -> OrderedDict[str, Tensor]:
                out = self.body(x if shift is None else x + shift)
                return OrderedDict(logits=out, hidden=out)

        model, x, shift = Named().eval(), data(), torch.randn(10, 1)
        tensor = predict(model, x + shift)
        assert close(tensor, predict(model, {"x": x, "shift": shift}))
        assert close(tensor, predict(model, (x, shift)))
        loader = DataLoader(TensorDataset(x, shift), batch_size=4)
        assert close(tensor, predict(model, loader, select=lambda b: {"x": b[0], "shift": b[1]}))
        with pytest.warns(UserWarning, match=r"forward\(x, shift=None\) could take it as shift: give select=tuple"):
            assert close(predict(model, x), predict(model, loader))  # the second of a pair is its targets
        assert close(tensor, predict(model, loader, select=tuple))

    def test_outputs(self) -> None:
        class Many(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = mlp()

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.body(x), x

        class One(Many):
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return self.body(x)

        with pytest.raises(TypeError, match=r"one tensor, got Tensor, Tensor: give select_output="):
            predict(Many().eval(), data())
        assert close(predict(Many().eval(), data(), select_output=lambda y: y[0]), predict(One().eval(), data()))

    def test_one_whole(self) -> None:
        result = predict(mlp().eval(), data(), batch_dim=None)
        assert result.mean.shape == (10, 3)
        assert result.report.rows is None  # type: ignore[attr-defined]

    def test_half_types(self) -> None:
        result = predict(mlp().bfloat16().eval(), data().bfloat16())
        assert result.mean.dtype == torch.float32
        assert close(result, predict(mlp().bfloat16().eval(), data().bfloat16()))

    def test_leaves_everything_as_it_was(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        x, random = data(), torch.get_rng_state()
        copy = x.clone()
        predict(model, x)
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(x, copy)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_progress(self, capsys: pytest.CaptureFixture[str]) -> None:
        predict(mlp().eval(), DataLoader(TensorDataset(data()), batch_size=5), progress=True)
        assert "2" in capsys.readouterr().err


class Changing(nn.Module):
    """Outputs whose shape, or finiteness, is random."""

    def __init__(self, nan: bool = False) -> None:
        super().__init__()
        self.drop, self.nan, self.count = nn.Dropout(0.5), nan, itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        y, number = self.drop(x), next(self.count)
        if self.nan:
            return y * (float("nan") if number == 15 else 1.0)
        return y[:, : 3 + (number > 10)]


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
            ({"samples": 2.5}, TypeError, "samples must be an integer, got float"),
            ({"tolerance": 0.0}, ValueError, "tolerance must be positive, got 0.0"),
            ({"masks": "same"}, ValueError, "masks must be 'independent' or 'shared', got 'same'"),
            ({"sampling": "sobol"}, ValueError, "sampling must be 'iid' or 'latin', got 'sobol'"),
            ({"strategy": "fast"}, ValueError, "strategy must be 'auto', 'vectorized', 'repeated', 'loop', got 'fast'"),
            ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
            ({"seed": "a"}, TypeError, "seed must be an integer, got str"),
            ({"sources": "3x"}, ValueError, "'3x' matches none: near misses: 3"),
            ({"sources": "dropout*"}, ValueError, "matches none: there are 0, 1, 2, 3, 4, 5"),
            ({"sources": "0"}, ValueError, "(?s)nothing random is active.*not chosen by the patterns"),
            ({"task": "ranking"}, ValueError, "task must be"),
            ({"task": "classification", "select_output": lambda y: y[:, :1]}, ValueError, "one column"),
            ({"task": "classification", "select_output": lambda y: y.argmax(1)}, ValueError, "floating-point"),
            ({"task": "classification", "scores": "probabilities"}, ValueError, "must be probabilities"),
        ],
    )  # fmt: skip
    def test_arguments(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            predict(mlp().eval(), data(), **options)

    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            ([torch.ones(3, 6)], TypeError, "got list"),
            (3, TypeError, "inputs must be a tensor or array, .* got int"),
            (iter([]), ValueError, "at least one batch, got none"),
            (torch.ones(0, 6), ValueError, "at least one row, got none"),
            (iter([(torch.ones(2, 6),) * 3]), TypeError, r"got a tuple of 3: give select="),
            (iter(["text"]), TypeError, r"got a str: give select="),
        ],
    )
    def test_inputs(self, inputs: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            predict(mlp().eval(), inputs)

    def test_model_on_another_device(self) -> None:
        with pytest.raises(ValueError, match=r"inputs are on cpu and the model is on meta: pass inputs.to"):
            predict(mlp().eval().to("meta"), data())

    def test_sources_inside_a_chosen_module(self) -> None:
        model = nn.Sequential(OrderedDict(body=mlp(), head=nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)))).eval()
        found = {
            patterns: [source.module for source in predict(model, data(), sources=patterns).report.active]  # type: ignore[attr-defined]
            for patterns in ("head", "body", "*.2", ("head", "body.4"))
        }
        assert found == {
            "head": ["head.0"],
            "body": ["body.2", "body.4"],
            "*.2": ["body.2"],
            ("head", "body.4"): ["body.4", "head.0"],
        }

    def test_no_source(self) -> None:
        with pytest.raises(ValueError, match=r"nothing random is active.*rate above 0"):
            predict(nn.Linear(6, 2), data())
        with pytest.raises(ValueError, match=r"nothing random is active"):
            predict(mlp(0.0), data())

    def test_identical_samples(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)).eval()
        nn.init.zeros_(model[1].weight)
        with pytest.warns(UserWarning, match=r"all samples are identical"):
            predict(model, data())

    def test_outputs_that_change_their_shape(self) -> None:
        with pytest.raises(ValueError, match="outputs change their shape between samples"):
            predict(Changing(), data(), strategy="loop")

    def test_nan_in_one_sample(self) -> None:
        with pytest.raises(ValueError, match=r"sample \d+"):
            predict(Changing(nan=True), data(), strategy="loop")

    @pytest.mark.parametrize("model", [None, F.relu, [mlp()]])
    def test_no_module(self, model: Any) -> None:
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
            predict(model, data())

    def test_errors_leave_the_model_as_it_was(self) -> None:
        model = mlp().eval()
        with pytest.raises(ValueError, match="one column"):
            predict(model, data(), task="classification", select_output=lambda y: y[:, :1])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predict(model, data())


class Alternating(nn.Module):
    """Halves the rows at odd places, which are others where samples are rows of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(len(x))[:, None]
        return self.drop(x) / (1 + place % 2)


def test_a_larger_batch_is_no_way_where_a_rows_place_in_it_matters() -> None:
    model, x = Alternating().eval(), torch.ones(5, 4)
    options: dict[str, Any] = {"samples": 4, "seed": 0, "keep_samples": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = (torchdrop.mc_predict(model, x, strategy=way, **options) for way in ("auto", "loop"))
    assert found.strategy == "vectorized"
    assert any("Not repeated: a row's outputs depend on" in note for note in found.report.notes)
    assert torch.equal(found.samples, expected.samples)

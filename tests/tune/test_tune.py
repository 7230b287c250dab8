"""Cross-validation of keep probabilities: trained at once equals trained one by one; the choice; what is refused."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchdrop
from tests.statistical import check_rate, draws_for
from torchdrop.kernels.mask_params import mask_params
from torchdrop.ops import operators
from torchdrop.tune import SearchResult, cross_validate, draws, grid, optuna_search, search, stacked
from torchdrop.tune.alone import train_alone
from torchdrop.tune.folds import divide
from torchdrop.tune.settings import rates_of
from torchdrop.tune.training import Fold, Masks, Training, default_loss, default_optimizer, default_score

pytestmark = pytest.mark.usefixtures("one_thread")

Build = Callable[[], nn.Module]


ROWS, FEATURES = 47, 6


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, 0] > x[:, 1]).long()


def mlp(*extra: Callable[[], nn.Module]) -> Build:
    return lambda: nn.Sequential(
        nn.Dropout(0.2), nn.Linear(FEATURES, 8), *(layer() for layer in extra), nn.ReLU(inplace=True), nn.Linear(8, 8),
        torchdrop.Dropout(0.5, inplace=True), nn.Linear(8, 2),
    ).double()  # fmt: skip


class Shared(nn.Module):
    """One weight in two layers, one that is frozen, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.drop, self.out, self.unused = torchdrop.Dropout(0.5), nn.Linear(FEATURES, 2), nn.Linear(3, 3)
        self.out.bias.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.drop(self.second(F.relu(self.first(x))))))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3)
        self.drop, self.alpha, self.out = nn.Dropout1d(0.5), nn.AlphaDropout(0.1), nn.Linear(3 * (FEATURES - 2), 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.alpha(self.drop(F.relu(self.norm(self.conv(x.unsqueeze(1)))))).flatten(1))


class Permuted(nn.Module):
    """A weight whose gradient comes in another order of dimensions, one that is not its own inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, FEATURES))
        self.register_buffer("gain", torch.ones(FEATURES, 2, 3))
        self.drop = torchdrop.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) @ (self.weight.permute(2, 0, 1) * self.gain).flatten(1)


def gaussian() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 8), torchdrop.GaussianDropout(0.5), torchdrop.Dropout(0.5, inverted=False), nn.Linear(8, 2)
    ).double()


class Noisy(nn.Module):
    """Layers that draw masks and normal variates of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.zoneout, self.out = torchdrop.Zoneout(0.5), torchdrop.VariationalLinear(8, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        old = torch.tanh(self.first(x))
        return self.out(self.zoneout(torch.tanh(self.second(old)), old))


MODELS: dict[str, tuple[Build, list[dict[str, float]]]] = {
    "rates per layer, 0 and 1": (mlp(), [{"0": 0.9, "4": 0.5}, {"*": 1.0}, {"0": 1.0, "4": 0.3}, {"4": 0.0}]),
    "batch norm": (mlp(lambda: nn.BatchNorm1d(8)), grid({"*": [0.5, 1.0]})),
    "layer norm": (mlp(lambda: nn.LayerNorm(8)), grid({"*": [0.5, 1.0]})),
    "tied, frozen and unused": (Shared, grid({"drop": [0.5, 0.9]})),
    "convolution": (Convolution, [{"drop": 0.5, "alpha": 0.8}, {"*": 0.9}]),
    "permuted": (Permuted, grid({"*": [0.5, 0.9]})),
    "gaussian and original": (gaussian, grid({"*": [0.5, 0.9]})),
    "numbers of their own": (Noisy, grid({"zoneout": [0.5, 0.9]})),
}

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-4),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
}


def prepared(build: Build, settings: Any, optimizer: Any = default_optimizer, epochs: int = 2) -> Any:
    """The jobs of three folds, fold by fold, and how they are trained."""
    training = Training(*data(), default_loss, default_score, optimizer, epochs, batch_size=10, seed=3)
    folds = [Fold(i, *part, search._built(build, i)) for i, part in enumerate(divide(ROWS, 3, 3))]
    rates = rates_of(folds[0].model, settings)
    return [stacked.Job(fold, own) for fold in folds for own in rates], training


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("build", "settings"), MODELS.values(), ids=MODELS)
@pytest.mark.slow
def test_models_trained_at_once_are_those_trained_alone(build: Build, settings: Any, optimizer: Any) -> None:
    jobs, training = prepared(build, settings, optimizer)
    stack = stacked.Stack(jobs, training)
    assert stack._step != stack._gradients, "the step was not traced"
    stack.train(lambda: None)
    for model, job in zip(stack.models(), jobs, strict=True):
        alone, finite = train_alone(job.fold, job.rates, training, lambda: None)
        assert finite
        start, ours = job.fold.model.state_dict(), model.state_dict()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-10)
        assert any(not torch.equal(ours[name], start[name]) for name in ours)
    assert all(stack.finite)


def test_rate_1_is_training_without_dropout() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), torchdrop.Dropout(0.5), nn.Linear(8, 2)).double()

    jobs, training = prepared(build, [{"2": 1.0}, {"2": 0.0}], OPTIMIZERS["sgd"])
    stack = stacked.Stack(jobs[2:4], training)
    stack.train(lambda: None)
    without, nothing_kept = stack.models()
    fold = jobs[2].fold
    plain = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    plain.load_state_dict({name.replace("3.", "2."): value for name, value in fold.model.state_dict().items()})
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for epoch in training.batches(fold):
        for rows in epoch:
            optimizer.zero_grad()
            F.cross_entropy(plain(training.inputs[rows]), training.targets[rows]).backward()
            optimizer.step()
    torch.testing.assert_close(without[3].weight, plain[2].weight, rtol=1e-9, atol=1e-12)
    decayed = nothing_kept[3].weight / fold.model[3].weight
    torch.testing.assert_close(decayed, decayed[:1, :1].expand_as(decayed))


def test_an_epoch_visits_each_row_once_and_the_rest_comes_in_other_epochs() -> None:
    jobs, training = prepared(mlp(), [{"0": 1.0}], epochs=40)
    fold = jobs[0].fold
    epochs = list(training.batches(fold))
    assert [tuple(rows.shape) for rows in epochs] == [(3, 10)] * 40
    assert all(len(rows.unique()) == 30 for rows in epochs)
    assert set(torch.stack(epochs).flatten().tolist()) == set(fold.train.tolist())
    assert torch.equal(next(training.batches(fold)), epochs[0])
    other = jobs[1].fold
    places = [[part.train.tolist().index(row) for row in rows.flatten()] for part, rows in (
        (fold, epochs[0]), (fold, epochs[1]), (other, next(training.batches(other)))
    )]  # fmt: skip
    assert places[0] != places[1]
    assert places[0] != places[2]


def test_masks_have_their_rate_and_are_nested() -> None:
    n = draws_for(0.3, 0.01)
    x, masks = torch.ones(n), Masks(seed=5)

    def kept(fold: int, step: int, keep_prob: float, calls: int = 1) -> Tensor:
        layer = torchdrop.Dropout(keep_prob=keep_prob)
        with masks.at(torch.tensor((fold << 32) + step)):
            return [layer(x) for _ in range(calls)][-1] != 0

    mask = kept(0, 0, 0.3)
    check_rate(int(mask.sum()), n, 0.3, 0.01)
    assert torch.equal(mask, kept(0, 0, 0.3))
    assert bool((kept(0, 0, 0.8) | ~mask).all())
    others = [kept(1, 0, 0.3), kept(0, 1, 0.3), kept(0, 0, 0.3, calls=2)]
    for other in others:
        check_rate(int((mask & other).sum()), n, 0.09, 0.01)
    with Masks(seed=6).at(torch.tensor(0)):
        check_rate(int((mask & (torchdrop.Dropout(keep_prob=0.3)(x) != 0)).sum()), n, 0.09, 0.01)


def test_the_masks_of_vmap_are_those_of_a_loop() -> None:
    masks, streams, x = Masks(seed=5), torch.tensor([0, 1, 1 << 32]), torch.ones(3, 200)
    layer = torchdrop.Dropout(0.5)

    def run(x: Tensor, stream: Tensor) -> Tensor:
        with masks.at(stream):
            return layer(layer(x))

    expected = torch.stack([run(row, stream) for row, stream in zip(x, streams, strict=True)])
    assert torch.equal(torch.func.vmap(run)(x, streams), expected)


def found(build: Build = mlp(), settings: Any = None, **other: Any) -> SearchResult:  # noqa: B008
    arguments = {"folds": 3, "epochs": 2, "batch_size": 10, "seed": 3, "score": minus_loss} | other
    return cross_validate(build, *data(), settings or grid({"0": [0.8, 1.0], "4": [0.5, 0.9]}), **arguments)


def minus_loss(output: Tensor, target: Tensor) -> float:
    return -F.cross_entropy(output, target).item()


def test_scores_depend_neither_on_how_many_are_trained_at_once_nor_on_which() -> None:
    settings = grid({"0": [0.8, 1.0], "4": [0.5, 0.9]})
    together = found()
    assert together.at_once == 12
    for at_once, most in ((5, 4), (12, 12), (1, 1)):
        other = found(at_once=at_once)
        assert other.at_once == most
        torch.testing.assert_close(other.scores, together.scores, rtol=1e-9, atol=1e-12)
    alone = found(settings=[settings[2], settings[2], {"4": 0.7}])
    torch.testing.assert_close(alone.scores[0], together.scores[2], rtol=1e-9, atol=1e-12)
    assert torch.equal(alone.scores[0], alone.scores[1])
    assert len(together.scores.unique()) == 12
    assert not torch.allclose(found(seed=4).scores, together.scores, rtol=1e-3)


def test_folds_of_different_lengths_keep_their_own_number_of_steps() -> None:
    order = torch.randperm(ROWS).tolist()
    folds = [(order[:40], order[40:]), (order[10:25], order[:10]), (order[7:], order[:7])]
    together, alone = found(folds=folds), found(folds=folds, at_once=1)
    assert together.at_once == 8
    torch.testing.assert_close(together.scores, alone.scores, rtol=1e-9, atol=1e-12)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.drop, self.out = nn.LSTM(FEATURES, 4, 2, dropout=0.5), nn.Dropout(0.5), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.lstm(x)[0]))


class Odd(nn.Module):
    """What the forward does besides is given."""

    def __init__(self, besides: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.drop, self.out, self.besides, self.calls = torchdrop.Dropout(0.5), nn.Linear(FEATURES, 2), besides, 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.besides(self, x)))


def counted(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    return x * (1.0 if model.calls < 4 else 2.0)


REFUSED: dict[str, tuple[Build, Any, str]] = {
    "LSTM": (Recurrent, grid({"drop": [0.5, 0.9]}), "cannot be vectorized"),
    "a rate of an LSTM": (Recurrent, grid({"*": [0.5, 0.9]}), "rate that is no layer, 'lstm' .LSTM."),
    "torch's random numbers": (
        lambda: Odd(lambda model, x: x + torch.rand_like(x)), grid({"drop": [0.5, 0.9]}), "vectorized .*random"
    ),
    "control flow": (
        lambda: Odd(lambda model, x: x if x.sum() > 0 else -x), grid({"drop": [0.5, 0.9]}), "vectorized .*control"
    ),
    "state": (lambda: Odd(counted), grid({"drop": [0.5, 0.9]}), "the forward changes an attribute .*, 'calls'"),
    "a rate for each element": (
        mlp(), [{"0": torch.full((FEATURES,), k)} for k in (0.5, 0.9)], "keep_prob of '0' is a tensor with more"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_vectorized_is_trained_one_after_another(build: Build, settings: Any, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"one model after another.*{reason}") as caught:
        result = found(build, settings)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (result.at_once, bool(result.reason)) == (1, True)
    assert "one after another" in repr(result)
    assert not result.scores.isnan().any()
    asked = found(build, settings, at_once=1)
    assert torch.equal(asked.scores, result.scores)
    assert not asked.reason


def test_an_optimizer_that_may_mix_elements_is_not_given_stacked_parameters() -> None:
    class Normed(torch.optim.SGD):
        pass

    for make in (lambda p: Normed(p, lr=0.1), lambda p: torch.optim.Adafactor(p, lr=0.1)):
        with pytest.warns(UserWarning, match="(Normed|Adafactor) is not known to update each element"):
            result = found(optimizer=make)
        assert result.at_once == 1


def branching(model: Any, x: Tensor) -> Tensor:
    return x if torch.fx.experimental.proxy_tensor.get_proxy_mode() is None else x + 1.0


def untraceable(model: Any, x: Tensor) -> Tensor:
    if torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
        raise RuntimeError("not to be traced")
    return x


@pytest.mark.parametrize("besides", [branching, untraceable])
def test_a_step_whose_graph_is_wrong_runs_as_it_is(besides: Any) -> None:
    jobs, training = prepared(lambda: Odd(besides), grid({"drop": [0.5, 0.9]}))
    stack = stacked.Stack(jobs, training)
    assert stack._step == stack._gradients
    stack.train(lambda: None)
    for model, job in zip(stack.models(), jobs, strict=True):
        alone, _ = train_alone(job.fold, job.rates, training, lambda: None)
        torch.testing.assert_close(model.out.weight, alone.out.weight, rtol=1e-9, atol=1e-9)


def logarithm(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.log(), target)


def positive() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 2), nn.Softplus(), torchdrop.Dropout(0.5)).double()


@pytest.mark.parametrize("at_once", [None, 1])
def test_a_model_that_diverges_has_no_score_and_spoils_no_other(at_once: int | None) -> None:
    settings = [{"2": 0.5}, {"2": 1.0}]
    result = found(positive, settings, loss=logarithm, score=default_score, at_once=at_once)
    assert result.scores.isnan().tolist() == [[True] * 3, [False] * 3]
    assert result.best == result.one_standard_error == {"2": 1.0}
    assert result.order == [1, 0]
    assert "diverged in 3 of 3 folds" in repr(result).splitlines()[-1]
    alone = found(positive, settings[1:], loss=logarithm, score=default_score, at_once=at_once)
    torch.testing.assert_close(alone.scores[0], result.scores[1])
    result.plot()
    every = found(positive, settings[:1], loss=logarithm, score=default_score, at_once=at_once)
    with pytest.raises(ValueError, match="every setting diverged"):
        _ = every.best
    every.plot()
    assert "diverged" in repr(every)


def test_the_state_of_the_caller_is_left_alone() -> None:
    model, (x, y) = mlp()(), data()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    model.eval()
    x0, y0 = x.clone(), y.clone()
    settings = grid({"0": [0.8, 1.0]})
    with torch.no_grad():
        cross_validate(lambda: model, x, y, settings, folds=2, epochs=1, batch_size=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model[0]) is nn.Dropout
    assert not model.training
    assert torch.equal(x, x0)
    assert torch.equal(y, y0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_fold_has_its_own_parameters_from_the_seed() -> None:
    drawn: list[Tensor] = []

    def build() -> nn.Module:
        model = mlp()()
        drawn.append(model[1].weight.detach().clone())
        return model

    found(build)
    torch.rand(7)
    found(build)
    assert len(drawn) == 6
    assert torch.equal(torch.stack(drawn[:3]), torch.stack(drawn[3:]))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("at_once", [None, 1])
def test_models_are_trained_in_train_mode(at_once: int | None) -> None:
    assert torch.equal(found(lambda: mlp()().eval(), at_once=at_once).scores, found(at_once=at_once).scores)


def test_regression_has_its_own_defaults() -> None:
    x, _ = data()
    y = x[:, :1] - x[:, 1:2]
    build = lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.1), nn.Linear(8, 1)).double()  # noqa: E731
    result = cross_validate(build, x, y, grid({"1": [1.0, 0.5]}), epochs=30, batch_size=8, optimizer=OPTIMIZERS["adam"])
    assert bool((result.scores <= 0).all())
    assert result.best == {"1": 1.0}
    assert float(result.means[0]) > -0.5 * float(y.var())
    with pytest.raises(ValueError, match=r"targets' shape \(8,\) .* got \(8, 1\)"):
        cross_validate(build, x, y[:, 0], [{"1": 1.0}], epochs=1, batch_size=8)


RESULT = SearchResult(
    [{"a": 0.9}, {"a": 0.5, "b": 0.4}, {"a": 0.3}, {"a": 0.6}],
    torch.tensor([[0.9, 1.0, 0.8], [0.85, 0.86, 0.84], [0.84, 0.84, 0.84], [0.8, 0.9, torch.nan]], dtype=torch.float64),
    [0.9, 0.45, 0.3, 0.6],
    12,
)


def test_the_choices_of_a_result() -> None:
    error = 0.1 / math.sqrt(3)
    torch.testing.assert_close(RESULT.means[:3], torch.tensor([0.9, 0.85, 0.84], dtype=torch.float64))
    torch.testing.assert_close(float(RESULT.standard_errors[0]), error)
    assert RESULT.order == [0, 1, 2, 3]
    assert RESULT.best == {"a": 0.9}
    assert 0.9 - error > 0.842
    assert RESULT.one_standard_error == {"a": 0.5, "b": 0.4}
    wider = SearchResult(RESULT.settings, RESULT.scores + torch.tensor([[0.1], [0], [0], [0]]) * 0, [0.9] * 4, 12)
    assert wider.one_standard_error == {"a": 0.9}
    rows = RESULT.rows
    assert [row["setting"] for row in rows] == list(RESULT.settings)
    assert rows[1]["mean_keep_prob"] == 0.45
    assert rows[1]["scores"] == RESULT.scores[1].tolist()
    assert math.isnan(rows[3]["mean"])


def test_a_result_prints_as_a_table_and_plots() -> None:
    lines = repr(RESULT).splitlines()
    assert lines[0] == "3 folds, 4 settings, up to 12 models trained at once"
    assert lines[1].split() == ["keep_prob", "of", "'a'", "'b'", "mean", "s.e."]
    assert lines[2].split() == ["0.9", "0.900", "0.058", "best"]
    assert lines[3].split() == ["0.5", "0.4", "0.850", "0.006", "one", "standard", "error"]
    assert lines[5].endswith("diverged in 1 of 3 folds")
    ax = RESULT.plot()
    assert ax.get_xlabel() == "mean keep_prob of the layers"
    shared = SearchResult([{"a": 0.9}, {"a": 0.5}], RESULT.scores[:2], [0.95, 0.75], 1)
    ax = shared.plot()
    assert ax.get_xlabel() == "keep_prob of 'a'"
    assert [float(line.get_xdata()[0]) for line in ax.lines if line.get_label() == "best"] == [0.9]
    assert shared.plot(ax) is ax


def test_the_mean_keep_prob_counts_layers() -> None:
    result = found(settings=[{"*": 0.6}, {"0": 1.0}])
    torch.testing.assert_close(torch.tensor(result.mean_keep_probs), torch.tensor([0.6, 0.75]))


@given(rows=st.integers(2, 60), folds=st.integers(2, 60), seed=st.integers(0, 9))
def test_folds_divide_the_rows(rows: int, folds: int, seed: int) -> None:
    if folds > rows:
        with pytest.raises(ValueError, match=f"folds must be at most the number of rows, {rows}, got {folds}"):
            divide(rows, folds, seed)
        return
    parts = divide(rows, folds, seed)
    assert sorted(torch.cat([test for _, test in parts]).tolist()) == list(range(rows))
    assert all(sorted(torch.cat(part).tolist()) == list(range(rows)) for part in parts)
    sizes = [len(test) for _, test in parts]
    assert max(sizes) - min(sizes) <= 1


def test_splitters_of_scikit_learn_are_taken() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    x, y = data()
    splits = list(selection.StratifiedKFold(4).split(x.numpy(), y.numpy()))
    result = found(folds=iter(splits))
    assert result.scores.shape == (4, 4)
    assert [test.tolist() for _, test in divide(ROWS, splits, 0)] == [test.tolist() for _, test in splits]


def test_grids_and_draws() -> None:
    assert grid({"a": [0.1, 0.2], "b": [0.3]}) == [{"a": 0.1, "b": 0.3}, {"a": 0.2, "b": 0.3}]
    drawn = draws({"a": (0.2, 0.4), "b": (1.0, 1.0)}, 50, seed=1)
    assert all(0.2 <= setting["a"] <= 0.4 and setting["b"] == 1.0 for setting in drawn)
    assert len({setting["a"] for setting in drawn}) == 50
    assert draws({"a": (0.2, 0.4), "b": (1.0, 1.0)}, 5, seed=1) == drawn[:5] != draws({"a": (0.2, 0.4)}, 5, seed=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grid({}), ValueError, "at least one pattern"),
        (lambda: grid({"a": []}), ValueError, "'a' must have at least one keep_prob"),
        (lambda: grid({"a": 0.5}), TypeError, "'a' must have a list of keep_probs, got float"),
        (lambda: grid([0.5]), TypeError, "values must be a mapping"),
        (lambda: draws({"a": (0.5, 0.2)}, 3), ValueError, r"0 <= low <= high <= 1, got \(0.5, 0.2\)"),
        (lambda: draws({"a": (0.5, math.nan)}, 3), ValueError, "0 <= low"),
        (lambda: draws({"a": 0.5}, 3), TypeError, "must have a range"),
        (lambda: draws({"a": (0, 1)}, 0), ValueError, "n must be at least 1, got 0"),
        (lambda: draws({"a": (0, 1)}, 2.0), TypeError, "n must be an integer, got float"),
        (lambda: draws({}, 2), ValueError, "at least one pattern"),
    ],
)
def test_bad_settings(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"settings": ()}, ValueError, "settings must have at least one"),
    ({"settings": {"0": 0.5}}, TypeError, "settings must be a list"),
    ({"settings": [{"0": 0.5}, 0.5]}, TypeError, r"settings\[1\] must be a mapping"),
    ({"settings": [{"0": 0.5}, {}]}, ValueError, r"at least one pattern.*settings\[1\]"),
    ({"settings": [{"0": 0.5}, {"nowhere": 0.5}]}, ValueError, r"'nowhere' matches none.*settings\[1\]"),
    ({"settings": [{"0": 1.5}]}, ValueError, r"keep_prob must be in \[0, 1\], got 1.5.*settings\[0\]"),
    ({"settings": [{"0": math.nan}]}, ValueError, r"keep_prob must be in \[0, 1\]"),
    ({"settings": [{"0": "high"}]}, TypeError, "keep_prob must be a number"),
    ({"folds": 1}, ValueError, "folds must be at least 2, got 1"),
    ({"folds": ROWS + 1}, ValueError, f"folds must be at most the number of rows, {ROWS}, got {ROWS + 1}"),
    ({"folds": True}, TypeError, "folds must be an integer"),
    ({"folds": 2.5}, TypeError, "folds must be a number, or pairs"),
    ({"folds": [([0, 1], [2])]}, ValueError, "folds must be at least 2, got 1"),
    ({"folds": [([0, 1], [2]), ([0], [])]}, ValueError, r"folds\[1\] must have training and test rows"),
    ({"folds": [([0, 1], [2]), ([0], [ROWS])]}, ValueError, rf"folds\[1\] must hold indices in \[0, {ROWS}\)"),
    ({"folds": [([0, 1], [1]), ([0], [1])]}, ValueError, r"folds\[0\] must not test on .* row 1"),
    ({"folds": [([True, False], [True])] * 2}, TypeError, "must hold indices of rows, got torch.bool"),
    ({"folds": [3, 4]}, TypeError, r"folds\[0\] must be a pair"),
    ({"batch_size": 32}, ValueError, "batch_size must be at most 31, the smallest training part's rows, got 32"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
    ({"epochs": 2.0}, TypeError, "epochs must be an integer, got float"),
    ({"seed": "1"}, TypeError, "seed must be an integer"),
    ({"at_once": 0}, ValueError, "at_once must be at least 1, got 0"),
    ({"loss": None}, TypeError, "loss must be a function, got NoneType"),
    ({"build": mlp()()}, TypeError, "build must be a function, got Sequential"),
    ({"build": lambda: None}, TypeError, "build must give a torch.nn.Module, got NoneType"),
    ({"inputs": [[1.0]]}, TypeError, "inputs must be a tensor, got list"),
    ({"targets": torch.zeros(3)}, ValueError, r"same number of rows, got the shapes \(47, 6\) and \(3,\)"),
    ({"loss": lambda output, target: output}, ValueError, r"loss must give one number with a gradient, got \(10, 2\)"),
    (
        {"loss": lambda output, target: torch.tensor(1.0), "at_once": 1},
        ValueError,
        "loss must give one number with a gradient",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.slow
def test_bad_arguments_are_refused_before_anything_is_trained(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    trained = []

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        trained.append(1)
        return default_optimizer(parameters)

    x, y = data()
    arguments: dict[str, Any] = {
        "build": mlp(), "inputs": x, "targets": y, "settings": [{"0": 0.5}], "folds": 3, "epochs": 1, "batch_size": 10,
        "optimizer": optimizer,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        cross_validate(**(arguments | change))
    assert not trained
    cross_validate(**arguments)
    assert trained


def test_builds_must_be_alike() -> None:
    made = []

    def build() -> nn.Module:
        made.append(1)
        return mlp()() if len(made) == 1 else Shared()

    with pytest.raises(ValueError, match="build must give the same layers every time"):
        found(build)


@pytest.mark.parametrize("at_once", [None, 1])
def test_progress_counts_the_epochs_of_every_model(monkeypatch: pytest.MonkeyPatch, at_once: int | None) -> None:
    module = pytest.importorskip("tqdm.auto")
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, unit: str) -> None:
            self.total, self.done, self.closed = total, 0, False
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *exception: Any) -> None:
            self.closed = True

        def update(self, n: int) -> None:
            self.done += n

    monkeypatch.setattr(module, "tqdm", Bar)
    found(at_once=at_once)
    assert not bars
    found(at_once=at_once, progress=True)
    assert (bars[0].total, bars[0].done, bars[0].closed) == (24, 24, True)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'torchdrop\[tune\]'"):
        found(progress=True)


def score_of(setting: Any) -> float:
    return math.nan if setting["0"] > 0.9 else -abs(setting["0"] - 0.4)


def pretended(batches: list[int]) -> Callable[[list[Any]], SearchResult]:
    def evaluate(settings: list[Any]) -> SearchResult:
        batches.append(len(settings))
        scores = torch.tensor([[score_of(setting)] * 2 for setting in settings], dtype=torch.float64)
        return SearchResult(settings, scores, [setting["0"] for setting in settings], len(settings))

    return evaluate


def a_study(direction: str = "maximize") -> Any:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=1))


def suggest(trial: Any) -> dict[str, float]:
    return {"0": trial.suggest_float("input", 0.1, 1.0)}


def test_optuna_drives_batches_and_hears_every_score() -> None:
    study, batches = a_study(), []
    results = optuna_search(study, suggest, pretended(batches), trials=25, at_once=10)
    assert batches == [10, 10, 5]
    assert [len(result.settings) for result in results] == batches
    assert len(study.trials) == 25
    for trial in study.trials:
        expected = score_of({"0": trial.params["input"]})
        assert trial.state.name == ("FAIL" if math.isnan(expected) else "COMPLETE")
        assert math.isnan(expected) or trial.value == pytest.approx(expected)
    assert {"FAIL", "COMPLETE"} == {trial.state.name for trial in study.trials}


def test_optuna_searches_a_real_model() -> None:
    study = a_study()
    x, y = data()
    evaluate = lambda settings: cross_validate(mlp(), x, y, settings, folds=2, epochs=1, batch_size=10)  # noqa: E731
    [result] = optuna_search(study, suggest, evaluate, trials=3, at_once=3)
    assert result.at_once == 6
    assert study.best_value == pytest.approx(float(result.means.max()))


def test_optuna_failing_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    study, batches = a_study(), []
    with pytest.raises(ValueError, match=r"must maximize one value.*got .'MINIMIZE'"):
        optuna_search(a_study("minimize"), suggest, pretended(batches), trials=2)
    with pytest.raises(TypeError, match=r"study must be an optuna.Study, got NoneType"):
        optuna_search(None, suggest, pretended(batches), trials=2)
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        optuna_search(study, suggest, pretended(batches), trials=0)
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        optuna_search(study, suggest, pretended(batches), trials=2, at_once=0)
    assert not batches
    with pytest.raises(ZeroDivisionError):
        optuna_search(study, suggest, lambda settings: 1 // 0, trials=2)  # type: ignore[arg-type, return-value]
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL"]
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"this needs optuna: pip install 'torchdrop\[tune\]'"):
        optuna_search(study, suggest, pretended(batches), trials=2)


def test_large_models_are_trained_in_smaller_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(width: int, batch_size: int = 1) -> int:
        build = lambda: nn.Sequential(nn.Linear(FEATURES, width), nn.Dropout(0.5), nn.Linear(width, 2))  # noqa: E731
        x, y = data(torch.float32)
        training = Training(x, y, default_loss, default_score, default_optimizer, 1, batch_size, 0)
        return search._examined(Fold(0, *divide(ROWS, 2, 0)[0], build()), [0.5], training)

    assert limit(1_000) == 5 * 2**20 // 9_002
    assert limit(1_000_000) == 1
    monkeypatch.setattr(search, "BYTES", 2**20)
    assert 2 <= limit(1_000, batch_size=20) <= 2**20 // (2 * 20 * 1_000 * 4)
    assert limit(1_000, batch_size=10) > 1.5 * limit(1_000, batch_size=20)


def test_no_warning_and_no_mode_is_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found()
    assert torch._C._len_torch_function_stack() == 0
    x = torch.ones(1000)
    key = torch.zeros(2, dtype=torch.int64)
    masked = operators.masked(x, key, mask_params(0.5), x.shape)
    assert not torch.equal(torchdrop.Dropout(0.5)(x), masked)

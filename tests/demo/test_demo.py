"""The main job: what it computes, what it prints and draws, and how it refuses."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchdrop.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")

from torchdrop import keep_probs, mc_predict
from torchdrop.demo import regression
from torchdrop.demo.data import TRAIN_SIZE, load
from torchdrop.demo.evaluation import error, monte_carlo, probabilities, running_mean, score
from torchdrop.demo.network import RATES, SIZES, WITHOUT, build, describe, ramp
from torchdrop.demo.report import (
    catch_up,
    catch_up_sentence,
    difference_sentence,
    mean_and_error,
    sources_sentence,
)
from torchdrop.demo.training import train
from torchdrop.monte_carlo import RegressionPrediction, tau_from_weight_decay

pytestmark = pytest.mark.slow

SMALL = ["demo", "--seeds", "2", "--epochs", "3", "--samples", "12"]
FIGURES = {"error_against_k.png", "reliability.png", "most_uncertain.png", "regression.png", "schedule.png"}
ROWS = ["no dropout", "dropout, deterministic pass", "dropout on a schedule, deterministic"] + [
    f"dropout, Monte Carlo, k = {k}" for k in (1, 10, 12)
]

Printed = Callable[..., str]


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What a small run prints, without the time it took."""
    monkeypatch.setattr(regression, "STEPS", 20)

    def run(*more: str) -> str:
        assert main([*SMALL, "--output", str(tmp_path / "figures"), *more]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out[: out.index("Took")]

    return run


def test_command_writes_figures_and_prints_the_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "torchdrop", *SMALL, "--output", "made/here"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    for row in ROWS:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(row + " ")]
        assert line.count(" ± ") == 3
    written = {path.name: path.read_bytes() for path in (tmp_path / "made/here").iterdir()}
    assert set(written) == FIGURES
    for name, content in written.items():
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 20_000
        assert f"{Path('made/here') / name}\n" in done.stdout
    assert "native kernels are" in done.stdout
    assert "3 of 3 sources of randomness were active: layers 0 (p = 0.1), 2 (p = 0.24), 5 (p = 0.5)." in done.stdout
    assert "The mean epistemic standard deviation is " in done.stdout


def test_same_options_same_table_and_nothing_else_disturbed(printed: Printed) -> None:
    torch.manual_seed(1)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = printed("--seed", "3")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    assert printed("--seed", "3") == first
    assert printed("--seed", "4").replace("Seeds 4 to 5", "Seeds 3 to 4") != first


@pytest.mark.parametrize(("seeds", "samples"), [(1, 3), (2, 1)])
def test_smallest_numbers(printed: Printed, seeds: int, samples: int) -> None:
    out = printed("--seeds", str(seeds), "--samples", str(samples), "--epochs", "1")
    assert f"k = {samples} " in out
    assert (" ± " in out) == (seeds > 1)
    assert "nan" not in out


def test_progress_bar_on_a_terminal(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    printed()
    shown = terminal.getvalue()
    for text in (
        "seed 1 of 2, without dropout",
        "with dropout on a schedule",
        "seed 2 of 2, Monte Carlo",
        "regression",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--samples", "0", "must be a whole number of at least 1, got '0'"),
        ("--samples", "-1", "must be a whole number of at least 1, got '-1'"),
        ("--samples", "ten", "must be a whole number of at least 1, got 'ten'"),
        ("--epochs", "1.5", "must be a whole number of at least 1, got '1.5'"),
        ("--epochs", "nan", "must be a whole number of at least 1, got 'nan'"),
        ("--seeds", "0", "must be a whole number of at least 1, got '0'"),
        ("--seed", "-1", f"must be a whole number from 0 to {2**63 - 1}, got '-1'"),
        ("--seed", str(2**63), f"must be a whole number from 0 to {2**63 - 1}, got '{2**63}'"),
        ("--seed", "", f"must be a whole number from 0 to {2**63 - 1}, got ''"),
        ("--device", "nonsense", "must be a device that PyTorch can use here, got 'nonsense': "),
        ("--device", "meta", "must be a device that PyTorch can use here, got 'meta': "),
        ("--device", "cuda:9999", "must be a device that PyTorch can use here, got 'cuda:9999': "),
        ("--output", "", "must be the name of a folder, got ''"),
        ("--output", "file", "must be a folder that can be written to, got 'file': "),
        ("--output", "file/below", "must be a folder that can be written to, got 'file/below': "),
    ],
)
def test_bad_value_is_one_line_and_status_2(
    option: str,
    value: str,
    rule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["demo", option, value])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith(f"python -m torchdrop demo: error: argument {option}: {rule}")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments", [["other"], ["demo", "--sample", "3"], ["demo", "--samples"], ["demo", "extra\nline"]]
)
def test_bad_usage_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert "error: " in err


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: python -m torchdrop" in err
    assert "demo" in err


def test_optional_packages(tmp_path: Path) -> None:
    """They are not imported with torchdrop, and the demo says so where one is missing."""
    script = """
import sys, torchdrop
assert not {"sklearn", "matplotlib", "torchmetrics", "torchdrop.demo"} & set(sys.modules)
from torchdrop.__main__ import main
for package in "tqdm", "sklearn", "matplotlib", "torchmetrics":
    for name in [name for name in sys.modules if name.startswith("torchdrop.demo")]:
        del sys.modules[name]
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    sys.modules.update(dict.fromkeys([*before, package]))
    try:
        main(["demo"])
    except SystemExit as stopped:
        print(stopped.code)
    del sys.modules[package]
    sys.modules.update(before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["2"] * 4), done.stderr
    assert done.stderr.splitlines() == [
        f"python -m torchdrop demo: error: the demo needs {name}, which is not installed: pip install 'torchdrop[demo]'"
        for name in ("tqdm", "scikit-learn", "matplotlib", "torchmetrics")
    ]
    assert list(tmp_path.iterdir()) == []


def test_interrupt_ends_with_status_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchdrop.demo.run.run", interrupted)
    assert main(["demo", "--output", str(tmp_path)]) == 130


def test_split_is_fixed_stratified_and_centered() -> None:
    digits, again = load(torch.device("cpu")), load(torch.device("cpu"))
    assert torch.equal(digits.train_images, again.train_images)
    assert digits.train_images.shape == (TRAIN_SIZE, 64)
    assert digits.test_images.shape == (1797 - TRAIN_SIZE, 64)
    assert all(abs(n - TRAIN_SIZE / 10) <= 2 for n in torch.bincount(digits.train_labels).tolist())
    assert digits.train_images.mean(0).abs().max() < 1e-6
    ranges = digits.test_images.amax(0) - digits.test_images.amin(0)
    assert ranges.max() == pytest.approx(1)
    assert digits.test_pictures.shape == (1797 - TRAIN_SIZE, 8, 8)


def test_keep_probs_follow_the_weight_matrices() -> None:
    sizes = [64, 128, 512, 256, 10]
    keep = list(keep_probs(build(sizes, RATES)).values())
    assert len(keep) == len(sizes)
    assert keep[0] == 0.9
    assert keep[-1] == 1
    weights = [sizes[i] * sizes[i + 1] for i in range(3)]
    hidden = keep[1:-1]
    assert min(hidden) == hidden[weights.index(max(weights))] == 0.5
    assert [k for _, k in sorted(zip(weights, hidden, strict=True))] == sorted(hidden, reverse=True)
    assert all(0.5 <= k < 0.8 < keep[0] for k in hidden)
    assert hidden[0] == pytest.approx(0.8 - 0.3 * (64 * 128) / (512 * 256))
    assert list(keep_probs(build([4, 3], RATES)).values()) == [0.9, 1.0]


def test_the_schedule_is_curriculum_dropout_at_each_layers_own_rate() -> None:
    shown = describe(SIZES, RATES, 150).splitlines()
    assert shown[0].endswith("at epoch 0, 7, 30, 150")
    for line, keep in zip(shown[1:], (0.9, 0.7625, 0.5, 1.0), strict=True):
        values = [float(value) for value in line.split()[-5:]]
        expected = [keep] + [1 - (1 - keep) * (1 - math.exp(-10 * epoch / 150)) for epoch in (0, 7, 30, 150)]
        assert values == pytest.approx(expected, abs=0.005 + 1e-9)


def test_training_on_a_schedule_ends_at_its_last_rates() -> None:
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    network = build([6, 8, 3], RATES)
    seen = []
    train(network, x, y, epochs=3, seed=0, schedule={"*": ramp(3)}, after_epoch=lambda: seen.append(network[0].p))
    assert seen == pytest.approx([0.1 * (1 - math.exp(-10 * epoch / 3)) for epoch in (1, 2, 3)])


def test_networks_differ_in_dropout_only() -> None:
    networks = []
    for rates in (WITHOUT, RATES):
        torch.manual_seed(0)
        networks.append(build(SIZES, rates))
    plain, dropped = (network.state_dict() for network in networks)
    assert all(torch.equal(plain[name], dropped[name]) for name in plain | dropped)
    x = torch.randn(4, SIZES[0])
    assert torch.equal(networks[0].train()(x), networks[0].eval()(x))
    assert not torch.equal(networks[1].train()(x), networks[1].eval()(x))
    assert torch.equal(networks[1].eval()(x), networks[0].eval()(x))


def test_order_of_the_data_is_the_seed_alone() -> None:
    """With nothing dropped, training twice gives the same weights whatever the default generator holds."""
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    results = []
    for seed, noise in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(0)
        network = build([6, 8, 3], WITHOUT)
        torch.manual_seed(noise)
        train(network, x, y, epochs=2, seed=seed, schedule={}, after_epoch=lambda: None)
        results.append(network(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("mode", [True, False])
def test_monte_carlo_is_mc_predict(mode: bool) -> None:
    """The curve is the running mean of its samples, and the network stays in the mode that it was in."""
    network = build([5, 16, 3], RATES).train(mode)
    x = torch.randn(7, 5)
    before = torch.get_rng_state()
    result = monte_carlo(network, x, 4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training == mode for module in network.modules())
    expected = mc_predict(network, x, samples=4, task="classification", keep_samples=True, seed=3)
    assert result.samples is not None
    assert expected.samples is not None
    assert torch.equal(result.samples, expected.samples)
    assert not torch.equal(result.samples[0], result.samples[1])
    means = list(running_mean(result.samples))
    assert len(means) == 4
    for k, mean in enumerate(means, start=1):
        torch.testing.assert_close(mean, result.samples[:k].double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(means[-1], result.mean.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [True, False])
def test_one_pass_is_deterministic(mode: bool) -> None:
    network = build([5, 16, 3], RATES).train(mode)
    x = torch.randn(7, 5)
    once = probabilities(network, x)
    assert torch.equal(once, probabilities(network, x))
    assert torch.equal(once, network.eval()(x).double().softmax(1))
    network.train(mode)
    probabilities(network, x)
    assert all(module.training == mode for module in network.modules())


def test_sources_sentence() -> None:
    network = build([5, 16, 3], RATES)
    result = monte_carlo(network, torch.randn(7, 5), 4, seed=3)
    sentence = sources_sentence(result)
    assert f"strategy '{result.strategy}', " in sentence
    assert sentence.endswith("2 of 2 sources of randomness were active: layers 0 (p = 0.1), 2 (p = 0.5).")


def test_scores_by_hand() -> None:
    predicted = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    accuracy, nll, ece = score(predicted, torch.tensor([0, 1]))
    assert accuracy == 0.5
    assert nll == pytest.approx(-(np.log(0.7) + np.log(0.3)) / 2)
    assert ece == pytest.approx((0.3 + 0.4) / 2)


def test_calibration_error_has_15_bins() -> None:
    """Confidences 0.61 and 0.65 share the bin [9/15, 10/15); 0.67 lies in the next one."""
    predicted = torch.tensor([[0.61, 0.39], [0.65, 0.35], [0.67, 0.33]]).double()
    labels = torch.tensor([0, 0, 1])
    assert score(predicted, labels).ece == pytest.approx((2 * (1 - 0.63) + 0.67) / 3)
    assert error(predicted, labels) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def fitted() -> regression.Fit:
    return regression.fit(0, torch.device("cpu"))


def test_regression_is_less_certain_away_from_its_data(fitted: regression.Fit) -> None:
    among, gap, beyond = regression.regions(fitted.prediction)
    assert 0 < among.std < gap.std < beyond.std
    assert all(0 <= region.held <= 1 for region in (among, gap, beyond))
    truth = regression.function(regression.GRID)
    near = regression.GRID.abs() <= 3
    assert (fitted.prediction.mean[near, 0] - truth[near]).abs().mean() < regression.NOISE


def test_regression_data(fitted: regression.Fit) -> None:
    x, y = fitted.x, fitted.y
    assert x.shape == y.shape == (80, 1)
    (first, last), (again, end) = regression.INTERVALS
    assert ((first <= x) & (x <= last)).sum() == ((again <= x) & (x <= end)).sum() == 40
    assert (y - regression.function(x)).std() == pytest.approx(regression.NOISE, rel=0.5)


def test_regression_is_its_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "STEPS", 50)
    fits = []
    for seed, noise in ((0, 1), (0, 2), (2**63 - 1, 1)):
        torch.manual_seed(noise)
        before, threads = torch.get_rng_state(), torch.get_num_threads()
        fits.append(regression.fit(seed, torch.device("cpu")))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == threads
    one, same, other = fits
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.y, same.y)
    for name in ("mean", "epistemic_variance", "variance"):
        assert torch.equal(getattr(one.prediction, name), getattr(same.prediction, name))
    assert not torch.equal(one.x, other.x)
    assert not torch.equal(one.prediction.epistemic_variance, other.prediction.epistemic_variance)


def test_regression_noise_is_that_of_its_weight_decay(fitted: regression.Fit) -> None:
    noise = fitted.prediction.aleatoric_variance
    assert noise is not None
    torch.testing.assert_close(noise, torch.full_like(noise, regression.NOISE**2))
    tau = tau_from_weight_decay(regression.LENGTH_SCALE, regression.KEEP_PROB, len(fitted.x), regression.decay() / 4)
    assert tau == pytest.approx(1 / regression.NOISE**2)


def test_regions_by_hand() -> None:
    """The mean is off by 0.3 beyond the data, which 2 standard deviations are on the one side and not on the other."""
    x, model = regression.GRID, nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    prediction = mc_predict(model, x.unsqueeze(1), 2, task="regression", seed=0)
    assert isinstance(prediction, RegressionPrediction)
    std = torch.where(x.abs() <= 1, 0.2, torch.where(x < -3, 0.1, 0.4))
    made = replace(
        prediction,
        mean=(regression.function(x) + 0.3 * (x.abs() > 3)).unsqueeze(1),
        epistemic_variance=std.square().unsqueeze(1),
    )
    among, gap, beyond = regression.regions(made)
    assert (among.held, gap.held) == (1, 1)
    assert beyond.held == 0.5
    assert among.std == pytest.approx(0.4, rel=0.02)
    assert gap.std == pytest.approx(0.2, rel=0.02)
    assert beyond.std == pytest.approx(0.25, rel=0.02)


def test_regression_conclusions_follow_the_numbers(fitted: regression.Fit) -> None:
    choice, uncertainty, bands = regression.conclusions(fitted)
    among, gap, beyond = regression.regions(fitted.prediction)
    assert "80 points" in choice
    assert "tau = 100," in choice
    assert f"{among.std:.3f} where the data lie" in uncertainty
    assert f"{gap.std:.3f} in the gap between them ({gap.std / among.std:.1f} times that)" in uncertainty
    assert f"{beyond.std:.3f} beyond them ({beyond.std / among.std:.1f} times that)" in uncertainty
    assert bands.endswith(f"{100 * beyond.held:.0f} % beyond them.")


def test_mean_and_standard_error() -> None:
    mean, spread = mean_and_error([[1.0, 5.0], [3.0, 5.0]])
    np.testing.assert_allclose(mean, [2, 5])
    np.testing.assert_allclose(spread, [1, 0])
    assert [float(x) for x in mean_and_error([4.0])] == [4, 0]


def curve(*errors: float) -> list[list[float]]:
    """Two seeds around these means, the deterministic pass's being 1: each difference has a standard error of 0.1."""
    return [[e - 0.1 for e in errors], [e + 0.1 for e in errors]]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ((3, 2, 1.05, 1), (3, 3)),
        ((3, 1.05, 2, 1.05), (2, 4)),
        ((3, 1.05, 1, 2), (2, None)),
        ((3, 2, 2, 1.2), (None, None)),
        ((0.5, 0.5, 0.5, 0.5), (1, 1)),
    ],
)
def test_catch_up(errors: tuple[float, ...], expected: tuple[int | None, int | None]) -> None:
    assert catch_up(curve(*errors), [1, 1]) == expected


def test_catch_up_takes_differences_seed_by_seed() -> None:
    """Seeds far apart would hide a gap that every one of them shows."""
    assert catch_up([[1.2, 1.0], [9.2, 9.0]], [1, 9]) == (2, 2)


@pytest.mark.parametrize(
    ("length", "at", "verdict"),
    [
        (100, 3, "k = 3 and stays there: earlier than the published k near 50"),
        (100, 25, "k = 25 and stays there: near the published k = 50"),
        (100, 50, "k = 50 and stays there: near the published k = 50"),
        (200, 101, "k = 101 and stays there: later than the published k near 50"),
        (
            100,
            101,
            "does not come within one standard error of the deterministic pass's error in 100 passes: later than",
        ),
        (
            20,
            21,
            "does not come within one standard error of the deterministic pass's error in 20 passes: too few passes",
        ),
    ],
)
def test_catch_up_sentence(length: int, at: int, verdict: str) -> None:
    errors = [2.0 if k < at else 1.0 for k in range(1, length + 1)]
    assert verdict in catch_up_sentence(curve(*errors), [1, 1])


def test_catch_up_sentence_when_it_does_not_last() -> None:
    sentence = catch_up_sentence(curve(3, 1, 2), [1, 1])
    assert "at k = 2 but does not stay there up to k = 3" in sentence
    assert "at k = 2 and stays there from k = 4 on" in catch_up_sentence(curve(3, 1, 2, 1), [1, 1])
    assert "first comes down to the deterministic pass's error at k = 2" in catch_up_sentence([[2.0, 1.0]], [1.0])


def test_difference_sentence_goes_both_ways() -> None:
    assert difference_sentence("A", [0.01, 0.02], "B", [0.03, 0.04]).startswith("A has a test error 2.00 ± 0.00 ")
    assert "below B" in difference_sentence("A", [0.01, 0.02], "B", [0.03, 0.04])
    assert "above B" in difference_sentence("A", [0.03, 0.04], "B", [0.01, 0.02])
    assert "the same test error as B" in difference_sentence("A", [0.03], "B", [0.03])

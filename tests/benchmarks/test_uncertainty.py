"""The uncertainty benchmark: its digits, scores against computations of their own, pairs, tables and figure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import calibration
import machine
import mnist
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import uncertainty
import uncertainty_figure
import uncertainty_networks
import uncertainty_scores
import uncertainty_summary
import uncertainty_ways
from torch import Tensor
from uncertainty_networks import Kind
from uncertainty_ways import WAYS, Inputs, Outputs, pooled

import torchdrop

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:inference_rates. the likelihood still rises"),  # such are ten noisy pictures
]

SIZES = uncertainty.Sizes(groups=2, members=2, samples=4, training_images=80, held_out_images=40, turned_images=10)
KIND = Kind("small", lambda seed: calibration.network(mnist.PIXELS, 32, mnist.CLASSES, 0.5, seed), 60)


@pytest.fixture(scope="module")
def digits() -> mnist.Digits:
    """Noisy copies of ten random pictures."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(mnist.CLASSES, mnist.PIXELS, generator=generator)

    def some(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(mnist.CLASSES, (count,), generator=generator)
        noise = 0.6 * torch.randn(count, mnist.PIXELS, generator=generator)
        return (pictures[labels] + noise).clamp(0, 1), labels

    return mnist.Digits(*some(240), *some(120))


@pytest.fixture(scope="module")
def found(digits: mnist.Digits) -> list[uncertainty.Found]:
    with torch.random.fork_rng():
        return [uncertainty.of_group(digits, SIZES, KIND, group) for group in range(SIZES.groups)]


@pytest.fixture(scope="module")
def report(found: list[uncertainty.Found]) -> dict[str, Any]:
    network = {
        "kind": "small", "updates": KIND.updates, "rate": 0.5,
        **uncertainty_scores.over_groups([group.judged for group in found]),
        "fitted": {way: uncertainty_scores.with_error([one.fitted[way] for one in found]) for way in found[0].fitted},
    }  # fmt: skip
    settings = {
        **asdict(SIZES), "test_images": 120, "angles": list(uncertainty_scores.ANGLES), "quick": True,
        "bound": uncertainty_scores.bound(SIZES.groups), "seconds": 1.0, "cpu_seconds": 1.0,
    }  # fmt: skip
    return {"machine": machine.describe(torch.device("cpu")), "settings": settings, "networks": [network]}


class TestDigits:
    def test_parts_are_disjoint(self, digits: mnist.Digits) -> None:
        numbered = digits._replace(labels=torch.arange(240))
        found = uncertainty_networks.parts(numbered, 3, 50, 30)
        assert [(len(one.labels), len(one.held_out_labels)) for one in found] == [(50, 30)] * 3
        rows = torch.cat([torch.cat([one.labels, one.held_out_labels]) for one in found])
        assert rows.sort().values.equal(torch.arange(240))
        assert found[1].images.equal(digits.images[found[1].labels])
        assert found[1].held_out_images.equal(digits.images[found[1].held_out_labels])
        with pytest.raises(ValueError, match="4 parts take 320 training digits, got 240"):
            uncertainty_networks.parts(digits, 4, 50, 30)

    @pytest.mark.parametrize("quarters", [0, 1, 2, 3])
    def test_quarter_turns_are_exact(self, digits: mnist.Digits, quarters: int) -> None:
        images = digits.images[:5]
        turned = uncertainty_networks.rotated(images, 90 * quarters)
        expected = torch.rot90(images.reshape(-1, 28, 28), quarters, (1, 2)).reshape(-1, 784)
        torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)

    def test_turns_lose_only_what_leaves_the_picture(self) -> None:
        picture = torch.zeros(1, 28, 28)
        picture[:, 12:16, 8:20] = 1
        turned = uncertainty_networks.rotated(picture.reshape(1, -1), 30)
        assert float(turned.sum()) == pytest.approx(float(picture.sum()), rel=0.02)
        assert uncertainty_networks.rotated(torch.ones(1, 784), 45).reshape(28, 28)[0, 0] == 0

    def test_all_rotations_are_by_angle(self, digits: mnist.Digits) -> None:
        inputs, labels, turned_labels = uncertainty.tests(digits, SIZES)
        assert inputs.test.equal(digits.test_images)
        assert labels.equal(digits.test_labels)
        by_angle = inputs.turned.split(SIZES.turned_images)
        assert len(by_angle) == len(uncertainty_scores.ANGLES) == 13
        rows = [int((digits.test_images == image).all(1).nonzero()) for image in by_angle[0]]
        assert turned_labels.equal(digits.test_labels[rows])
        torch.testing.assert_close(by_angle[12], uncertainty_networks.rotated(by_angle[0], 180))


def area(wrong: np.ndarray, entropy: np.ndarray) -> float:
    """The area under risk against coverage by its definition: a threshold after another, and trapezoids."""
    points = [(float((entropy <= one).mean()), float(wrong[entropy <= one].mean())) for one in np.unique(entropy)]
    points = [(0.0, points[0][1]), *points]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def auroc(wrong: np.ndarray, uncertain: np.ndarray) -> float:
    first, second = uncertain[wrong][:, None], uncertain[~wrong][None]
    return float(((first > second) + 0.5 * (first == second)).mean())


def expected_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    return sum(abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)) / len(labels)


class TestScores:
    def test_of_the_deterministic_pass(self, digits: mnist.Digits, found: list[uncertainty.Found]) -> None:
        """The mean over the two networks of a group, each scored by hand."""
        part = uncertainty_networks.parts(digits, 2, 80, 40)[1]
        expected: dict[str, list[float]] = {score: [] for score in uncertainty_scores.SCORES[:-1]}
        labels = digits.test_labels.numpy()
        for seed in (2, 3):
            model = uncertainty_networks.trained(KIND, part, seed)
            with torch.no_grad():
                logits = model(digits.test_images).double()
            p = logits.softmax(1).numpy()
            wrong, entropy = p.argmax(1) != labels, -(p * np.log(p)).sum(1)
            assert 0.05 < wrong.mean() < 0.8
            expected["error"].append(wrong.mean())
            expected["negative_log_likelihood"].append(float(F.cross_entropy(logits, digits.test_labels)))
            expected["brier"].append(((p - np.eye(10)[labels]) ** 2).sum(1).mean())
            expected["calibration_error"].append(expected_error(p, labels))
            expected["risk_coverage_area"].append(area(wrong, entropy))
            expected["misclassification_auroc"].append(auroc(wrong, entropy))
        scores = found[1].judged["deterministic"]["scores"]
        for score, values in expected.items():
            assert scores[score] == pytest.approx(np.mean(values), abs=2e-6), score
        assert scores["mutual_information_auroc"] is None

    def test_risks_are_those_of_the_most_certain(self, digits: mnist.Digits) -> None:
        p = torch.rand(200, 10, dtype=torch.float64).softmax(1)
        labels = torch.randint(10, (200,))
        order = torch.special.entr(p).sum(1).argsort()
        wrong = (p.argmax(1) != labels)[order].double()
        risks = uncertainty_scores.risks(pooled(p.unsqueeze(0)), labels)
        expected = [float(wrong[: round(200 * share)].mean()) for share in uncertainty_scores.COVERAGES]
        assert risks == pytest.approx(expected)

    def test_under_rotation(self) -> None:
        angles = len(uncertainty_scores.ANGLES)
        samples = torch.rand(3, angles * 4, 10, dtype=torch.float64).softmax(2)
        labels = torch.tensor([1, 2, 3, 4])
        scores = uncertainty_scores.under_rotation(pooled(samples), labels)
        turn = uncertainty_scores.ANGLES.index(90)
        p = samples.mean(0)
        entropy = torch.special.entr(p).sum(1)
        rows = slice(4 * turn, 4 * turn + 4)
        expected_entropy = torch.special.entr(samples).sum(2).mean(0)
        assert scores["entropy"][turn] == pytest.approx(float(entropy[rows].mean()))
        assert scores["mutual_information"][turn] == pytest.approx(float((entropy - expected_entropy)[rows].mean()))
        assert scores["error"][turn] == float((p[rows].argmax(1) != labels).double().mean())
        assert scores["negative_log_likelihood"][turn] == pytest.approx(float(F.nll_loss(p[rows].log(), labels)))
        sure = torch.eye(10, dtype=torch.float64)[torch.zeros(angles * 4, dtype=torch.long)]
        lost = uncertainty_scores.under_rotation(pooled(sure.unsqueeze(0)), labels)["negative_log_likelihood"]
        assert lost == pytest.approx([-math.log(torch.finfo(torch.float32).tiny)] * angles)
        both = torch.cat([entropy[:4], entropy[rows]]).numpy()
        assert scores["outside_auroc"] == auroc(np.arange(8) >= 4, both)


class TestWays:
    def test_of_one_network(self, digits: mnist.Digits) -> None:
        part = uncertainty_networks.parts(digits, 2, 80, 40)[0]
        model = uncertainty_networks.trained(KIND, part, 0)
        single = uncertainty_ways.Single(model, part, 4, seed=7)
        x = digits.test_images[:20]
        found = dict(single.predictions(Inputs(x, x)))
        assert set(found) == {way for way in WAYS if not way.startswith("ensemble")}
        with torch.no_grad():
            logits = model(x)
        torch.testing.assert_close(found["deterministic"].test.mean, logits.softmax(1))
        assert float(found["deterministic"].test.mutual_information.abs().max()) < 1e-6
        t = single.fitted["deterministic, temperature"]
        torch.testing.assert_close(found["deterministic, temperature"].test.mean, (logits / t).softmax(1))
        keep = single.fitted["Monte Carlo, rates"]
        for way, sampling, keep_prob, fitted in (
            ("Monte Carlo", "iid", 0.5, None), ("Monte Carlo, latin", "latin", 0.5, None),
            ("Monte Carlo, temperature", "iid", 0.5, "Monte Carlo, temperature"),
            ("Monte Carlo, rates", "iid", keep, None),
            ("Monte Carlo, rates and temperature", "iid", keep, "Monte Carlo, rates and temperature"),
        ):  # fmt: skip
            torchdrop.set_keep_prob(model, {"*": keep_prob})
            samples = torchdrop.mc_predict(
                model, x, 4, task="classification", sampling=sampling, seed=7, keep_samples=True
            ).samples
            assert samples is not None
            scaled = samples.log() / (single.fitted[fitted] if fitted else 1)
            torch.testing.assert_close(found[way].test.mean, scaled.softmax(2).mean(0))

    def test_of_several_networks(self) -> None:
        p = torch.rand(4, 6, 3).softmax(2)
        held_out = torch.tensor([[[0.9, 0.05, 0.05]], [[0.1, 0.8, 0.1]]]).expand(2, 8, 3)
        members = [
            uncertainty_ways.Member(held_out[i : i + 1], (p[i : i + 1], p[i : i + 1, :2]), (p[i::2], p[i::2, :2]))
            for i in range(2)
        ]
        found, temperature = uncertainty_ways.ensembles(members, torch.tensor([0, 0, 0, 0, 0, 1, 1, 2]))
        torch.testing.assert_close(found["ensemble"].test.mean, p[:2].mean(0))
        torch.testing.assert_close(found["ensemble of Monte Carlo"].test.mean, p.mean(0))
        assert found["ensemble of Monte Carlo"].test.num_samples == 4
        assert found["ensemble"].turned.mean.shape == (2, 3)
        scaled = (p[:2].log() / temperature).softmax(2).mean(0)
        torch.testing.assert_close(found["ensemble, temperature"].test.mean, scaled)

    def test_an_ensemble_of_equal_networks_is_one_of_them(self) -> None:
        p = torch.rand(1, 6, 3).softmax(2)
        member = uncertainty_ways.Member(p, (p, p), (p, p))
        together = uncertainty_ways.ensembles([member, member], torch.arange(6) % 3)[0]["ensemble"].test
        torch.testing.assert_close(together.mean, p[0])
        assert float(together.mutual_information.abs().max()) < 1e-6

    def test_members_keep_few_samples(self, digits: mnist.Digits) -> None:
        part = uncertainty_networks.parts(digits, 2, 80, 40)[0]
        single = uncertainty_ways.Single(uncertainty_networks.trained(KIND, part, 0), part, 4, 0)
        samples = pooled(torch.rand(4, 6, 3).softmax(2))
        member = single.member(Outputs(samples, samples), Outputs(samples, samples), 2)
        assert samples.samples is not None
        assert member.samples[0].equal(samples.samples[:2])
        assert member.held_out.shape == (1, 40, 10)


class TestGroups:
    def test_means_and_standard_errors(self, found: list[uncertainty.Found], report: dict[str, Any]) -> None:
        values = [group.judged["ensemble"]["scores"]["brier"] for group in found]
        score = report["networks"][0]["scores"]["ensemble"]["brier"]
        assert score["by_group"] == pytest.approx(values, rel=1e-5)
        assert score["mean"] == pytest.approx(sum(values) / 2, rel=1e-5)
        assert score["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-5)
        entropy = [group.judged["Monte Carlo"]["rotation"]["entropy"][6] for group in found]
        curve = report["networks"][0]["rotation"]["Monte Carlo"]["entropy"]
        assert curve["mean"][6] == pytest.approx(sum(entropy) / 2, rel=1e-5)
        assert len(curve["mean"]) == 13

    def test_mean_of(self) -> None:
        nested = [{"a": [1.0, 2.0], "b": None, "c": {"d": 1.0}}, {"a": [3.0, 4.0], "b": None, "c": {"d": 2.0}}]
        assert uncertainty_scores.mean_of(nested) == {"a": [2.0, 3.0], "b": None, "c": {"d": 1.5}}

    def test_infinite_values_have_no_standard_error(self) -> None:
        found = uncertainty_scores.with_error([1.0, math.inf])
        assert found["mean"] == math.inf
        assert math.isnan(found["standard_error"])

    def test_the_bound_is_students(self) -> None:
        assert uncertainty_scores.bound(5) == pytest.approx(2.776, abs=1e-3)
        assert uncertainty_scores.bound(2) == pytest.approx(12.706, abs=1e-3)

    @pytest.mark.parametrize(
        ("values", "score", "verdict"),
        [
            ([0.10, 0.11, 0.10], "brier", "worse"),
            ([-0.10, -0.11, -0.10], "brier", "better"),
            ([0.10, 0.11, 0.10], "misclassification_auroc", "better"),
            ([0.10, -0.11, 0.10], "brier", "neither"),
            ([0.0, 0.0, 0.0], "brier", "neither"),
            ([None, None, None], "brier", None),
        ],
    )
    def test_differences_are_paired_and_judged(self, values: list[Any], score: str, verdict: str | None) -> None:
        groups = [
            {"one": {"scores": {score: None if value is None else level + value}}, "other": {"scores": {score: level}}}
            for level, value in zip((1.0, 3.0, 5.0), values, strict=True)
        ]
        found = uncertainty_scores.difference(groups, "one", "other", score)
        if verdict is None:
            assert found is None
            return
        assert found is not None
        assert found["verdict"] == verdict
        assert found["mean"] == pytest.approx(sum(values) / 3, rel=1e-4)
        assert found["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), rel=1e-4)


class TestTablesAndFigure:
    def test_every_way_has_its_rows(self, report: dict[str, Any]) -> None:
        tables = [part for part in uncertainty_summary.render(report).split("\n\n") if part.startswith("|")]
        rows = [[line.split(" | ")[1] for line in table.splitlines()[2:]] for table in tables]
        assert rows[0] == list(WAYS) == rows[2]
        assert rows[1] == [*WAYS[1:], *WAYS[2:], *WAYS[3:]]
        assert "nan" not in "".join(tables)

    def test_verdicts_are_said_by_score(self) -> None:
        verdicts = {
            "error": "better", "brier": "worse", "negative_log_likelihood": "better", "risk_coverage_area": "neither",
        }  # fmt: skip
        found = {score: {"verdict": verdict} for score, verdict in verdicts.items()} | {
            "mutual_information_auroc": None
        }
        assert uncertainty_summary.verdict(found) == "better: error, NLL; worse: Brier"
        assert uncertainty_summary.verdict({"error": None}) == "neither"

    def test_the_figure_has_a_line_and_a_band_for_each_way(self, report: dict[str, Any]) -> None:
        figure = ElementTree.fromstring(uncertainty_figure.figure(report))
        drawn = [element.tag.rpartition("}")[2] for element in figure.iter()]
        assert drawn.count("polyline") == drawn.count("polygon") == 6 + 4 + 6

    @pytest.mark.parametrize(
        ("largest", "expected"), [(1.4, (1.5, 0.5)), (0.21, (0.25, 0.05)), (17, (20, 5)), (5, (5, 1)), (5.01, (6, 2))]
    )
    def test_axes_end_at_a_tick(self, largest: float, expected: tuple[float, float]) -> None:
        assert uncertainty_figure.ends(largest) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data FILE is needed. MNIST can be had"),
        (["--data", "nowhere.npz"], "--data must be a file with MNIST, and nowhere.npz is none"),
        (["--data", "nowhere.npz", "--processes", "0"], "--processes must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        uncertainty.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], digits: mnist.Digits
) -> None:
    """From the file to the JSON, in this process; the run shows its progress."""
    monkeypatch.setattr(uncertainty, "QUICK", SIZES)
    monkeypatch.setattr(uncertainty, "KINDS_IF_QUICK", (KIND,))
    monkeypatch.setattr(mnist, "load", lambda data: digits)
    output = tmp_path / "report.json"
    uncertainty.main(["--data", "digits", "--quick", "--processes", "1", "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["machine"]["commit"]
    assert report["settings"]["cpu_seconds"] > 0
    assert [network["kind"] for network in report["networks"]] == ["small"]
    printed = capsys.readouterr().out
    assert "1 of 2 groups, " in printed
    assert uncertainty_summary.render(report) in printed

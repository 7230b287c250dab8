"""The MNIST benchmark: its loader, its training within a budget, what is made of evaluations, and its program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mnist
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop

ROWS, TESTS, HIDDEN = 600, 200, (16, 16, 16)
PLAIN, DROPOUT, CONSTRAINED = mnist.CONTENDERS


def arrays() -> dict[str, Any]:
    """Ten noisy patterns in MNIST's form."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (10, 28, 28))
    made: dict[str, Any] = {}
    for name, rows in (("train", ROWS), ("test", TESTS)):
        labels = rng.integers(0, 10, rows)
        noise = rng.integers(0, 56, (rows, 28, 28))
        made |= {f"x_{name}": (patterns[labels] + noise).astype(np.uint8), f"y_{name}": labels.astype(np.uint8)}
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "digits.npz", **arrays())
    return tmp_path / "digits.npz"


@pytest.fixture
def digits(file: Path) -> mnist.Digits:
    return mnist.load(file)


def by_epochs(epochs: float) -> Any:
    return lambda seconds, epoch: epoch / epochs


def test_images_are_scaled_rows_and_labels_are_classes(digits: mnist.Digits) -> None:
    made = arrays()
    assert torch.equal(digits.images, torch.from_numpy(made["x_train"].reshape(ROWS, 784).astype(np.float32) / 255))
    assert digits.test_images.shape == (TESTS, 784)
    assert digits.test_images.dtype == torch.float32
    assert digits.test_labels.tolist() == made["y_test"].tolist()


def test_an_absent_file_is_answered_with_where_mnist_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz is none") as caught:
        mnist.load(tmp_path / "nowhere.npz")
    assert "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz" in str(caught.value)
    assert "http://yann.lecun.com/exdb/mnist" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_test": None}, r"must hold y_test, got x_train, y_train, x_test"),
        ({"x_train": np.zeros((ROWS, 784), np.uint8)}, r"x_train and y_train must be uint8 .* got uint8 \(600, 784\)"),
        ({"x_test": np.zeros((TESTS, 28, 28))}, r"x_test and y_test must be uint8 .* got float64"),
        ({"y_train": np.zeros(ROWS - 1, np.uint8)}, r"and uint8 \(599,\)"),
        ({"y_test": np.zeros((TESTS, 1), np.uint8)}, r"and uint8 \(200, 1\)"),
        ({"y_train": np.full(ROWS, 10, np.uint8)}, r"y_train must hold labels 0 to 9, got \[10\]"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, np.uint8)}, r"labels 0 to 9, got \[\]"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "wrong.npz", **{name: a for name, a in (arrays() | changed).items() if a is not None})
    with pytest.raises(ValueError, match=message) as caught:
        mnist.load(tmp_path / "wrong.npz")
    assert mnist.SOURCES in str(caught.value)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "digits.npz").write_text("no archive")
    with pytest.raises(ValueError, match="must be an npz archive"):
        mnist.load(tmp_path / "digits.npz")


def test_validation_holds_out_the_last_training_images(digits: mnist.Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="more than 10000 training images to hold some out, got 600"):
        digits.validation()
    monkeypatch.setattr(mnist, "VALIDATION", 150)
    held = digits.validation()
    assert torch.equal(torch.cat([held.images, held.test_images]), digits.images)
    assert torch.equal(torch.cat([held.labels, held.test_labels]), digits.labels)
    assert len(held.test_labels) == 150


def test_contenders_are_the_published_networks_from_the_same_weights() -> None:
    networks = [mnist.build(contender, mnist.HIDDEN, seed=3) for contender in mnist.CONTENDERS]
    parameters = [list(network.parameters()) for network in networks]
    assert [tuple(p.shape) for p in parameters[0][::2]] == [(1024, 784), (1024, 1024), (1024, 1024), (10, 1024)]
    for others in parameters[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters[0], others, strict=True))
    rates = [[m.keep_prob for m in network if isinstance(m, torchdrop.Dropout)] for network in networks]
    assert rates == [[], [0.8, 0.5, 0.5, 0.5], [0.8, 0.5, 0.5, 0.5]]
    after = [type(network[i + 1]) for network in networks[1:] for i, m in enumerate(network) if hasattr(m, "keep_prob")]
    assert after == [nn.Linear] * 8
    assert [c.max_norm is None for c in mnist.CONTENDERS] == [True, True, False]
    assert [c.published for c in mnist.CONTENDERS] == [1.60, 1.25, 1.06]


def test_training_is_gradient_descent_with_momentum_at_a_falling_rate(digits: mnist.Digits) -> None:
    network, plain = (mnist.build(PLAIN, HIDDEN, seed=1) for _ in range(2))
    moments = []
    order, rows = torch.Generator().manual_seed(4), [128, 128, 128, 128, 88]
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    batches = [batch for _ in range(2) for batch in torch.randperm(ROWS, generator=order).split(rows)]
    seen = 0
    for batch, moment in zip(batches, mnist.train(network, PLAIN, digits, by_epochs(2.0), seed=4), strict=True):
        moments.append(moment)
        with torch.autocast("cpu", torch.bfloat16):
            logits = plain(digits.images[batch])
        loss = F.cross_entropy(logits.float(), digits.labels[batch])
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        rate = PLAIN.learning_rate * (1 - seen / (2 * ROWS))
        for p, v, g in zip(plain.parameters(), velocity, gradients, strict=True):
            p.data -= rate * v.mul_(PLAIN.momentum).add_(g)
        seen += len(batch)
        for a, b in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        plain.load_state_dict(network.state_dict())
    assert [moment.epoch for moment in moments] == pytest.approx(
        [n // 5 + sum(rows[: n % 5]) / ROWS for n in range(1, 11)]
    )
    assert [moment.share for moment in moments] == [moment.epoch / 2 for moment in moments]


def test_time_is_that_of_training_alone_and_ends_it(digits: mnist.Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(mnist.time, "perf_counter", lambda: now[0])
    network = mnist.build(DROPOUT, HIDDEN, seed=1)

    def second(*_: object) -> None:
        now[0] += 1.0

    network.register_forward_hook(second)
    seen = []
    for moment in mnist.train(network, DROPOUT, digits, lambda seconds, _: seconds / 7.5, seed=1):
        seen.append(moment)
        now[0] += 100.0
    assert [moment.seconds for moment in seen] == list(range(1, 9))
    assert [moment.share for moment in seen] == [min(1.0, n / 7.5) for n in range(1, 9)]
    assert seen[-1].epoch == pytest.approx(1 + 3 * 128 / ROWS)


def norms(network: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().norm(dim=1) for layer in network.modules() if isinstance(layer, nn.Linear)]


def test_norms_are_bounded_after_every_step_where_they_are_to_be(digits: mnist.Digits) -> None:
    for contender, bound in ((CONSTRAINED, 1.2), (DROPOUT, None)):
        own = mnist.Contender(**{**vars(contender), "max_norm": bound})
        network = mnist.build(own, HIDDEN, seed=1)
        keep = [0.8] + [0.5] * (len(norms(network)) - 1)
        largest = [
            [n.max().item() / k for n, k in zip(norms(network), keep, strict=True)]
            for _ in mnist.train(network, own, digits, by_epochs(1.0), 1)
        ]
        if bound is None:
            assert min(map(max, largest)) > 2 * 1.2
        else:
            assert max(map(max, largest)) <= 1.2 * (1 + 1e-5)
            assert min(map(max, largest)) > 1.19


def test_training_draws_masks_in_bfloat16_and_evaluation_neither(digits: mnist.Digits) -> None:
    network = mnist.build(DROPOUT, HIDDEN, seed=1)
    modes = []
    network.register_forward_hook(lambda module, _, out: modes.append((module.training, out.dtype)))
    for _ in mnist.train(network, DROPOUT, digits, by_epochs(0.5), 1):
        wrong = mnist.mistakes(network, digits.test_images, digits.test_labels)
    assert modes == [(True, torch.bfloat16), (False, torch.float32)] * 3
    with torch.no_grad():
        assert torch.equal(wrong, network.eval()(digits.test_images).argmax(1) != digits.test_labels)


def test_the_last_evaluation_is_reported_and_not_the_best(
    digits: mnist.Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "EVALUATIONS", 20)
    errors = iter([90, *range(17, 1, -1), 20, 30, 40])
    monkeypatch.setattr(mnist, "mistakes", lambda *_: torch.arange(TESTS) < next(errors))

    def moments() -> Iterator[mnist.Moment]:
        for n in range(1, 101):
            yield mnist.Moment(2.0 * n, 0.1 * n, n / 100)

    result, wrong = mnist.follow(nn.Identity(), DROPOUT, digits, moments())
    assert [point[1] for point in result["curve"]] == pytest.approx([0.5 * n for n in range(1, 21)])
    assert [point[0] for point in result["curve"]] == pytest.approx([10 * n for n in range(1, 21)])
    assert (result["error"], result["late_error"], result["late_evaluations"]) == (20.0, 17.5, 2)
    assert result["standard_error"] == pytest.approx(100 * (0.2 * 0.8 / TESTS) ** 0.5)
    assert (result["epochs"], result["training_seconds"]) == (10.0, 200.0)
    assert wrong.sum() == 40


def test_differences_are_paired() -> None:
    first = torch.tensor([True, True, False, False, True])
    second = torch.tensor([True, False, False, False, False])
    found = mnist.difference(first, second)
    assert found["difference"] == pytest.approx(40.0)
    assert found["standard_error"] == pytest.approx(100 * np.std([0, 1, 0, 0, 1], ddof=1) / 5**0.5)
    assert mnist.difference(first, first) == {"difference": 0.0, "standard_error": 0.0}


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [([1.5, 1.2, 1.1], "ok"), ([1.5, 1.1, 1.2], "short"), ([1.2, 1.2, 1.1], "short"), ([1.1, 1.2, 1.0], "short")],
)
def test_the_order_is_judged_strictly(errors: list[float], wanted: str) -> None:
    networks = [{"name": "n", "published": 1.0, "error": error} for error in errors]
    assert mnist.order(networks, judged=True)["verdict"] == wanted
    assert mnist.order(networks, judged=False)["verdict"] == "not judged"


def test_averaging_takes_disjoint_groups_of_passes(digits: mnist.Digits) -> None:
    network = mnist.build(DROPOUT, (64, 64, 64), seed=1)
    for _ in mnist.train(network, DROPOUT, digits, by_epochs(3.0), 1):
        pass
    found = mnist.average(network, digits, passes=16, most=8, seed=5)
    rows = {row["k"]: row for row in found["averaged"]}
    assert (found["passes"], list(rows)) == (16, [1, 2, 3, 5, 7])
    assert [row["groups"] for row in rows.values()] == [16, 8, 4, 2, 2]
    samples = [
        torchdrop.mc_predict(network, digits.test_images, 8, task="classification", seed=s, keep_samples=True).samples
        for s in (5, 6)
    ]
    for k, row in rows.items():
        errors = [
            100 * (part.mean(0).argmax(1) != digits.test_labels).double().mean().item()
            for taken in samples
            if taken is not None
            for part in taken.split(k)
            if len(part) == k
        ]
        assert row["error"] == pytest.approx(np.mean(errors))
        assert row["standard_error"] == pytest.approx(np.std(errors, ddof=1) / len(errors) ** 0.5)
    wrong = mnist.mistakes(network, digits.test_images, digits.test_labels)
    assert found["weight_scaling"] == pytest.approx(100 * wrong.double().mean().item())
    assert rows[1]["error"] > found["weight_scaling"]


def report() -> dict[str, Any]:
    """A result whose numbers are made up."""
    networks = [
        {
            "name": name, "published": published, "error": error, "standard_error": 0.12, "late_error": error + 0.004,
            "late_evaluations": 5, "epochs": 123.456, "training_seconds": 600.2, "evaluation_seconds": 11.7,
            "learning_rate": 0.05, "momentum": 0.95, "max_norm": bound,
            "curve": [[300.0, 60.0, 2.0], [600.2, 123.456, error]],
        }
        for name, published, error, bound in (("a", 1.6, 1.51, None), ("b", 1.25, 1.22, None), ("c", 1.06, 1.3, 2.0))
    ]  # fmt: skip
    averaged = [
        {"k": 1, "groups": 1000, "error": 2.5, "standard_error": 0.01},
        {"k": 100, "groups": 10, "error": 1.2, "standard_error": 0.02},
    ]
    return {
        "machine": {
            "cpu": "A processor", "cores": 2, "threads": 2, "os": "an OS", "python": "3.11", "torch": "2.13",
            "torchdrop": "0.1.0", "commit": "0123456789abcdef", "dirty": False, "date": "2020-01-02",
        },
        "settings": {
            "budget": 30.0, "epochs": None, "seed": 0, "quick": False, "validation": False, "batch": 128,
            "precision": "bfloat16",
            "training_images": 60000, "test_images": 10000,
        },
        "networks": networks,
        "differences": [{"difference": 0.29, "standard_error": 0.1}, {"difference": -0.08, "standard_error": 0.09}],
        "monte_carlo": {"passes": 1000, "seconds": 222.2, "weight_scaling": 1.22, "averaged": averaged},
        "summary": [mnist.order(networks, judged=True)],
    }  # fmt: skip


def test_a_report_as_markdown() -> None:
    rendered = mnist.render(report())
    assert "A processor, 2 cores, 2 threads" in rendered
    assert "torchdrop 0.1.0 at 0123456789" in rendered
    assert (
        "| error in percent: a > b > c | this order; published 1.60, 1.25, 1.06 | 1.51, 1.22, 1.30 | short |"
        in rendered
    )
    assert "30 min of training in all, batches of 128, forward passes in bfloat16, seed 0, 60000 training" in rendered
    assert "images; errors, all in float32, on 10000 test images" in rendered
    assert "| a | 1.60 | 1.51 ± 0.12 | 1.514 (5 evaluations) | 123.5 | 600 | 12 | 0.05 | 0.95 | - |" in rendered
    assert "| c | 1.06 | 1.30 ± 0.12 | 1.304 (5 evaluations) | 123.5 | 600 | 12 | 0.05 | 0.95 | 2 |" in rendered
    assert "| a - b | +0.29 ± 0.10 |\n| b - c | -0.08 ± 0.09 |" in rendered
    assert "| mean over 100 | 10 | 1.200 ± 0.020 |\n| weight scaling | - | 1.220 |" in rendered
    assert "mean nothing" not in rendered
    other = report()
    other["settings"] |= {"epochs": 8.0, "validation": True, "quick": True}
    assert "8 epochs each" in mnist.render(other)
    assert "on 10000 held-out training images" in mnist.render(other)
    assert "its figures mean nothing" in mnist.render(other)


def test_a_report_as_a_picture(tmp_path: Path) -> None:
    (tmp_path / "mnist.json").write_text(json.dumps(report()))
    mnist.main(["--render", str(tmp_path / "mnist.json"), "--plot", str(tmp_path / "mnist.png")])
    assert (tmp_path / "mnist.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data FILE is needed. MNIST can be had"),
        (["--data", "x", "--budget", "0"], "--budget must be positive and finite, got 0"),
        (["--data", "x", "--budget", "nan"], "--budget must be positive and finite, got nan"),
        (["--data", "x", "--epochs", "-1"], "--epochs must be positive and finite, got -1"),
        (["--data", "x", "--passes", "199"], "--passes must be at least 200, for two groups of the largest, got 199"),
        (["--data", "nowhere.npz"], "nowhere.npz is none. MNIST can be had"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mnist.main(arguments)
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_program_writes_what_it_prints(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, threads = tmp_path / "out" / "mnist.json", torch.get_num_threads()
    try:
        mnist.main(["--data", str(file), "--quick", "--threads", "1", "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert [result["name"] for result in written["networks"]] == [c.name for c in mnist.CONTENDERS]
    for result in written["networks"]:
        assert result["epochs"] == 2.0
        assert all(a[0] <= b[0] and a[1] < b[1] for a, b in pairwise(result["curve"]))
        assert result["error"] == result["curve"][-1][2] < 85
    first, second, third = (result["error"] for result in written["networks"])
    assert [d["difference"] for d in written["differences"]] == pytest.approx([first - second, second - third])
    assert written["monte_carlo"]["weight_scaling"] == pytest.approx(second)
    assert written["summary"][0]["verdict"] == "not judged"
    mnist.main(["--render", str(output)])
    assert capsys.readouterr().out.strip() in printed

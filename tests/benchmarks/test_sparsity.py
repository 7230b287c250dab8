"""The sparsity benchmark: its split, its pairs of networks, its training, how it is judged, and its program."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import sparsity
import torch
from torch import nn

from torchdrop.layers.variational.sparse import SparseVariationalLinear


def test_validation_images_are_training_images_and_the_split_is_one() -> None:
    digits, validation = sparsity.load(False), sparsity.load(True)
    assert (len(digits.labels), len(digits.test_labels)) == (1797 - 360, 360)
    assert (len(validation.labels), len(validation.test_labels)) == (1797 - 720, 360)
    assert torch.equal(torch.cat([validation.images, validation.test_images]), digits.images)
    assert torch.equal(torch.cat([validation.labels, validation.test_labels]), digits.labels)
    assert (digits.images.min(), digits.images.max(), digits.images.dtype) == (0, 1, torch.float32)
    assert torch.cat([digits.labels, digits.test_labels]).bincount().min() > 170


def test_a_missing_package_is_answered_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit):
        sparsity.main(["--quick"])
    assert "this needs sklearn.datasets: pip install 'torchdrop[demo]'" in capsys.readouterr().err.replace("\n", " ")


def test_both_networks_start_alike() -> None:
    plain, sparse = sparsity.plain_network(3), sparsity.sparse_network(3)
    assert [type(layer) for layer in sparse[::2]] == [SparseVariationalLinear] * 3
    assert [tuple(layer.weight.shape) for layer in plain[::2]] == [(300, 64), (100, 300), (10, 100)]
    for ours, theirs in zip(sparse[::2], plain[::2], strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    assert not torch.equal(plain[0].weight, sparsity.plain_network(4)[0].weight)


def short(digits: sparsity.Digits) -> sparsity.Digits:
    return sparsity.Digits(digits.images[:256], digits.labels[:256], digits.test_images, digits.test_labels)


def test_training_learns_and_the_divergence_prunes() -> None:
    torch.set_num_threads(1)
    digits = short(sparsity.load(True))
    plain, sparse, heavy = sparsity.plain_network(0), sparsity.sparse_network(0), sparsity.sparse_network(0)
    before = sparsity.accuracy(plain, digits)
    assert sparsity.train(plain, digits, 5, 0, 0.0) > 0
    sparsity.train(sparse, digits, 5, 0, 0.0)
    sparsity.train(heavy, digits, 5, 0, 50.0)
    assert before < 30
    assert min(sparsity.accuracy(plain, digits), sparsity.accuracy(sparse, digits)) > 60
    assert sparsity.sparsity(heavy).zeros > sparsity.sparsity(sparse).zeros
    again = sparsity.plain_network(0)
    sparsity.train(again, digits, 5, 0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


def test_magnitude_pruning_takes_the_smallest() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.1, -5.0, 0.3], [-0.2, 4.0, 6.0]]))
    before = network[2].weight.clone()
    sparsity.prune_by_magnitude(network, [3, 0])
    assert torch.equal(network[0].weight, torch.tensor([[0.0, -5.0, 0.0], [0.0, 4.0, 6.0]]))
    assert torch.equal(network[2].weight, before)


def runs(pruned: list[float], lost: list[float]) -> list[dict[str, Any]]:
    """Results whose numbers are made up."""
    return [
        {
            "seed": seed, "without": 98.0, "with": 98.0 - by, "by_magnitude": 60.0, "pruned": share,
            "plain_seconds": 1.0, "sparse_seconds": 4.0,
            "layers": [{"weights": n, "zeros": int(n * share / 100)} for n in (19200, 30000, 1000)],
        }
        for seed, (share, by) in enumerate(zip(pruned, lost, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pruned", "lost", "wanted"),
    [
        ([92.0, 94.0], [0.5, 1.5], ["ok", "ok"]),
        ([88.0, 91.0], [0.5, 1.5], ["short", "ok"]),
        ([92.0, 94.0], [0.5, 1.75], ["ok", "short"]),
        ([90.0, 90.0], [-1.0, -2.0], ["ok", "ok"]),
    ],
)
def test_means_over_seeds_are_judged(pruned: list[float], lost: list[float], wanted: list[str]) -> None:
    assert [row["verdict"] for row in sparsity.verdicts(runs(pruned, lost), True)] == wanted
    assert {row["verdict"] for row in sparsity.verdicts(runs(pruned, lost), False)} == {"not judged"}


def test_standard_errors_are_over_seeds() -> None:
    assert sparsity.mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    assert math.isnan(sparsity.mean_and_error([1.0])[1])


def report() -> dict[str, Any]:
    found = runs([92.0, 94.0], [0.5, 1.0])
    return {
        "machine": {
            "cpu": "A processor", "cores": 2, "threads": 2, "os": "an OS", "python": "3.11", "torch": "2.13",
            "torchdrop": "0.1.0", "commit": "0123456789abcdef", "dirty": False, "date": "2020-01-02",
        },
        "settings": {
            "epochs": 100, "seeds": [0, 1], "quick": False, "validation": False, "batch": 128, "factor": 0.05,
            "learning_rate": 0.005, "warm_up": 0.5, "training_images": 1437, "test_images": 360,
        },
        "runs": found,
        "summary": sparsity.verdicts(found, True),
    }  # fmt: skip


def test_a_report_as_markdown() -> None:
    rendered = sparsity.render(report())
    assert "A processor, 2 cores, 2 threads" in rendered
    assert "| weights pruned, mean over seeds | at least 90 % | 93.0 % (least of a seed 92.0 %) | ok |" in rendered
    assert "| at most 1 percentage points | +0.75 ± 0.25 | ok |" in rendered
    assert (
        "100 epochs each in batches of 128, 2 seeds, learning rate 0.005, 0.05 times the divergence; 1437" in rendered
    )
    assert "| without | 98.00 ± 0.00 | 98.0, 98.0 | 1.0 |" in rendered
    assert "| with sparse variational dropout, pruned | 97.25 ± 0.25 | 97.5, 97.0 | 4.0 |" in rendered
    assert "| 64 x 300 | 19,200 | 1,344 | 93.0 % |" in rendered
    assert "| all | 50,200 | 3,514 | 93.0 % |" in rendered
    assert "mean nothing" not in rendered
    other = report()
    other["settings"] |= {"validation": True, "quick": True}
    assert "360 held-out training images" in sparsity.render(other)
    assert "its figures mean nothing" in sparsity.render(other)


def test_program_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "sparsity.json"
    sparsity.main(["--quick", "--epochs", "1", "--seeds", "5", "--threads", "1", "--output", str(output)])
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert [run["seed"] for run in written["runs"]] == [5]
    assert {row["verdict"] for row in written["summary"]} == {"not judged"}
    sparsity.main(["--render", str(output)])
    assert capsys.readouterr().out.strip() in printed
    with pytest.raises(SystemExit):
        sparsity.main(["--epochs", "0"])
    assert "--epochs must be at least 1, got 0" in capsys.readouterr().err

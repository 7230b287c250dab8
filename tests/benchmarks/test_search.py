"""The benchmark of the keep-probability search: its ordinary way, its comparisons, and what it makes of a report."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")


import bench_search

from torchdrop.tune import cross_validate

pytestmark = pytest.mark.usefixtures("one_thread")


def part(rows: int = 100) -> tuple[Tensor, Tensor]:
    x, y = bench_search.load()
    return x[:rows], y[:rows]


def test_the_data_are_all_the_digits_and_the_settings_contain_the_shared_one() -> None:
    x, y = bench_search.load()
    assert x.shape == (1797, 64)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert torch.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.equal(bench_search.load()[0], x)
    tried = bench_search.settings(20)
    assert len(tried) == 20
    assert tried[0] == bench_search.SHARED
    assert tried[:3] == bench_search.settings(3)


@pytest.mark.slow
def test_both_ways_learn_with_keep_prob_1_and_nothing_with_0() -> None:
    x, y = part()
    tried = [{"*": 0.0}, {"*": 1.0}]
    theirs = bench_search.one_after_another(x, y, tried, epochs=20, batch=16, after_fold=lambda _: None)
    ours = cross_validate(bench_search.network, x, y, tried, epochs=20, batch_size=16).scores
    assert theirs.shape == ours.shape == (2, 5)
    assert float(theirs[0].max()) < 0.4
    assert float(theirs[1].min()) > 0.4
    assert abs(float(theirs[1].mean() - ours[1].mean())) < 0.1


def test_noise_is_paired() -> None:
    ours = torch.tensor([[0.5, 0.7], [0.9, 0.9]], dtype=torch.float64)
    found = bench_search.noise(ours, ours - torch.tensor([[0.1, 0.2], [0.0, 0.1]], dtype=torch.float64))
    assert found["difference"] == pytest.approx(0.1)
    assert found["standard_error"] == pytest.approx(math.sqrt(0.02 / 3) / 2)
    assert found["largest"] == pytest.approx(0.2)
    assert found["largest_of_means"] == pytest.approx(0.15)


def test_held_out_rows_are_compared_with_the_shared_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_search, "HELD_OUT", 40)
    x, y = part(140)
    found = bench_search.held_out(x, y, {"best": {"*": 1.0}, "worst": {"*": 0.0}}, seeds=3, epochs=10)
    assert list(found) == ["best", "worst", "shared 0.5"]
    assert [entry["reached"] for entry in found.values()] == [True, False, True]
    assert found["shared 0.5"]["difference"] == 0.0
    assert found["best"]["setting"] == {"*": 1.0}
    for entry in found.values():
        assert len(entry["by_seed"]) == 3
        expected = entry["accuracy"] - found["shared 0.5"]["accuracy"]
        assert entry["difference"] == pytest.approx(expected)
    assert 0 < found["worst"]["standard_error"] < 0.2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("search") / "out" / "search.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_search, "load", lambda load=bench_search.load: tuple(one[:520] for one in load()))
        try:
            bench_search.main(["--quick", "--threads", "1", "--output", str(output)])
        finally:
            torch.set_num_threads(threads)
    assert str(output.parent) not in output.read_text()
    return json.loads(output.read_text())


@pytest.mark.slow
def test_a_quick_run_judges_nothing_and_renders(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {row["verdict"] for row in report["summary"]} == {"-"}
    file = tmp_path / "search.json"
    file.write_text(json.dumps(report))
    bench_search.main(["--render", str(file)])
    rendered = capsys.readouterr().out
    assert "| case | required | measured | verdict |" in rendered
    assert rendered.count("###") == 4
    assert [entry["batch"] for entry in report["batches"]] == [64, 128]


def judged(report: Any, **changes: Any) -> dict[str, str]:
    changed = copy.deepcopy(report) | {"quick": False}
    for path, value in changes.items():
        *place, last = path.split("__")
        entry = changed
        for name in place:
            entry = entry[name.replace("_", " ") if name.startswith("one") else name]
        entry[last] = value
    rows = bench_search.verdicts(changed)
    names = ("times", "scores", "best", "one")
    return dict(zip(names, (row["verdict"] for row in rows), strict=True))


@pytest.mark.slow
def test_verdicts_follow_their_rules(report: Any) -> None:
    right = {
        "search__ratio": 5.0, "search__difference": 0.003, "search__standard_error": 0.001,
        "held_out__best__reached": True, "held_out__one_standard_error__reached": True,
    }  # fmt: skip
    assert set(judged(report, **right).values()) == {"ok"}
    wrong = {
        "times": {"search__ratio": 4.99},
        "scores": {"search__difference": -0.0031},
        "best": {"held_out__best__reached": False},
        "one": {"held_out__one_standard_error__reached": False},
    }
    for name, change in wrong.items():
        verdict = judged(report, **(right | change))
        assert verdict.pop(name) == "short"
        assert set(verdict.values()) == {"ok"}

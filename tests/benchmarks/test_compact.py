"""The benchmark of compact dropout: its checks, and what is made of a report."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import compact as bench
import pytest
import torch

import torchdrop
from torchdrop.layers.compact import sequential as family

MLP, BLOCK = bench.cases(quick=True)


@pytest.mark.parametrize("case", [MLP, BLOCK])
def test_contenders_start_from_the_same_parameters_of_their_own(case: bench.Case) -> None:
    models = bench.contenders(case, 0.5)
    first = list(models[bench.NONE].parameters())
    for name, model in models.items():
        assert bench.fault(case, name, model, 0.5) is None
        for one, other in zip(first, model.parameters(), strict=True):
            assert torch.equal(one, other)
            assert (one is other) == (name == bench.NONE)


@pytest.mark.parametrize("case", [MLP, BLOCK])
def test_wrong_contenders_are_told(case: bench.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    models = bench.contenders(case, 0.5)
    assert "layers of dropout" in (bench.fault(case, bench.MASKED, models[bench.NONE], 0.5) or "")
    assert "values other than" in (bench.fault(case, bench.MASKED, models[bench.MASKED], 0.8) or "")
    assert "values other than" in (bench.compact_fault(case, models[bench.COMPACT], 0.8) or "")
    independent = bench.with_dropout(case.network(), torchdrop.Dropout, 0.5)
    assert bench.compact_fault(case, independent, 0.5) == "another output than under masks"
    plain = family.cut

    def half(*args: Any) -> Any:
        return (plain(*args) + plain(*args).detach()) / 2

    monkeypatch.setattr(family, "cut", half)
    assert bench.compact_fault(case, models[bench.COMPACT], 0.5) == "another gradient of 0.weight than under masks"


def test_a_step_trains_and_clears_gradients() -> None:
    for case in (MLP, BLOCK):
        model = bench.contenders(case, 0.5)[bench.COMPACT]
        before = copy.deepcopy(model.state_dict())
        step = bench.step(case, model)
        step()
        assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
        model.eval()
        step()
        once = model[0].bias.grad.clone()
        model.load_state_dict(before)
        step()
        step()
        assert once.norm() > 0.5 * model[0].bias.grad.norm()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("compact") / "out" / "compact.json"
    threads = torch.get_num_threads()
    try:
        bench.main(["--quick", "--threads", "1", "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    assert str(output.parent) not in output.read_text()
    return json.loads(output.read_text())


@pytest.mark.slow
def test_a_quick_run_judges_nothing_and_renders(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [line["verdict"] for line in report["summary"]] == ["-"]
    assert [(cell["case"], cell["keep_prob"]) for cell in report["steps"]] == [
        (case.name, k) for case in (MLP, BLOCK) for k in (0.5, 0.8)
    ]
    assert not any("fault" in entry for cell in report["steps"] for entry in cell["contenders"].values())
    file = tmp_path / "compact.json"
    file.write_text(json.dumps(report))
    bench.main(["--render", str(file)])
    rendered = capsys.readouterr().out
    assert "| case | required | measured | verdict |" in rendered
    assert rendered.count("###") == 2
    assert "no dropout / compact" in rendered


@pytest.mark.slow
def test_the_verdict_is_about_the_median_of_the_first_cell(report: Any) -> None:
    changed = copy.deepcopy(report) | {"quick": False}
    entry = changed["steps"][0]["contenders"][bench.NONE]
    for median, expected in ((1.7, "ok"), (1.69, "short")):
        entry["times_compact"] = [1.0, median, 3.0]
        assert bench.verdict(changed)["verdict"] == expected
    del entry["times_compact"]
    assert bench.verdict(changed)["verdict"] == "short"
    assert bench.verdict(changed)["measured"] == "wrong"

"""The language benchmark: its text, its networks and trainings, its comparison, and its program."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import language
import pytest
import torch
from torch import nn

import torchdrop

NONE, LOCKED, WEIGHTS, WORDS, ZONEOUT, ALL = language.CONTENDERS


@pytest.fixture
def text() -> language.Corpus:
    """A text with a pattern to learn."""
    generator = torch.Generator().manual_seed(0)
    words = torch.arange(2000) % 7 + 7 * torch.randint(0, 2, (2000,), generator=generator)
    return language.Corpus(words[:1200], words[1200:1600], words[1600:], 14)


def test_words() -> None:
    text = "A class_1 has:\n=====\n  f(x) -> 10.5 'É'"
    assert language.split_words(text) == [
        "a", "class_1", "has", ":", "=", "f", "(", "x", ")", "-", ">", "10", ".", "5", "'", "'",
    ]  # fmt: skip


def test_paragraphs_are_kept_once() -> None:
    kept = language.paragraphs({"b": "one\ntwo\n\nthree", "a": "one two\n\n\n  four\n", "c": "three"})
    assert kept == {"a": ["one two", "  four\n"], "b": ["three"], "c": []}


def test_topics_go_whole_to_one_part_and_parts_have_their_shares() -> None:
    topics = {f"topic{n:02}": " ".join(f"w{n}" for _ in range(50)) for n in range(20)}
    found = language.corpus(topics)
    sizes = [len(part) for part in found[:3]]
    assert sum(sizes) == 20 * 51
    assert [size / sum(sizes) for size in sizes] == pytest.approx([0.6, 0.2, 0.2], abs=0.05)
    assert found.training.max() + 1 == found.vocabulary
    ends = found.training[50]
    assert set(found.validation.unique().tolist()) == {0, int(ends)}  # topics have no word in common but the end


def test_corpus_of_the_real_text_leaks_no_paragraph() -> None:
    from pydoc_data.topics import topics

    kept = [paragraph for part in language.paragraphs(topics).values() for paragraph in part]
    assert len({" ".join(paragraph.split()) for paragraph in kept}) == len(kept) > 1000
    found = language.corpus(topics)
    assert 30_000 < len(found.training) < 100_000
    assert (found.training == 0).double().mean() < 0.1


def test_networks_have_the_same_initial_weights_and_their_own_dropout() -> None:
    networks = [language.LanguageModel(contender, 14, 8, 3) for contender in language.CONTENDERS]
    parameters = [list(network.parameters()) for network in networks]
    for others in parameters[1:]:
        assert sorted(p.double().sum().item() for p in others) == sorted(p.double().sum().item() for p in parameters[0])
    assert type(networks[0].rnn) is nn.LSTM
    assert nn.utils.parametrize.is_parametrized(networks[2].rnn)
    assert isinstance(networks[3].embedding, torchdrop.EmbeddingDropout)
    assert isinstance(networks[4].rnn, torchdrop.ZoneoutLSTM)
    words = torch.arange(12).reshape(6, 2)
    expected = networks[0](words)[0]
    assert torch.equal(networks[0](words)[0], expected)
    for network in networks[1:]:
        assert not torch.allclose(network(words)[0], expected)
        assert torch.equal(network.eval()(words)[0], network(words)[0])
    for network in networks[1:4]:
        torch.testing.assert_close(network(words)[0], expected)


def test_training_learns_and_losses_are_those_of_single_words(
    text: language.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "LEARNING_RATE", 0.05)
    network = language.LanguageModel(WEIGHTS, text.vocabulary, 16, 0)
    before = language.losses(network, text.validation).mean()
    assert before == pytest.approx(math.log(14), abs=0.1)
    assert len(list(language.train(network, text.training, 8, 0))) == 8
    nats = language.losses(network, text.validation)
    assert nats.mean() < before - 0.5
    assert len(nats) == len(text.validation) - language.ROWS
    rows = text.validation.reshape(language.ROWS, -1)
    with torch.no_grad():
        logits, _ = network(rows[3][:, None])
    expected = nn.functional.cross_entropy(logits[:-1, 0], rows[3][1:], reduction="none").double()
    torch.testing.assert_close(nats.reshape(language.ROWS, -1)[3], expected, rtol=1e-4, atol=1e-5)


def test_the_epoch_that_is_best_on_validation_is_kept(text: language.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "LEARNING_RATE", 0.3)  # it does not converge
    found = language.follow(NONE, text, 8, 5, 0, test=False)
    assert found["best_epoch"] == found["validation"].index(min(found["validation"])) + 1
    assert found["nats"] == pytest.approx(min(found["validation"]))
    assert found["chunks"] == pytest.approx(found["chunks"])
    again = language.follow(NONE, text, 8, 5, 0, test=True)
    assert again["validation"] == found["validation"]
    assert again["nats"] != found["nats"]


def test_comparison_is_paired_over_chunks() -> None:
    first = [{"nats": 2.0, "chunks": [1.0, 3.0, 2.0]}, {"nats": 3.0, "chunks": [2.0, 4.0, 3.0]}]
    other = [{"nats": 1.5, "chunks": [0.5, 2.5, 1.5]}, {"nats": 2.1, "chunks": [1.0, 3.2, 2.1]}]
    found = language.compared(other, first)
    assert found["difference"] == pytest.approx(-0.7)
    apart = torch.tensor([-0.75, -0.65, -0.7])
    assert found["standard_error"] == pytest.approx((apart.std() / math.sqrt(3)).item(), rel=1e-4)


def report(difference: float) -> dict[str, Any]:
    runs = [{"seed": 0, "validation": [4.0, 3.5, 3.6], "best_epoch": 2, "training_at_the_end": 2.5, "nats": 3.5,
             "chunks": [], "training_seconds": 9.6}]  # fmt: skip
    contenders = [
        {"name": "none", "nats": 3.5, "against_none": {"difference": 0.0, "standard_error": 0.0}, "runs": runs},
        {"name": "locked", "nats": 3.3, "against_none": {"difference": difference, "standard_error": 0.02},
         "runs": [{**runs[0], "nats": 3.3}]},
    ]  # fmt: skip
    for n, contender in enumerate(contenders):
        contender |= dict.fromkeys(language.RATES, 0.0) | {"locked": 0.4 * n}
    return {
        "machine": {
            "date": "2026-01-02", "device": "cpu", "cpu": "A processor", "cores": 2, "load_before": 0.1,
            "load_after": 1.9, "threads": 2, "os": "Some Linux", "python": "3.11", "torch": "2.13.0",
            "torch_cpu_capability": "AVX2", "torchdrop": "0.1.0", "native_vectors": "AVX2", "native_openmp": True,
            "commit": "0123456789abcdef", "dirty": False,
        },
        "settings": {"epochs": 3, "seeds": 1, "seed": 0, "quick": False, "validation": False, "units": 128},
        "text": {"characters": 1000, "vocabulary": 50, "training": 600, "validation": 200, "test": 200},
        "contenders": contenders,
        "summary": [language.verdict(contenders, judged=True)],
    }  # fmt: skip


def test_a_report_as_markdown() -> None:
    rendered = language.render(report(-0.2))
    assert "A processor, 2 cores, 2 threads" in rendered
    assert "torchdrop 0.1.0 at 0123456789" in rendered
    assert "| lower by more than two standard errors | locked -0.200 ± 0.020 | ok |" in rendered
    assert "600 words of training, 200 of validation and 200 of test text, of 1000 characters" in rendered
    assert "| none | - | 33.1 | 3.500 | - | - | 2 | 2.500 | 3.600 | 10 |" in rendered
    assert "| locked | locked 0.4 | 27.1 | 3.300 | -0.200 ± 0.020 | -0.200 | 2 |" in rendered
    assert "| short |" in language.render(report(-0.03))
    assert "mean nothing" not in rendered


@pytest.mark.parametrize("name", ["epochs", "seeds", "threads"])
def test_arguments_that_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        language.main([f"--{name}", "0"])
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err


def test_program_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, threads = tmp_path / "out" / "language.json", torch.get_num_threads()
    try:
        language.main(["--quick", "--seeds", "2", "--threads", "1", "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert [found["name"] for found in written["contenders"]] == [c.name for c in language.CONTENDERS]
    assert all(len(found["runs"]) == 2 for found in written["contenders"])
    assert written["summary"][0]["verdict"] == "not judged"
    assert "mean nothing" in printed
    language.main(["--render", str(output)])
    assert capsys.readouterr().out.strip() in printed

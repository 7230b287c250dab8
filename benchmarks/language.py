"""A small LSTM language model without dropout, with each of the variants for sequences, and with all of them.

python benchmarks/language.py [--epochs 10] [--seeds 3] [--threads 2] [--output FILE]
python benchmarks/language.py --render FILE

The text is the language reference that comes with Python (`pydoc_data.topics`): paragraphs that occur in several topics
are kept at their first place, topics are dealt whole to a training, a validation and a test part, and what is predicted
is the next word, number or sign, in lower case. The training part is small, about 50,000 words, so that a network
without dropout overfits: this is what the variants are for, and no statement about large texts.

All networks have the same initial weights for a seed, the same batches, optimizer and number of epochs: an embedding,
one LSTM layer and a linear decoder. Of each training the epoch that is best on the validation part is kept, so that the
network without dropout is stopped in time. The test part is evaluated once, with the network of that epoch.

    locked      LockedDropout of the LSTM's inputs and outputs
    weights     weight dropout of the LSTM's recurrent matrix and of the decoder's matrix
    words       dropout of words of the vocabulary
    zoneout     ZoneoutLSTM
    all         all of them at once, at rates of their own

No setting was chosen with the test part. In single trainings of 8 to 10 epochs the lowest validation nats were, without
dropout, 4.284 at the learning rate 0.01 (4.281 at 0.003, where 8 epochs are too few to overfit); with locked dropout
4.158 at 0.4; with weight dropout 4.284 at 0.4 of the recurrent matrix alone, 4.268 at 0.2 and 4.322 at 0.6 of both of
the LSTM's, 4.170 at 0.5 of the decoder's alone and 4.178 at 0.4 of the recurrent and the decoder's; with dropout of
words 4.245 at 0.15; with zoneout of h and c 4.207 at 0.2 and 0.2 and 4.233 at 0.1 and 0.5; with all of them, in the
order above, 4.172 at 0.3, 0.3 (of both of the LSTM's), 0.1, 0.1 and 0.1, 4.139 at 0.3, 0.3, 0.05, 0.05 and 0.05, and
4.136 at 0.2, 0.2, 0.05, 0.1 and 0.1. `--validation --seeds 1` repeats the trainings at the rates that were taken.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import command
import machine
import summary
import torch
import torch.nn.functional as F
from harness import markdown_table, settle_allocator
from torch import Tensor, nn

import torchdrop

SHARES = {"training": 0.6, "validation": 0.2, "test": 0.2}
RARE = 2
"""Words that the training part has less often are all one word."""

UNITS, STEPS, BATCH, LEARNING_RATE, CLIP = 128, 32, 16, 1e-2, 1.0
WEIGHTS = ("rnn.weight_hh_*", "decoder.weight")
"""What weight dropout is of."""

ROWS, CHUNK = 8, 50
"""Held-out text is read in so many rows, and its errors are those of chunks of so many neighboring words."""


@dataclass(frozen=True)
class Contender:
    """One way to train the network: the rates of its dropout."""

    name: str
    locked: float = 0.0
    weights: float = 0.0
    words: float = 0.0
    zoneout_hidden: float = 0.0
    zoneout_cell: float = 0.0


CONTENDERS = (
    Contender("none"),
    Contender("locked", locked=0.4),
    Contender("weights", weights=0.4),
    Contender("words", words=0.15),
    Contender("zoneout", zoneout_hidden=0.2, zoneout_cell=0.2),
    Contender("all", locked=0.2, weights=0.2, words=0.05, zoneout_hidden=0.1, zoneout_cell=0.1),
)


class Corpus(NamedTuple):
    """Words as numbers, int64; 0 stands for rare ones."""

    training: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


def split_words(text: str) -> list[str]:
    """Words, numbers and signs in lower case; a row of the same sign is one.

    >>> split_words("Values of x_1: ----- (42)")
    ['values', 'of', 'x_1', ':', '-', '(', '42', ')']
    """
    return [found[0] or found[1] for found in re.findall(r"([a-z_][a-z_\d]*|\d+)|([^\s\w])\2*", text.lower())]


def paragraphs(topics: dict[str, str]) -> dict[str, list[str]]:
    """The paragraphs of each topic that no topic before it has."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name in sorted(topics):
        kept[name] = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            plain = " ".join(paragraph.split())
            if plain and plain not in seen:
                kept[name].append(paragraph)
                seen.add(plain)
    return kept


def corpus(topics: dict[str, str]) -> Corpus:
    """The three parts. A topic goes to the part that is furthest from its share."""
    parts: dict[str, list[str]] = {name: [] for name in SHARES}
    for text in paragraphs(topics).values():
        name = min(SHARES, key=lambda part: len(parts[part]) / SHARES[part])
        parts[name] += [word for paragraph in text for word in [*split_words(paragraph), "\n"]]
    counts = Counter(parts["training"])
    known = {word: n for n, word in enumerate(sorted(w for w, count in counts.items() if count >= RARE), 1)}
    ids = [torch.tensor([known.get(word, 0) for word in parts[name]]) for name in SHARES]
    return Corpus(*ids, len(known) + 1)


class LanguageModel(nn.Module):
    """Embedding, LSTM, decoder. The initial weights depend on the seed alone."""

    def __init__(self, contender: Contender, vocabulary: int, units: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding: nn.Module = nn.Embedding(vocabulary, units)
        self.rnn: nn.Module = nn.LSTM(units, units)
        self.decoder = nn.Linear(units, vocabulary)
        locked = [torchdrop.LockedDropout(contender.locked) for _ in range(2)] if contender.locked else []
        self.locked = nn.ModuleList(locked)
        nn.init.normal_(self.embedding.weight, std=0.1)  # type: ignore[arg-type]
        if contender.zoneout_hidden or contender.zoneout_cell:
            rnn = torchdrop.ZoneoutLSTM(
                units, units, zoneout_hidden=contender.zoneout_hidden, zoneout_cell=contender.zoneout_cell
            )
            rnn.load_state_dict(self.rnn.state_dict())
            self.rnn = rnn
        if contender.weights:
            torchdrop.apply_weight_dropout(self, WEIGHTS, contender.weights)
        if contender.words:
            self.embedding = torchdrop.EmbeddingDropout.from_embedding(self.embedding, contender.words)  # type: ignore[arg-type]

    def forward(self, words: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits (T, B, vocabulary) and the state after words (T, B)."""
        x = self.embedding(words)
        x, state = self.rnn(self.locked[0](x) if self.locked else x, state)
        return self.decoder(self.locked[1](x) if self.locked else x), state


def columns(words: Tensor, count: int) -> Tensor:
    """(T, count): a text in so many rows, side by side; what is left over is left out."""
    return words[: len(words) // count * count].reshape(count, -1).t().contiguous()


def train(network: LanguageModel, words: Tensor, epochs: int, seed: int) -> Iterator[float]:
    """Adam on the cross-entropy with truncated backpropagation through time. After each epoch, its seconds."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    text = columns(words, BATCH)
    steps = epochs * math.ceil((len(text) - 1) / STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / steps)
    for _ in range(epochs):
        begin, state = time.perf_counter(), None
        network.train()
        for start in range(0, len(text) - 1, STEPS):
            part = text[start : start + STEPS + 1]
            logits, state = network(part[:-1], state)
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), part[1:].flatten()).backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            state = tuple(part.detach() for part in state)
        yield time.perf_counter() - begin


@torch.no_grad()
def losses(network: LanguageModel, words: Tensor) -> Tensor:
    """Nats for each word of held-out text but the first of a row, in the order of the text."""
    network.eval()
    text, state, found = columns(words, ROWS), None, []
    for part in text.split(200):
        logits, state = network(part, state)
        found.append(logits)
    nats = F.cross_entropy(torch.cat(found)[:-1].flatten(0, 1), text[1:].flatten(), reduction="none")
    return nats.reshape(-1, ROWS).t().flatten().double()


def chunks(nats: Tensor) -> Tensor:
    """The means of chunks of neighboring words."""
    return nats[: len(nats) // CHUNK * CHUNK].reshape(-1, CHUNK).mean(1)


def follow(contender: Contender, text: Corpus, units: int, epochs: int, seed: int, test: bool) -> dict[str, Any]:
    """One training: its validation curve, and the losses of the best epoch's network in chunks of the held-out part."""
    network = LanguageModel(contender, text.vocabulary, units, seed)
    curve, seconds, best, kept = [], 0.0, math.inf, None
    for took in train(network, text.training, epochs, seed):
        seconds += took
        curve.append(losses(network, text.validation).mean().item())
        if curve[-1] < best:
            best, kept = curve[-1], copy.deepcopy(network.state_dict())
    last = losses(network, text.training[: len(text.validation)]).mean().item()
    assert kept is not None, "the network has diverged"
    network.load_state_dict(kept)
    held_out = losses(network, text.test if test else text.validation)
    return {
        "seed": seed,
        "validation": curve,
        "best_epoch": curve.index(best) + 1,
        "training_at_the_end": last,
        "nats": held_out.mean().item(),
        "chunks": [round(nats, 6) for nats in chunks(held_out).tolist()],
        "training_seconds": seconds,
    }


def compared(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By how many nats the first are above the others, with the standard error over paired chunks, seeds averaged."""
    apart = torch.tensor([[a - b for a, b in zip(run["chunks"], other["chunks"], strict=True)]
                          for run, other in zip(runs, others, strict=True)]).mean(0)  # fmt: skip
    return {
        "difference": statistics.fmean(a["nats"] - b["nats"] for a, b in zip(runs, others, strict=True)),
        "standard_error": apart.std().item() / math.sqrt(len(apart)),
    }


def measure(text: Corpus, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All trainings, seed by seed, and each contender against the first."""
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in CONTENDERS}
    for seed in range(options.seed, options.seed + options.seeds):
        for contender in CONTENDERS:
            units = 16 if options.quick else UNITS
            run = follow(contender, text, units, options.epochs, seed, test=not options.validation)
            runs[contender.name].append(run)
            print(f"{contender.name}, seed {seed}: {run['nats']:.4f} nats, {run['training_seconds']:.0f} s", flush=True)
    first = runs[CONTENDERS[0].name]
    return [
        {
            **asdict(contender),
            "nats": statistics.fmean(run["nats"] for run in runs[contender.name]),
            "against_none": compared(runs[contender.name], first),
            "runs": runs[contender.name],
        }
        for contender in CONTENDERS
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, and says where, on what text and how it was judged."""
    from pydoc_data.topics import topics

    torch.set_num_threads(options.threads)
    settle_allocator()
    whole = "".join(topics[name] for name in sorted(topics))
    text = corpus(dict(sorted(topics.items())[:8]) if options.quick else topics)
    report: dict[str, Any] = {
        "machine": machine.describe(torch.device("cpu")),
        "settings": {name: getattr(options, name) for name in ("epochs", "seeds", "seed", "quick", "validation")}
        | {
            "units": 16 if options.quick else UNITS, "steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE,
            "clip": CLIP, "optimizer": "Adam, its rate falling linearly to a tenth",
        },
        "text": {
            "characters": len(whole),
            "sha256": hashlib.sha256(whole.encode()).hexdigest(),
            "vocabulary": text.vocabulary,
            **{name: len(part) for name, part in zip(SHARES, text, strict=False)},
        },
    }  # fmt: skip
    report["contenders"] = measure(text, options)
    report["machine"]["load_after"] = machine.load()
    return report | {"summary": [verdict(report["contenders"], not (options.quick or options.validation))]}


def verdict(contenders: Sequence[dict[str, Any]], judged: bool) -> dict[str, str]:
    """The row that says whether each variant is better than none by more than two standard errors."""
    found = [contender["against_none"] for contender in contenders[1:]]
    better = all(one["difference"] + 2 * one["standard_error"] < 0 for one in found)
    return {
        "case": "nats for each word of held-out text, against none",
        "required": "lower by more than two standard errors",
        "measured": ", ".join(
            f"{contender['name']} {one['difference']:+.3f} ± {one['standard_error']:.3f}"
            for contender, one in zip(contenders[1:], found, strict=True)
        ),
        "verdict": ("ok" if better else "short") if judged else "not judged",
    }


HEADER = [
    "dropout", "rates", "perplexity", "nats", "nats above none, ± standard error", "by seed", "best epoch",
    "training nats at the end", "validation nats at the end", "training, s",
]  # fmt: skip

RATES = ("locked", "weights", "words", "zoneout_hidden", "zoneout_cell")


def row(contender: dict[str, Any], first: dict[str, Any]) -> list[str]:
    runs, apart = contender["runs"], contender["against_none"]
    by_seed = [run["nats"] - other["nats"] for run, other in zip(runs, first["runs"], strict=True)]
    return [
        contender["name"],
        ", ".join(f"{name.replace('_', ' ')} {contender[name]:g}" for name in RATES if contender[name]) or "-",
        f"{math.exp(contender['nats']):.1f}",
        f"{contender['nats']:.3f}",
        "-" if contender is first else f"{apart['difference']:+.3f} ± {apart['standard_error']:.3f}",
        "-" if contender is first else ", ".join(f"{one:+.3f}" for one in by_seed),
        ", ".join(str(run["best_epoch"]) for run in runs),
        f"{statistics.fmean(run['training_at_the_end'] for run in runs):.3f}",
        f"{statistics.fmean(run['validation'][-1] for run in runs):.3f}",
        f"{statistics.fmean(run['training_seconds'] for run in runs):.0f}",
    ]


def render(report: dict[str, Any]) -> str:
    """A report as markdown: where it was measured and the verdict, the text and settings, the networks."""
    settings, text = report["settings"], report["text"]
    part = "validation" if settings["validation"] else "test"
    seeds = "1 seed" if settings["seeds"] == 1 else f"{settings['seeds']} seeds"
    how = (
        f"{text['training']} words of training, {text['validation']} of validation and {text['test']} of test text, "
        f"of {text['characters']} characters; a vocabulary of {text['vocabulary']}. An embedding and one LSTM layer of "
        f"{settings['units']} units, {settings['epochs']} epochs, {seeds}. Nats and perplexity are "
        f"those of words of the {part} part, by the network of the epoch that is best on the validation part; standard "
        f"errors are over chunks of {CHUNK} neighboring words, paired. So small a training part is overfitted without "
        "dropout."
    )
    if settings["quick"]:
        how += " A quick run of small networks on little text: its figures mean nothing."
    first = report["contenders"][0]
    table = markdown_table(HEADER, [row(contender, first) for contender in report["contenders"]])
    return "\n\n".join([summary.markdown(report), how, table])


def main(arguments: Sequence[str] | None = None) -> None:
    quick = "small networks on little text; judges and writes nothing"
    parser = command.parser(__doc__, "language.json", quick=quick)
    parser.add_argument("--epochs", type=int, help="of each training: 10, or 1 with --quick")
    parser.add_argument("--seeds", default=3, type=int, help="how many trainings of each")
    parser.add_argument("--seed", default=0, type=int, help="the first one")
    parser.add_argument(
        "--validation", action="store_true", help="leave the test part alone; judges and writes nothing"
    )
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    options.epochs = (1 if options.quick else 10) if options.epochs is None else options.epochs
    for name in ("epochs", "seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    report = run(options)
    print(render(report))
    command.write(report, options, "language.json", judged=not (options.quick or options.validation))


if __name__ == "__main__":
    main()

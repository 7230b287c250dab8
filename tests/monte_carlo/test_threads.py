"""Several threads with one model: each has the results of one thread alone, and an ordinary call is never random."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.mc_models import Of, data, equal, passes, state, timm_path, unchanged
from torchdrop.monte_carlo.state import GENERATORS

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    """Layers, a function, code that asks its flag, and normalization; none of them may be seen in another mode."""
    return nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Of(timm_path), torchdrop.Dropout(0.3),
        Of(lambda self, x: F.dropout(x, 0.2, self.training)),
    ).eval()  # fmt: skip


class Meeting:
    """In the middle of a forward of one thread, another one has its turn."""

    def __init__(self) -> None:
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.thread: threading.Thread | None = None
        self.found: list[Any] = []

    def pause(self, module: nn.Module, x: Tensor) -> Tensor:
        if threading.current_thread() is self.thread:
            self.turn.release()
            assert self.back.acquire(timeout=60)
        return x

    def run(self, sample: Callable[[], Any], look: Callable[[], None]) -> tuple[Any, int]:
        """What `sample` gives in a thread of its own, with a look from this one in each of its forwards; how many."""

        def work() -> None:
            try:
                self.found.append(sample())
            finally:
                self.thread = None
                self.turn.release()

        self.thread = thread = threading.Thread(target=work, daemon=True)
        thread.start()
        looks, failed = 0, None
        while self.turn.acquire(timeout=60) and self.thread is not None:
            try:
                look()
            except AssertionError as error:
                failed = failed or error
            self.back.release()
            looks += 1
        thread.join()
        if failed is not None:
            raise failed
        return self.found.pop(), looks


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "context": lambda model, x: passes(model, x, 3, seed=0),
    "vectorized": lambda model, x: torchdrop.mc_predict(model, x, 4, seed=0, strategy="vectorized").mean,
    "repeated": lambda model, x: torchdrop.mc_predict(model, x, 4, seed=0, strategy="repeated").mean,
    "loop": lambda model, x: torchdrop.mc_predict(model, x, 4, seed=0, strategy="loop", weight_scaling=True).mean,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_call_in_the_middle_of_a_pass_is_an_ordinary_one(way: str, training: bool) -> None:
    """In every forward of the survey and of the samples, whatever the mode: flags, buffers and outputs are those of
    before."""
    model, x = network(), data()
    meeting = Meeting()
    model.insert(4, Of(meeting.pause))
    model.train(training)
    expected = WAYS[way](model, x)

    def look() -> None:
        now = state(model)
        assert {name: now[name] for name in before} == before
        if not training:
            assert equal(model(x), plain)

    plain = model(x) if not training else None
    before = state(model)
    with unchanged(model):
        found, looks = meeting.run(lambda: WAYS[way](model, x), look)
    assert looks >= 4
    assert all(map(equal, found, expected))


def run_at_once(*work: Callable[[], None]) -> None:
    """Each in a thread of its own, all from one moment on; an exception of any of them is raised here."""
    barrier, failed = threading.Barrier(len(work)), []

    def started(one: Callable[[], None]) -> None:
        try:
            barrier.wait(60)
            one()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=started, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failed:
        raise error


def test_threads_that_predict_at_once_have_the_results_of_one() -> None:
    """Three that predict and sample, and one that calls the model, again and again."""
    model, x = network(), data()
    seeds = range(4)
    expected = {seed: torchdrop.mc_predict(model, x, 3, seed=seed).mean for seed in seeds}
    samples = {seed: passes(model, x, 2, seed=seed) for seed in seeds}
    plain = model(x)
    over = threading.Event()

    def predict() -> None:
        for _ in range(4):
            for seed in seeds:
                assert equal(torchdrop.mc_predict(model, x, 3, seed=seed).mean, expected[seed])

    def sample() -> None:
        for _ in range(4):
            for seed in seeds:
                assert all(map(equal, passes(model, x, 2, seed=seed), samples[seed]))

    def call() -> None:
        count = 0
        while not over.is_set() or count < 100:
            assert equal(model(x), plain)
            count += 1

    def finish(one: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            try:
                one()
            finally:
                over.set()

        return work

    with unchanged(model):
        run_at_once(finish(predict), finish(predict), finish(sample), call)


def test_contexts_of_several_threads_are_left_in_any_order() -> None:
    model, x = network(), data()
    expected = [passes(model, x, 2, seed=seed) for seed in (0, 1)]
    steps = [threading.Barrier(2) for _ in range(3)]

    def first() -> None:
        with torchdrop.mc_dropout(model, seed=0):
            steps[0].wait(60)
            steps[1].wait(60)
            assert all(map(equal, [model(x), model(x)], expected[0]))
        steps[2].wait(60)

    def second() -> None:
        steps[0].wait(60)
        with torchdrop.mc_dropout(model, seed=1):
            steps[1].wait(60)
            one = model(x)
            steps[2].wait(60)  # the other context, entered before, is left
            assert all(map(equal, [one, model(x)], expected[1]))

    with unchanged(model):
        run_at_once(first, second)
    assert not {"forward", "_call_impl"} & set(vars(model[2]))


def test_no_two_surveys_draw_from_the_shared_generators_at_once() -> None:
    """A survey puts back the generators that it draws from, which would undo what another one draws meanwhile."""
    meeting, seen = Meeting(), []
    model = nn.Sequential(Of(lambda self, x: meeting.pause(self, x)), nn.Dropout(0.5), nn.Linear(8, 8)).eval()
    x = torch.randn(6, 8)

    def free() -> bool:
        taken = GENERATORS.acquire(blocking=False)
        if taken:
            GENERATORS.release()
        return taken

    _, looks = meeting.run(lambda: torchdrop.mc_predict(model, x, samples=4, seed=0), lambda: seen.append(free()))
    assert len(seen) == looks > 2
    assert not seen[0], "the first forward is of a survey"
    assert seen[-1], "the last one is of a sample, which draws from no generator"

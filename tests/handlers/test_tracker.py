"""The tracker of the module that runs: each thread has its own."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from torchdrop.handlers.tracker import Tracker


class Waiting(nn.Module):
    """Stays in its forward until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.entered.set()
        assert self.go_on.wait(60)
        return x


def test_a_forward_in_another_thread_is_not_one_of_this_thread() -> None:
    """What is called outside of a model's forward drops as ever, whoever else is in a forward of it."""
    model, x = Waiting(), torch.ones(100)
    with torchdrop.disabled(model):
        other = threading.Thread(target=model, args=(x,))
        other.start()
        try:
            assert model.entered.wait(60)
            assert (F.dropout(x, 0.5) == 0).any()
        finally:
            model.go_on.set()
            other.join()


def test_a_tracker_has_a_stack_for_each_thread() -> None:
    tracker = Tracker()
    tracker.enter("here")
    seen: list[bool] = []

    def elsewhere() -> None:
        seen.append(tracker.running)
        tracker.enter("there")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]
    assert tracker.stack == ["here"]

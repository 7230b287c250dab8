"""`Turns`: one thread at a time, in the order of asking, whatever happens to those that wait."""

from __future__ import annotations

import threading
import time
from unittest import mock

import pytest

from torchdrop.monte_carlo.turns import Turns


def wait_until(holds: object) -> None:
    end = time.monotonic() + 30
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(1e-3)


def test_in_the_order_of_asking() -> None:
    turns, order, threads = Turns(), list[int](), list[threading.Thread]()

    def ask(number: int) -> None:
        with turns:
            order.append(number)

    with turns:
        for number in range(6):
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            wait_until(lambda number=number: len(turns._waiting) == number + 1)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(6))
    with turns:
        pass


def test_one_at_a_time() -> None:
    turns, inside, most = Turns(), 0, 0

    def ask() -> None:
        nonlocal inside, most
        for _ in range(50):
            with turns:
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_after_an_error() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns:
        raise KeyError
    with turns:
        pass


class Interrupted:
    """A lock whose second acquisition is interrupted, after `first` has been called."""

    def __init__(self, first: object) -> None:
        self._first, self._calls = first, 0

    def acquire(self) -> None:
        self._calls += 1
        if self._calls == 2:
            self._first()  # type: ignore[operator]
            raise KeyboardInterrupt

    def release(self) -> None:
        pass


@pytest.mark.parametrize("handed", [False, True])
def test_an_interrupt_while_waiting(handed: bool) -> None:
    """Before and after the turn has been handed to the thread that is interrupted."""
    turns = Turns()
    turns.__enter__()
    leave = (lambda: turns.__exit__(None, None, None)) if handed else (lambda: None)
    with (
        mock.patch("torchdrop.monte_carlo.turns.threading.Lock", return_value=Interrupted(leave)),
        pytest.raises(KeyboardInterrupt),
    ):
        turns.__enter__()
    if not handed:
        turns.__exit__(None, None, None)
    with turns:
        assert turns._taken
    assert not turns._waiting

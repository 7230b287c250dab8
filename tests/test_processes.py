"""Seeds across threads, forked and spawned processes and data-loading workers."""

from __future__ import annotations

import functools
import multiprocessing
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdrop
import torchdrop.functional as F
from tests.seeding import (
    FAMILY,
    in_threads,
    row_masks,
    shape_of,
)
from torchdrop.kernels import native

"""What PyTorch itself does at the first use of forward mode and of the compiler."""


class TestThreads:
    def test_own_generators_give_what_serial_runs_give(self) -> None:
        def work(i: int) -> Tensor:
            generator = torch.Generator().manual_seed(i)
            layers = [FAMILY[name][0](generator=generator) for name in FAMILY]
            inputs = [torch.ones(shape_of(name, large)) for large in (False, True) for name in FAMILY]
            outputs = [layer(x) for _ in range(4) for layer, x in zip(layers * 2, inputs, strict=True)]
            return torch.cat([y.flatten() for y in outputs])

        serial = [work(0), work(1)]
        assert not torch.equal(*serial)
        for threaded, alone in zip(in_threads(work), serial, strict=True):
            assert torch.equal(threaded, alone)

    def test_default_generator_gives_every_call_its_own_key(self) -> None:
        """Threads that take turns as often as they can: no key is given twice, so no two masks of 256 are equal."""
        layer = torchdrop.Dropout()

        def work(i: int) -> list[Tensor]:
            masks = []
            for _ in range(400):
                x = torch.ones(256, requires_grad=True)
                y = layer(x)
                y.sum().backward()
                assert x.grad is not None
                assert torch.equal(x.grad, y)
                masks.append(y.detach())
            return masks

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            masks = torch.stack([mask for result in in_threads(work, 4) for mask in result])
        finally:
            sys.setswitchinterval(interval)
        assert set(masks.unique().tolist()) == {0.0, 2.0}
        assert len({mask.numpy().tobytes() for mask in masks}) == 1600

    def test_large_tensors_at_once(self) -> None:
        def work(i: int) -> None:
            for _ in range(20):
                x = torch.ones(shape_of("dropout", large=True), requires_grad=True)
                y = F.dropout(x)
                y.sum().backward()
                assert x.grad is not None
                assert torch.equal(x.grad, y)
                assert set(y.unique().tolist()) == {0.0, 2.0}

        in_threads(work)


@functools.cache
def ones() -> tuple[Tensor, Tensor]:
    """A small and a large tensor. A forked child inherits them: there PyTorch itself would hang in making the large."""
    return torch.ones(shape_of("dropout")), torch.ones(shape_of("dropout", large=True))


def draw_in_child(seed: int) -> tuple[bytes, bytes, int]:
    """Both tensors after dropout, and the threads at work."""
    layer = torchdrop.Dropout()
    torch.manual_seed(seed)
    small, large = (layer(x).numpy().tobytes() for x in ones())
    return small, large, native.threads()


def send_draw(seed: int, pipe: Any) -> None:
    pipe.send(draw_in_child(seed))


def draw_in_process(method: str, seed: int) -> Any:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_draw, args=(seed, there))
    process.start()
    try:
        if not here.poll(60):
            pytest.fail(f"the child process ({method}) gave no answer within 60 s")
        return here.recv()
    finally:
        process.kill()
        process.join()


fork_is_there = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")


class Noisy(torch.utils.data.Dataset[Tensor]):
    """Augments each item with dropout, on the fast and the general path."""

    def __init__(self, size: int = 8) -> None:
        self.size, self.layer = size, torchdrop.Dropout()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        assert torch.utils.data.get_worker_info() is not None
        return torch.cat([self.layer(torch.ones(64)), F.dropout(torch.ones(shape_of("dropout", large=True)))])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestProcesses:
    @fork_is_there
    @pytest.mark.skipif(native.library is None, reason="no native kernels")
    def test_fork_after_the_parent_used_its_threads(self) -> None:
        mine = draw_in_child(7)
        assert native.threads() == mine[2] == 2
        child = draw_in_process("fork", 7)
        assert child[:2] == mine[:2] != draw_in_child(8)[:2]
        assert child[2] == 1

    @pytest.mark.slow
    def test_spawn(self) -> None:
        assert draw_in_process("spawn", 7)[:2] == draw_in_child(7)[:2] != draw_in_child(8)[:2]

    @fork_is_there
    def test_data_loader_workers(self) -> None:
        def load(seed: int) -> Tensor:
            loader = torch.utils.data.DataLoader(
                Noisy(), num_workers=2, generator=torch.Generator().manual_seed(seed), multiprocessing_context="fork",
                timeout=60,
            )  # fmt: skip
            return torch.cat(list(loader))

        F.dropout(torch.ones(shape_of("dropout", large=True)))
        first = load(1)
        assert set(first.unique().tolist()) == {0.0, 2.0}
        assert len(row_masks(first)) == len(row_masks(first[:, :64])) == 8
        assert torch.equal(load(1), first)
        assert not torch.equal(load(2), first)

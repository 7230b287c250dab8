"""Settings and fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import numpy  # noqa: F401  (before torch, which warns once where it is missing)
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Two threads, a fixed seed, and PyTorch's random state as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "aten", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced."""
    import torchdrop

    reasons = torchdrop.available_backends()[request.param]
    if reasons:
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    with torchdrop.use_backend(request.param):
        yield request.param

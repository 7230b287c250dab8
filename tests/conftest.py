"""Settings and fixtures for all tests."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# Threads that wait leave their core to the other process of `pytest -n 2`, and to those that tests start. OpenMP reads
# this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import numpy  # noqa: F401  (before torch, which warns once where it is missing)
import pytest
import torch

from tests import TORCH

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
"""Where tests run that hold on any device."""

if "cuda" not in DEVICES:
    # Triton's kernels then run in its interpreter. Triton reads this when it is imported, which is later.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    collect_ignore = ["test_cuda.py"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # there is a newer way, without a word for recurrent layers
    torch.backends.cudnn.allow_tf32 = False  # what is compared in float32 is computed in float32 on CUDA, too

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.register_profile("brief", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_finish() -> None:
    """What the collection of tests has made lives as long as the run, so no collection of garbage need look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Two threads, a fixed seed, and PyTorch's random state as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
    if TORCH < (2, 9) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # there dropout cannot be inserted into a model once something was compiled


@pytest.fixture
def one_thread(_two_threads: None) -> None:
    """One thread, for models that are too small for two, which would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run share, for what is expensive to make. `made_once` makes it."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn. It lives as long as the session, so that hypothesis' tests can have it, too."""
    return torch.device(request.param)


@pytest.fixture(params=["native", "triton", "aten", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced, on the CPU."""
    import torchdrop

    reasons = torchdrop.available_backends()[request.param]
    if reasons:
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    if request.param == "triton" and request.node.get_closest_marker("slow"):
        pytest.skip("triton: its interpreter takes minutes under the thousands of keys that statistics need")
    with torchdrop.use_backend(request.param):
        yield request.param

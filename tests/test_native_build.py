"""The C kernels under sanitizers, and without vector instructions, OpenMP or Python's headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from .native_build import ROOT, VARIANTS


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_another_build_passes_the_kernel_tests(variant: str) -> None:
    command = [sys.executable, "-m", "tests.native_build", variant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout

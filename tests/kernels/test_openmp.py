"""The C kernels share PyTorch's OpenMP runtime and its threads, however many those are."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from torchdrop.kernels import native

REPORT = """
import hashlib, json, os, torch, torchdrop
from torchdrop.kernels import native

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # PyTorch itself takes no more than there are cores
torch.manual_seed(5)
x = torch.tensor([1.0, -2.0, 3.0] * 100_000)
before = threads()
with torchdrop.use_backend("native"):
    outputs = [torchdrop.Dropout(0.3)(x), torchdrop.DropoutAdd(0.3)(x, x), torchdrop.Dropout1d(0.3)(x.view(300, 1000))]
started = threads()
torch.add(x, 1, out=torch.empty_like(x))
paths = {line.split(maxsplit=5)[-1] for line in open("/proc/self/maps").read().splitlines()}
print(json.dumps({
    "library": native.__file__,
    "runtimes": [path for path in sorted(paths) if "omp" in os.path.basename(path)],
    "started by the kernels": started - before,
    "started by PyTorch": threads() - started,
    "masks": hashlib.sha256(b"".join(output.numpy().tobytes() for output in outputs)).hexdigest(),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(native.library is None or not native.library.openmp(), reason="the C kernels have no OpenMP")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads and libraries")
def test_a_process_has_one_pool_and_the_same_masks_for_any_number_of_threads() -> None:
    """The kernels start the threads, and PyTorch, which comes second, has them already."""
    masks = set()
    for threads in (1, 2, 3):
        run = subprocess.run(
            [sys.executable, "-c", REPORT],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        report = json.loads(run.stdout)
        assert report["library"] == native.__file__
        assert len(report["runtimes"]) == 1 or platform.machine() != "x86_64", report
        assert (report["started by the kernels"], report["started by PyTorch"]) == (threads - 1, 0)
        masks.add(report["masks"])
    assert len(masks) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="it is done on Linux only")
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_a_runtime_of_another_name_is_shared_if_pytorch_has_loaded_it(tmp_path: Path) -> None:
    """Its functions are found before those of the runtime that the kernels name."""

    def runtime(path: Path) -> Path:
        path.parent.mkdir(parents=True)
        source = path.with_suffix(".c")
        source.write_text(f"int {path.parent.name.replace('.', '_')}_found(void) {{ return 1; }}")
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
        return path

    ctypes.CDLL(str(runtime(tmp_path / "torch.libs" / "libgomp-0123abcd.so.1.0.0")))
    runtime(tmp_path / "torch" / "lib" / "libgomp.so.1")
    assert not hasattr(ctypes.CDLL(None), "torch_libs_found")
    native._share_openmp(tmp_path / "torch")
    assert hasattr(ctypes.CDLL(None), "torch_libs_found")
    assert not hasattr(ctypes.CDLL(None), "lib_found")

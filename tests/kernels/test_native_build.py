"""The C kernels under sanitizers, and without vector instructions, OpenMP or Python's headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from enum import IntEnum
from pathlib import Path

import pytest

from tests import ROOT
from tests.kernels.native_build import COMMON, SOURCE, VARIANTS
from torchdrop.kernels import native


@pytest.mark.skipif(not SOURCE.exists(), reason="the tests lie outside a source tree")
@pytest.mark.parametrize("ours", [native.ElementType, native.Operation], ids=["td_element_type", "td_operation"])
def test_python_and_c_name_the_same_numbers(ours: type[IntEnum], request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    header = re.sub(r"/\*.*?\*/", "", SOURCE.with_name("entry_points.h").read_text(), flags=re.DOTALL)
    body = re.search(rf"enum {name} {{(.*?)}};", header, re.DOTALL)
    assert body is not None
    theirs = {constant: int(number) for constant, number in re.findall(r"TD_(\w+) = (\d+)", body[1])}
    count = theirs.pop({"td_element_type": "ELEMENT_TYPES", "td_operation": "OPERATIONS"}[name])
    assert theirs == {member.name: member.value for member in ours}
    assert count == len(ours)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_another_build_passes_the_kernel_tests(variant: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.native_build", variant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(native.library is None, reason="the C kernels are not built")
@pytest.mark.parametrize(
    "python",
    ["sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1", "sys.gettotalrefcount = len", "sys.getobjects = len"],
)
@pytest.mark.slow
def test_a_python_of_another_layout_does_not_load_the_module(python: str) -> None:
    """The module would be found there, and compiled for other objects: the library is called through ctypes instead."""
    code = f"""
import sys, sysconfig
sysconfig.get_config_vars()
{python}
import torch, torchdrop
from torchdrop.kernels import native
assert "torchdrop.kernels._native" not in sys.modules
assert type(native.library.row).__name__ == type(native.library.fused).__name__ == "_FuncPtr"
x, drops = torch.ones(1000), [torchdrop.Dropout(0.5), torchdrop.ReLUDropout(0.5), torchdrop.DropoutAdd(0.5)]
for drop in drops:
    torch.manual_seed(3)
    y = drop(x) if drop is not drops[2] else drop(x, x) - x
    assert 0.4 < (y == 0).float().mean() < 0.6
print("through ctypes")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "through ctypes\n", done.stderr[-3000:]


NEWER_HEADERS = """
#include_next <Python.h>
#undef Py_RETURN_NONE
#define Py_RETURN_NONE return Py_None
"""
COUNT = """
import ctypes, importlib.machinery, importlib.util, sys
spec = importlib.util.spec_from_loader("_native", importlib.machinery.ExtensionFileLoader("_native", sys.argv[1]))
native = importlib.util.module_from_spec(spec)
x, params = (ctypes.c_float * 8)(), (ctypes.c_double * 4)(2.0**31, 2.0, 0.0, 0.0)
at, key = ctypes.addressof(x), bytes(16)
before = sys.getrefcount(None)
for _ in range(10_000):
    native.row(0, 0, at, at, 8, key, ctypes.addressof(params), 1)
    native.fused(5, 0, at, at, None, 1, at, 8, key, ctypes.addressof(params), 1, -1)
print(sys.getrefcount(None) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_a_module_compiled_with_newer_headers_takes_no_reference_of_none_away(tmp_path: Path) -> None:
    """None is immortal from Python 3.12 on, and its headers no longer count it. A wheel is for older ones, too."""
    (tmp_path / "Python.h").write_text(NEWER_HEADERS)
    sources = [str(SOURCE), str(SOURCE.with_name("module.c"))]
    include = [f"-I{tmp_path}", f"-I{sysconfig.get_paths()['include']}"]
    library = tmp_path / "_native.so"
    command = [os.environ.get("CC", "cc"), *COMMON, "-O0", "-DTD_PLAIN", *include, *sources, "-o", str(library), "-lm"]
    subprocess.run(command, check=True)
    done = subprocess.run([sys.executable, "-c", COUNT, str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert abs(int(done.stdout)) < 100

"""The C kernels under sanitizers, and without vector instructions, OpenMP or Python's headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from enum import IntEnum

import pytest

from tests import ROOT
from tests.kernels.native_build import SOURCE, VARIANTS
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

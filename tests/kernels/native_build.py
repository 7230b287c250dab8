"""Builds the C kernels in another way and runs the kernel tests on that build, hypothesis-drawn cases and all.

python -m tests.kernels.native_build sanitized    AddressSanitizer and UndefinedBehaviorSanitizer, every vector width
python -m tests.kernels.native_build plain        no vector instructions beyond the compiler's own, no OpenMP, no Python
                                                  headers
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import ROOT

SOURCE = ROOT / "torchdrop" / "kernels" / "csrc" / "dropout.c"
COMMON = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
VARIANTS = {
    "sanitized": ["-O0", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "plain": ["-O2", "-DTD_PLAIN"],
}
TESTS = (
    "handlers/test_masks.py",
    "kernels/test_kernels.py",
    "layers/test_attention.py",
    "layers/test_dropout.py",
    "ops/test_arguments.py",
    "ops/test_fused.py",
    "ops/test_operators.py",
)


def build(variant: str, folder: Path) -> Path:
    library = folder / f"{variant}.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *COMMON, *VARIANTS[variant], str(SOURCE), "-o", str(library), "-lm"], check=True)
    return library


def environment(variant: str) -> dict[str, str]:
    """Python itself is not instrumented, so the sanitizer's runtime has to be loaded before it."""
    if variant != "sanitized":
        return dict(os.environ)
    compiler = os.environ.get("CC", "cc")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    options = {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    return {**os.environ, "LD_PRELOAD": " ".join(runtimes), **options}


def run_tests(library: Path) -> int:
    """In the child: puts the library in the place of the installed one and runs the kernel tests."""
    import numpy  # noqa: F401
    import pytest

    from torchdrop.kernels import native
    from torchdrop.ops import fast_path

    built = native.Library(library)
    built.row, built.fused = native.entry_points_by_ctypes(ctypes.PyDLL(str(library)))
    native.library, fast_path._row, fast_path._fused = built, built.row, built.fused
    fast_path._groups = built.groups
    chosen = (
        "(native or reference or threads or half or philox or part_of or fast_path or in_place or kernels_take "
        "or stratified or fused or fuzzed or by_hand) and not aten and not pytorchs_operations and not [reference"
    )
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    deselected = ["--deselect=tests/kernels/test_kernels.py::test_this_build_has_threads_and_says_its_width"]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys", "-m", "not slow"]
    options += ["--rootdir", str(ROOT), "--hypothesis-profile", "brief"]
    return int(pytest.main([*options, *deselected, "-k", chosen, *tests]))


def main(arguments: list[str]) -> int:
    if len(arguments) == 2:
        return run_tests(Path(arguments[1]))
    (variant,) = arguments
    with tempfile.TemporaryDirectory() as folder:
        library = build(variant, Path(folder))
        command = [sys.executable, "-m", "tests.kernels.native_build", variant, str(library)]
        return subprocess.run(command, cwd=ROOT, env=environment(variant), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

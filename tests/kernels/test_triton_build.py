"""What the Triton kernels become for NVIDIA's GPUs, which need not be there: compiled to machine code and read.

The compilation happens in a process of its own, where Triton's interpreter is off.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests import ROOT, made_once
from tests.strategies import DTYPES
from torchdrop.kernels import triton as backend
from torchdrop.kernels.mask_params import MaskParams, alpha, mask_params, params_tensor
from torchdrop.kernels.masking import WHOLE, MaskSlice

KEY = torch.tensor([1, 2])
NEWEST = 90
BRIEF = ("masked affine", "groups", "add bias", "relu backward", "gelu")
"""Cases for float16 and float64, too, whose kernels are as those of bfloat16 and float32 but for their vectors."""

missing = (
    "the package triton is not installed"
    if not backend._installed()
    else "Triton's NVIDIA compiler is made for Linux on x86-64"
    if (sys.platform, platform.machine()) != ("linux", "x86_64")
    else ""
)
pytestmark = [pytest.mark.skipif(bool(missing), reason=missing), pytest.mark.slow]


class Launcher:
    """Notes launches in place of making them."""

    launches: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        arguments = [(a.dtype, a.shape) if isinstance(a, torch.Tensor) else a for a in rest[6:]]
        self.launches.append((self.name, (x, y, z), *arguments))


class Driver:
    """Stands in for the driver of a GPU of this architecture."""

    launcher_cls = Launcher

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**16}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, module: int) -> None: ...


def cases(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Calls that reach every kernel, and the variants of it that differ in more than the element type."""
    x, keys = torch.ones(2, 4096, dtype=dtype), torch.arange(4).reshape(2, 2)
    rates = params_tensor(torch.tensor([[0.3], [0.6]]))
    half = mask_params(0.9)
    found: dict[str, Callable[[], Any]] = {
        "masked": lambda: backend.masked(x, KEY, half, x.shape),
        "masked affine": lambda: backend.masked(x, KEY, mask_params(0.9, alpha), x.shape),
        "groups": lambda: backend.masked(x, KEY, half, (2, 1)),
        "add": lambda: backend.dropout_add(x, None, x, KEY, half),
        "add bias": lambda: backend.dropout_add(x, x[0], x, KEY, half),
    }
    for name in ("relu", "gelu", "gelu_tanh"):
        found[name] = lambda name=name: backend.activation_dropout(x, KEY, half, name)
        found[f"{name} backward"] = lambda name=name: backend.activation_dropout_backward(x, x, KEY, half, name)
    if dtype is torch.bfloat16:
        found |= {
            "unaligned": lambda: backend.masked(x, KEY, half, x.shape, MaskSlice(3)),
            "masked keys": lambda: backend.masked(x, keys, half, (4096,)),
            "masked rates": lambda: backend.masked(x, keys, rates, (4096,)),
            "masked runs": lambda: backend.masked(x, keys, half, (4096,), MaskSlice(0, 64, 80)),
            "groups small": lambda: backend.masked(x.reshape(-1, 8), KEY, half, (1024, 1)),
            "groups unaligned": lambda: backend.masked(x.reshape(-1)[:4095].reshape(-1, 3), KEY, half, (1365, 1)),
            "add short bias": lambda: backend.dropout_add(x.reshape(-1, 4), x[0, :4], x.reshape(-1, 4), KEY, half),
            "mask": lambda: backend.keep_mask((5000,), KEY, half),
            "random bits": lambda: backend.random_bits((5000,), KEY),
        }
    return found


def forget() -> None:
    """As if nothing had been launched yet."""
    backend._starters.clear()
    backend._ready.clear()


def facts(kernel: Any) -> dict[str, Any]:
    """What the tests ask of a compiled kernel."""
    import triton

    code = [line.split("//")[0].strip() for line in kernel.asm["ptx"].splitlines()]
    doubles = [line for line in code if re.search(r"\.f64\b", line)]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = Path(os.environ["TRITON_CACHE_DIR"]) / f"{os.getpid()}.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    return {
        "vectors": sorted(set(re.findall(r"\b((?:ld|st)\.global)\S*\.(v\d\.b\d+)", "\n".join(code)))),
        "doubles": [one for one in doubles if not re.match(r"\.param|\.reg|ld\.param|cvt\.rn\.f32\.f64", one)],
        "divisions": [line for line in code if re.match(r"(@\S+ )?(div|rem)\.", line)],
        "fused": [line for line in code if line.startswith("fma")],
        "local": [line for line in code if re.match(r"(ld|st)\.local", line)],
        "to bfloat16": sum(line.startswith("cvt.rn.bf16x2.f32") for line in code),
        "conversions": kernel.asm["ttgir"].count("ttg.convert_layout"),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),  # type: ignore[union-attr]
    }


def main(architecture: int) -> None:
    """In the child: compiles every case, and counts what sets of parameters, sizes and places compile.

    An older architecture differs in its instructions, not in what the Python beside the kernels does, so one element
    type is enough for it.
    """
    from triton.runtime.driver import driver

    driver.set_active(Driver(architecture))
    kernels, starter = backend._kernels(), backend._kernels().starter
    compiled: list[Any] = []
    kernels.starter = lambda kernel, index: (compiled.append(kernel), starter(kernel, index))[1]
    found: dict[str, Any] = {}
    for dtype in DTYPES if architecture == NEWEST else (torch.bfloat16,):
        brief = dtype in (torch.float16, torch.float64)
        for name, call in cases(dtype).items():
            if brief and name not in BRIEF:
                continue
            forget()
            compiled.clear()
            call()
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = [facts(kernel) for kernel in compiled]
    launching = {"variants": variants(), "paths": both_paths()} if architecture == NEWEST else {}
    print(json.dumps({"cases": found, **launching}))


def variants() -> dict[str, int]:
    """How many kernels Triton compiles for many sets of parameters, and for many sizes and places."""
    kernel = backend._kernels().rows

    def count(calls: Callable[[], None]) -> int:
        kernel.device_caches.clear()
        calls()
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    def run(n: int, given_params: MaskParams, part: MaskSlice = WHOLE) -> None:
        forget()
        backend.masked(torch.ones(n), KEY, given_params, (n,), part)

    def params_of_each() -> None:
        for below in (0, 1, 15, 16, 17, 2**16, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32):
            for scale in (0.0, 1.0, 2.0, 1 / 3, 2.0**32):
                run(4096, MaskParams(below, scale))

    def sizes() -> None:
        for n in (1, 2, 16, 17, 1000, 1024, 4096, 100_003):
            run(n, mask_params(0.5))
        for start in (4, 8, 16, 128, 2**31, 2**32, 2**33 + 16, 2**62):
            run(64, mask_params(0.5), MaskSlice(start))

    def rows() -> None:
        for many, length, pitch in ((2, 1024, 1024), (2, 4096, 2**33), (16, 1024, 8), (3, 1000, 2**31), (2, 2000, 16)):
            run(many * length, mask_params(0.5), MaskSlice(0, length, pitch))

    return {"sets of parameters": count(params_of_each), "sizes": count(sizes), "rows": count(rows)}


def both_paths() -> list[bool]:
    """Whether a kernel that is known is launched with what Triton launches it with."""
    same = []
    for call in cases(torch.bfloat16).values():
        forget()
        Launcher.launches.clear()
        call()
        known = dict(backend._starters)
        call()
        assert known == backend._starters
        first, second = Launcher.launches[: len(known)], Launcher.launches[len(known) :]
        same.append(bool(known) and first == second)
    return same


def apart(module: str, cache: Path, *arguments: str) -> Any:
    """What a module of the tests prints, in a process where Triton's interpreter is off and no GPU is to be seen: the
    stand-in for its driver must not meet kernels that were launched on it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def cache(shared_folder: Path) -> Path:
    """Triton's cache, which all processes of a test run share: a kernel is compiled once."""
    return shared_folder / "triton-cache"


def kernels_for(architecture: int, folder: Path, cache: Path) -> dict[str, Any]:
    def make(into: Path) -> None:
        (into / "facts.json").write_text(json.dumps(apart("tests.kernels.test_triton_build", cache, str(architecture))))

    made = made_once(folder / f"triton-{architecture}", make) / "facts.json"
    found: dict[str, Any] = json.loads(made.read_text())
    return found


@pytest.fixture(scope="module")
def newest(shared_folder: Path, cache: Path) -> dict[str, Any]:
    return kernels_for(NEWEST, shared_folder, cache)


@pytest.fixture(scope="module")
def older(shared_folder: Path, cache: Path) -> dict[str, Any]:
    return kernels_for(80, shared_folder, cache)


@pytest.fixture(params=["older", "newest"], ids=["sm_80", "sm_90"])
def built(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found


def named(built: dict[str, Any], *dtypes: torch.dtype, without: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The kernels for these element types; a call with two kernels gives two."""
    wanted = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return {
        f"{name} {j}": one
        for name, kernels in built["cases"].items()
        if name.split()[-1] in wanted and not any(name.startswith(other) for other in without)
        for j, one in enumerate(kernels)
    }


def test_every_kernel_compiles_and_spills_nothing(built: dict[str, Any]) -> None:
    kernels = named(built, *DTYPES)
    assert len(kernels) in (11 + 9, 2 * 11 + 2 * len(BRIEF) + 9)
    for name, kernel in kernels.items():
        assert kernel["local"] == [], name
        assert kernel["stack"] == 0, name


def test_memory_is_read_and_written_in_vectors_of_16_bytes(built: dict[str, Any]) -> None:
    """But where rows or groups do not begin at a vector."""
    for name, kernel in named(built, *DTYPES, without=("unaligned", "groups unaligned")).items():
        width = "v2.b64" if "float64" in name else "v4.b32"
        if name.startswith("mask "):
            assert kernel["vectors"] == [["st.global", "v2.b32"]]
        elif name.startswith("random bits"):
            assert kernel["vectors"] == [["st.global", "v2.b64"]]
        else:
            assert ["ld.global", width] in kernel["vectors"], name
            assert ["st.global", width] in kernel["vectors"], name


def test_threads_exchange_nothing_but_whether_there_are_ties(built: dict[str, Any]) -> None:
    for name, kernel in named(built, *DTYPES, without=("groups", "unaligned")).items():
        assert kernel["conversions"] == 0, name


def test_only_float64_is_computed_in_double_precision(built: dict[str, Any]) -> None:
    """Where the parameters are an argument: one in memory is doubles, which are compared and rounded."""
    for name, kernel in named(built, torch.float16, torch.bfloat16, torch.float32, without=("masked rates",)).items():
        assert kernel["doubles"] == [], name


def test_nothing_is_divided_and_no_addition_fused(built: dict[str, Any]) -> None:
    undivided = ("masked", "masked affine", "unaligned", "relu", "relu backward", "add", "mask", "random bits", "gelu")
    for name, kernel in named(built, *DTYPES).items():
        call = name.rsplit(" ", 2)[0]
        if call in undivided:
            assert kernel["divisions"] == [], name
        if not call.startswith("gelu"):  # exp and erf are made of fused operations
            assert kernel["fused"] == [], name


def test_bfloat16_is_rounded_two_at_a_time(built: dict[str, Any]) -> None:
    kernels = named(built, torch.bfloat16, without=("unaligned", "groups unaligned", "mask ", "random bits"))
    assert len(kernels) == 16
    for name, kernel in kernels.items():
        assert kernel["to bfloat16"] > 0, name


def test_other_parameters_sizes_or_places_compile_nothing(newest: dict[str, Any]) -> None:
    assert newest["variants"] == {"sets of parameters": 1, "sizes": 1, "rows": 1}


def test_a_known_kernel_is_launched_as_triton_launches_it(newest: dict[str, Any]) -> None:
    assert len(newest["paths"]) == 20
    assert all(newest["paths"])


def test_registers_leave_room_for_several_programs(built: dict[str, Any]) -> None:
    """For six of 128 threads on a multiprocessor of 65536 registers, and for four of the larger ones."""
    for name, kernel in named(built, *DTYPES).items():
        light = name.startswith(("masked", "groups", "relu")) and "unaligned" not in name
        assert kernel["registers"] <= (80 if light else 128), name


if __name__ == "__main__":
    main(int(sys.argv[1]))

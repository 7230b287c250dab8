"""What the Triton backend takes and refuses, and how it launches its kernels."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdrop
from tests.kernels.triton_kernels import (  # noqa: F401
    KEY,
    here,
    identical,
    masked,
    needs_kernels,
    programs_of_the_devices_size,
    quiet,
)
from tests.strategies import DTYPES
from torchdrop.kernels import reference
from torchdrop.kernels import triton as backend
from torchdrop.kernels.mask_params import alpha, mask_params

pytestmark = quiet


@needs_kernels
@pytest.mark.parametrize("call", ["masked", "keep_mask", "random_bits", "add", "activation", "activation_backward"])
def test_nothing_is_launched_for_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, half, key = here(torch.ones(4, 0, 3)), mask_params(0.5), here(KEY)
    calls: dict[str, Callable[[], Tensor | None]] = {
        "masked": lambda: backend.masked(x, key, half, x.shape),
        "keep_mask": lambda: backend.keep_mask(x.shape, key, half),
        "random_bits": lambda: backend.random_bits(x.shape, key),
        "add": lambda: backend.dropout_add(x, None, x, key, half),
        "activation": lambda: backend.activation_dropout(x, key, half, "gelu"),
        "activation_backward": lambda: backend.activation_dropout_backward(x, x, key, half, "relu"),
    }
    monkeypatch.setattr(backend, "_launch", None)
    out = calls[call]()
    assert out is not None
    assert out.shape == x.shape


def test_forcing_it_on_a_cpu_tensor_without_the_interpreter_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    with (
        torchdrop.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"not on cpu; .* set TRITON_INTERPRET=1 in"),
    ):
        torchdrop.functional.dropout(torch.ones(8))


def test_other_devices_and_element_types_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_installed", lambda: True)
    (reason,) = backend.unsupported_reasons(torch.device("meta"), torch.float32)
    assert reason.startswith("it works on CUDA tensors, not on meta; for tests, Triton's interpreter takes CPU tensors")
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    (reason,) = backend.unsupported_reasons(torch.device("cpu"), torch.float32)
    assert "not on cpu" in reason
    assert "set TRITON_INTERPRET=1 in the environment before Python starts" in reason
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    assert backend.unsupported_reasons(torch.device("cpu"), torch.float32) == []
    (reason,) = backend.unsupported_reasons(torch.device("cpu"), torch.int64)
    assert reason == "it takes torch.float16, torch.bfloat16, torch.float32, torch.float64, not torch.int64"
    monkeypatch.setattr(backend, "_installed", lambda: False)
    (reason,) = backend.unsupported_reasons(torch.device("cuda"), torch.float32)
    assert reason == "the package triton is not installed: it comes with PyTorch's CUDA builds for Linux"
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unsupported_reasons(torch.device("cuda"), torch.float32) == ["PyTorch finds no CUDA device"]


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trial on a CUDA device allocates."""
    for name in ("ones", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda n, make=make, device=None, **kinds: make(n, **kinds))


def test_where_kernels_do_not_compile_the_reason_is_kept_and_said_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    tried = []

    def fails(*_: object) -> None:
        tried.append(1)
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(backend, "served", set())
    backend._failure.cache_clear()
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(backend, "masked", fails)
    on_the_cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend.unsupported_reasons(torch.device("cuda"), torch.float32) == []
    assert not tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(
        UserWarning, match="kernels do not take torch.float32 on cuda:0: .* another backend there, .*no C compiler"
    ):
        reasons = backend.unsupported_reasons(torch.device("cuda"), torch.float32)
    assert reasons == ["its kernels do not work on this machine: RuntimeError: no C compiler"]
    assert backend.unsupported_reasons(torch.device("cuda:0"), torch.float32) == reasons
    assert tried == [1]
    backend._failure.cache_clear()
    answers = iter([reference.masked, lambda x, *_: torch.full_like(x, 3.0)])
    monkeypatch.setattr(backend, "masked", lambda *arguments: next(answers)(*arguments))
    with pytest.warns(UserWarning, match="masks are not those of the reference"):
        assert backend.unsupported_reasons(torch.device("cuda"), torch.float32)
    backend._failure.cache_clear()
    monkeypatch.setattr(backend, "masked", reference.masked)
    for dtype in DTYPES:
        assert backend.unsupported_reasons(torch.device("cuda"), dtype) == []
    assert not recwarn.list
    monkeypatch.setattr(backend, "_why_not", None)
    assert backend.unsupported_reasons(torch.device("cuda:0"), torch.float32) == []
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    assert len(backend.unsupported_reasons(torch.device("cpu:0"), torch.float32)) == 1
    backend._failure.cache_clear()


class Elsewhere:
    """As much of a tensor on a CUDA device as a launch asks of it."""

    dtype = torch.float32

    def __init__(self, index: int) -> None:
        self.index = index

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return 4096


def test_a_launch_goes_to_the_tensors_own_device_and_is_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    current, launched = [0], []

    class Guard:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., str]:
            def search(*arguments: Any, **options: Any) -> str:
                launched.append(("searched", current[-1], grid, arguments, options))
                return "compiled"

            return search

    def starter(kernel: str, index: int) -> Callable[..., None]:
        assert kernel == "compiled"
        return lambda *arguments: launched.append(("known", current[-1], index, arguments))

    monkeypatch.setattr(backend, "_starters", {})
    monkeypatch.setattr(backend, "_kernels", lambda: types.SimpleNamespace(rows=Kernel(), starter=starter))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    for index in (0, 1):
        out: Any = Elsewhere(index)
        for values in ((1, 2.0), (3, 4.0)):
            backend._launch("rows", 7, (out, None), values, ("all",))
        backend._launch("rows", 7, (out, out), (), ("all",))
        assert launched == [
            ("searched", index, (7,), (out, None, 1, 2.0, "all"), options),
            ("known", index, index, (7, out, None, 3, 4.0, "all")),
            ("searched", index, (7,), (out, out, "all"), options),
        ]
        launched.clear()


def test_a_row_that_is_ready_is_started_on_its_own_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    current, started, launched = [1], [], []
    starters: dict[Any, Any] = {(1, torch.float32): (lambda *arguments: started.append(arguments), 4, ("constant",))}

    class Row(Elsewhere):
        shift = 0

        def numel(self) -> int:
            return 9

        def element_size(self) -> int:
            return 4

        def data_ptr(self) -> int:
            return 4096 + self.shift

    monkeypatch.setattr(backend, "_ready", starters)
    monkeypatch.setattr(backend, "current_cuda_device", lambda: current[0])
    monkeypatch.setattr(backend, "_vectors", lambda: 2)
    monkeypatch.setattr(backend, "_launch", lambda *arguments: launched.append(arguments))
    half, (x, out, key, other, aside) = mask_params(0.5), [Row(1), Row(1), Row(1), Row(0), Row(1)]
    aside.shift = 8
    row: Any = backend.masked_row
    assert row(x, key, half, out) is out
    values = (2**15, 0, 2.0, 0.0, 0.0)
    assert started == [(3, out, x, key, None, *values, 0, 9, 9, 1, 3, "constant")]
    launch = ("rows", 2, (out, x, key, None), (*values, 0, 9, 9, 1, 2))
    row(aside, key, half, out)
    row(x, key, half, aside)
    row(x, aside, half, out)
    row(x, key, mask_params(0.5, alpha), out)
    current[0] = 0
    row(x, key, half, out)
    row(other, key, half, out)
    assert len(started) == 1
    assert len(launched) == 6
    assert launched[4] == (*launch, ("product", False, "all", True, True, 2, 4))
    assert [arguments[4][1] for arguments in launched] == [False, False, False, True, False, False]


@needs_kernels
def test_profilers_hear_of_launches_and_without_them_triton_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from torchdrop.kernels import triton_kernels

    calls: list[Any] = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def run(self, *arguments: Any) -> None:
            calls.append(arguments)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: calls.append((grid, *arguments))

    active = types.SimpleNamespace(get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(triton_kernels, "driver", types.SimpleNamespace(active=active))
    start = triton_kernels.starter(Compiled(), 3)
    straight = (5, 1, 1, "stream of 3", "function", "metadata", None, None, None, 1, "a")
    start(5, 1, "a")
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, hook, None)
            start(5, 1, "a")
            patch.setattr(knobs.runtime, hook, print)
            start(5, 1, "a")
    watched = ((5, 1, 1), 1, "a")
    assert calls == [straight, *[straight, watched] * 2]
    calls.clear()
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, hook)
        if chain is None:
            continue  # Triton 3.4 has no chains of hooks
        chain.add(print)
        start(5, 1, "a")
        chain.remove(print)
        start(5, 1, "a")
    assert calls in ([watched, straight] * 2, [])


@needs_kernels
def test_an_older_triton_is_refused_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from torchdrop.kernels import triton_kernels

    monkeypatch.delattr(triton, "knobs")
    monkeypatch.setitem(sys.modules, "triton.knobs", None)
    with pytest.raises(ImportError, match=f"need Triton 3.4 or newer, .* PyTorch 2.8, got {triton.__version__}"):
        importlib.reload(triton_kernels)


@pytest.mark.slow
def test_the_kernels_are_not_imported_for_cpu_tensors() -> None:
    program = """
import sys, torch
import torchdrop
torchdrop.Dropout()(torch.ones(8))
assert torchdrop.available_backends("cpu")
assert "torchdrop.kernels.triton_kernels" not in sys.modules
assert not torch.cuda.is_initialized()
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@needs_kernels
def test_programs_of_one_row_cover_several_chunks_and_rows_of_a_batch_too() -> None:
    """The sizes that the kernels are launched with, so that the tests above have met them all."""
    seen: set[tuple[Any, ...]] = set()
    launch = backend._launch

    def watch(name: str, programs: int, tensors: Any, values: Any, constants: Any, warps: int = 4) -> None:
        seen.add((programs > 1, *constants[-3:], warps))
        launch(name, programs, tensors, values, constants, warps)

    key = torch.arange(6).reshape(3, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_launch", watch)
        for x, keyed in (
            (torch.randn(5000), KEY),
            (torch.randn(3, 5000), key),
            (torch.randn(3, 80), key),
            (torch.randn(3, 5001), key),
            (torch.randn(3, 81), key),
            (torch.randn(2001).half(), KEY),
        ):
            shape = x.shape[keyed.dim() - 1 :]
            assert identical(
                masked(x, keyed, mask_params(0.6), shape), reference.masked(x, keyed, mask_params(0.6), shape)
            )
    assert seen == {  # several programs, aligned, vectors, lanes, warps
        (True, True, 256, 4, 4),
        (True, True, 32, 4, 1),
        (True, False, 256, 4, 4),
        (True, False, 32, 4, 1),
        (False, True, 256, 8, 4),
    }


def test_the_interpreter_is_asked_for_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_kernels", None)
    assert backend._interpreted.__wrapped__() is False

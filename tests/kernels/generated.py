"""The code that Inductor generates for CUDA, where there is no CUDA device: read, and run by an interpreter of PTX.

A function is compiled for the CPU as far as a graph of its operations, forward and backward. The graph is moved to a
CUDA device that does not exist, and Inductor generates its code for it. The kernels in that code are compiled for sm_90
and run by `ptx` on tensors of the CPU, in place of what Inductor makes for the CPU.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from tests.kernels import ptx

CUDA = torch.device("cuda", 0)
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "i64": 8, "i1": 1, "u8": 1, "i8": 1}

_PROPERTIES = types.SimpleNamespace(
    name="none", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=2**37, L2_cache_size=2**25,
    shared_memory_per_block=2**15,
)  # fmt: skip


def _zero() -> int:
    return 0


def _capability(device: Any = None) -> int:
    return 90


@contextmanager
def a_card() -> Iterator[None]:
    """As if there were a CUDA device, as far as Inductor asks before it generates code."""
    from torch._dynamo.device_interface import CudaInterface

    def properties(device: Any = None) -> Any:
        return _PROPERTIES

    with ExitStack() as stack:
        for target in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(mock.patch.object(target, "current_device", staticmethod(_zero)))
            stack.enter_context(mock.patch.object(target, "get_device_properties", staticmethod(properties)))
        stack.enter_context(mock.patch.object(CudaInterface, "get_compute_capability", staticmethod(_capability)))
        stack.enter_context(mock.patch("torch.cuda.current_device", return_value=0))
        stack.enter_context(mock.patch("torch.cuda.get_device_properties", properties))
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        stack.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", return_value=""))
        yield


def _moved(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any], Any]:
    """The same graph, on a CUDA device, with fake inputs."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode, graph = torch._guards.detect_fake_mode(inputs), copy.deepcopy(graph)

    def there(argument: Any) -> Any:
        return CUDA if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(given, there) for given in (node.args, node.kwargs))
    graph.recompile()
    assert mode is not None
    with mode:
        fakes = [
            torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device=CUDA) if isinstance(i, Tensor) else i
            for i in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)
    return graph, fakes, mode


def _code(graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> str:
    """What Inductor generates for a graph whose inputs are on the CPU, if they were on a CUDA device."""
    from torch._inductor import compile_fx, config
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graph, fakes, mode = _moved(graph, inputs)
    inference, backward = options.get("is_inference", False), options.get("is_backward", False)
    with a_card(), V.set_fake_mode(mode), DebugContext(), config.patch(compile_threads=1):
        compile_fx.record_original_output_strides(graph)
        compile_fx.view_to_reshape(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=inference)
        lowered = GraphLowering(
            graph, example_inputs=fakes, shape_env=mode.shape_env, is_inference=inference, is_backward=backward
        )
        with V.set_graph_handler(lowered):
            lowered.run(*fakes)
            code = lowered.codegen()[0]
    return str(getattr(code, "value", code))


class Kernel:
    """A Triton kernel in generated code. `run` runs it on tensors of the CPU."""

    def __init__(self, name: str, source: str, folder: Path, block: int = 256, warps: int = 4) -> None:
        self.name, self.source, self.folder, self.block, self.warps = name, source, folder, block, warps
        found = re.search(r"'signature': (\{[^}]*\})", source)
        assert found
        self.signature: dict[str, str] = ast.literal_eval(found[1])

    def compiled(self) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        path = self.folder / f"{self.name}_{abs(hash(self.source))}.py"
        imports = (
            "import triton\nimport triton.language as tl\nfrom torch._inductor.runtime import triton_helpers\n"
            "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
        )
        body = self.source[self.source.index("@triton.jit") :]
        path.write_text(imports + re.sub(r", eviction_policy='\w+'", "", body))  # `ptx` has no caches
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(self.signature.values()) if kind[0] == "*"}
        source = ASTSource(getattr(module, self.name), self.signature, {"XBLOCK": self.block}, aligned)
        return triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": self.warps, "enable_fp_fusion": True}
        )

    def run(self, *arguments: Any, stream: Any = None) -> None:
        kinds = [kind for kind in self.signature.values() if kind != "constexpr"]
        programs = -(-arguments[-1] // self.block)
        ptx.launch(self.compiled().asm["ptx"], programs, list(zip(kinds, arguments, strict=True)))

    def bytes_an_element(self) -> int:
        """Counts what is read and written for each element."""
        places = re.findall(r"tl\.(?:load|store)\((\w+) \+ \(([^)]*)\)", self.source)
        return sum(_BYTES[self.signature[name][1:]] for name, index in places if "x" in index)

    def instructions_an_element(self) -> float:
        """Counts the instructions of machine code for each element that a thread serves."""
        import os
        import subprocess

        import triton

        binary = self.folder / f"{os.getpid()}.cubin"
        binary.write_bytes(self.compiled().asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-sass", binary], check=True, capture_output=True, text=True).stdout
        lines = [line for line in re.findall(r"/\*[0-9a-f]{4}\*/\s+(.*?);", text) if "NOP" not in line]
        return len(lines) / (self.block / (32 * self.warps))


class Code:
    """Generated code for a forward or backward graph."""

    def __init__(self, text: str, folder: Path) -> None:
        self.text, self.folder = text, folder
        self.kernels: list[Kernel] = []
        self.externs: list[str] = re.findall(
            r"= (?:torch\.ops|extern_kernels)\.([\w.]+)\(", text[text.index("def call(") :]
        )

    def run(self, arguments: list[Any]) -> Any:
        """Runs the code on tensors of the CPU, with its kernels as they are compiled for a GPU."""
        compiler = mock.Mock()
        compiler.triton = self._kernel
        namespace: dict[str, Any] = {"__name__": "generated"}
        with (
            mock.patch("torch._inductor.async_compile.AsyncCompile", return_value=compiler),
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0),
        ):
            exec(compile(self.text, "generated", "exec"), namespace)
        namespace["empty_strided_cuda"] = lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
        namespace["device"] = lambda *_, **__: torch.device("cpu")
        with mock.patch("torch.cuda._DeviceGuard", return_value=nullcontext()), mock.patch("torch.cuda.set_device"):
            return namespace["call"](arguments)

    def _kernel(self, name: str, source: str, **_: Any) -> Kernel:
        self.kernels.append(Kernel(name, source, self.folder))
        return self.kernels[-1]


def compiled(function: Callable[..., Any], folder: Path, **options: Any) -> tuple[Callable[..., Any], list[Code]]:
    """Compiles a function of CPU tensors for CUDA. Returns it as generated code that `ptx` runs, and a list of that
    code, which each compilation extends: forward, then backward."""
    from torch._inductor import compile_fx

    codes: list[Code] = []

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], **given: Any) -> Callable[[list[Any]], Any]:
        code = Code(_code(graph, inputs, given), folder)
        codes.append(code)

        def run(arguments: list[Any]) -> Any:
            return code.run(arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    return torch.compile(function, fullgraph=True, backend=backend, **options), codes

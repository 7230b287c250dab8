"""The state of PyTorch at the moment of a call. Only `torch_inductor` also names private parts of torch.

If a new version of torch moves one of them, only this file changes. It imports nothing of torchdrop, so every other
file may import it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

Function = TypeVar("Function", bound=Callable[..., Any])

VERSION: tuple[int, ...] = tuple(int(number) for number in torch.__version__.split(".")[:2])
"""The version of PyTorch: (2, 13)."""

is_compiling: Callable[[], bool] = torch.compiler.is_compiling
"""Whether Dynamo traces this call. It is a constant in compiled code."""

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of torch.func is active. There is no public function for it; Dynamo can trace this one."""

function_modes: Callable[[], int] = torch._C._len_torch_function_stack
"""Counts the TorchFunctionModes that are on. The public `torch.overrides` lists them at five times the cost."""

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""Counts the TorchDispatchModes that are on."""

tracing_state: Callable[[], Any] = torch._C._get_tracing_state
"""Returns the state of torch.jit.trace, None while nothing is traced: `torch.jit.is_tracing` at a tenth of its cost."""

has_storage: Callable[[Tensor], bool] = torch._C._has_storage
"""Whether a tensor has memory. The batched gradients of `torch.autograd.grad` have none."""

without_function_modes: Any = torch._C.DisableTorchFunction
"""A context in which function modes and subclasses see no call."""

pop_function_mode = _pop_mode_temporarily
"""A context in which the innermost function mode is off."""

without_transforms = temporarily_clear_interpreter_stack
"""A context in which no transform of torch.func is active: a number that is drawn there is an ordinary tensor."""

below_autograd: Any = torch._C._AutoDispatchBelowAutograd
"""A context in which calls do not look whether they are to be differentiated, which takes more time than they do."""

without_dispatch_modes = _disable_current_modes
"""A context in which no dispatch mode is on."""

current_cuda_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""The index of the current CUDA device, without the check for initialization that the public function makes."""

_creation_meta = torch._C._autograd._get_creation_meta
_MADE_AS_USUAL = torch._C._autograd.CreationMeta.DEFAULT


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compiles a graph of operators with Inductor for inputs of these shapes. torch.compile would first look at its
    Python code, and compare what it has seen there at each call, which takes longer than a small model."""
    from torch._inductor import compile as inductor_compile

    return inductor_compile(graph, inputs)


def _no_bfloat16() -> bool:
    return False


_has_bfloat16: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", _no_bfloat16)


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the processor has instructions for products of bfloat16, which PyTorch then uses."""
    return torch.backends.mkldnn.is_available() and _has_bfloat16()


def elements(tensor: Tensor) -> Tensor:
    """Returns the strided tensor that has the elements of a tensor: its values if it is sparse or jagged."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


class DispatchMode(TorchDispatchMode):
    """The base of dispatch modes.

    PyTorch before 2.11 holds in variables of all threads whether one is on. Threads that enter and leave modes at the
    same time would leave them true, and torch.compile would compile nothing any more. So the last mode that is left
    puts them back.
    """

    supports_higher_order_operators = True

    _lock = threading.Lock()
    _inside = 0
    _before: ClassVar[dict[str, bool]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets flex_attention and torch.cond compile what they are given, which they cannot do without. What PyTorch
        would not compile under a mode once, it would compile never more."""
        return True

    def __enter__(self) -> Any:
        with DispatchMode._lock:
            if not DispatchMode._inside:
                flags = {name: flag for name, flag in vars(_python_dispatch).items() if isinstance(flag, bool)}
                DispatchMode._before = flags
            DispatchMode._inside += 1
            return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        with DispatchMode._lock:
            super().__exit__(*exception)
            DispatchMode._inside -= 1
            if not DispatchMode._inside and VERSION < (2, 11):
                vars(_python_dispatch).update(DispatchMode._before)


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is on. `forward_ad` has no public function that says so."""
    return forward_ad._current_level >= 0


def in_backward() -> bool:
    """Whether this call is made by autograd's backward, as when activation checkpointing runs a forward again."""
    return torch._C._current_graph_task_id() != -1


def _transforms() -> list[Any]:
    return [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or []]


def constant_when_compiled(function: Function) -> Function:
    """Marks a function whose result compiled code takes as a constant: Dynamo calls it and does not enter it.

    `torch.compiler.assume_constant_result` sets the same mark, but imports all of Dynamo first, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _exporting_in_torch_2_6() -> bool:
    """Whether torch.export traces: by itself, which sets the flag of compilation, or by a Dynamo that is told so."""
    tracer = getattr(sys.modules.get("torch._dynamo.symbolic_convert"), "tls", None)
    return torch.compiler._is_compiling_flag or getattr(getattr(tracer, "current_tx", None), "export", False)


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", _exporting_in_torch_2_6)


@constant_when_compiled
def is_exporting() -> bool:
    """Whether torch.export traces this call.

    Dynamo of PyTorch 2.8 takes the public function for true in all compiled code. It calls this one.
    """
    return _is_exporting()


@contextmanager
def as_eager() -> Iterator[None]:
    """Within it, Python code that torch.export runs is not told so: handlers see the calls that they see in eager mode,
    and a rate is a number. The tensors are those of the trace."""
    state = torch.compiler
    before = state._is_compiling_flag, getattr(state, "_is_exporting_flag", False)
    state._is_compiling_flag = state._is_exporting_flag = False
    try:
        yield
    finally:
        state._is_compiling_flag, state._is_exporting_flag = before


def tensor_for_graphs(values: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of `values` on a CUDA device whose memory captured graphs read in place. Other inputs of compiled
    code are copied for each of their replays."""
    with torch.inference_mode(False):
        tensor = values.to(device, non_blocking=True)
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined] # as torch._dynamo.mark_static_address
    return tensor


def check_compiled_code_is_replaceable() -> None:
    """Raises RuntimeError if there is compiled code that `forget_compiled_code` cannot replace."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and VERSION < (2, 9) and any(code() for code in frames.input_codes.seen):
        raise RuntimeError(
            f"torch.compile has compiled code that does not know of this change, and PyTorch {torch.__version__} "
            "crashes when code is compiled again after torch.compiler.reset() (PyTorch issue 155057): make the change "
            "before anything compiled is called, or use PyTorch 2.9 or newer"
        )


def forget_compiled_code() -> None:
    """Makes torch.compile forget the code that it has compiled, for changes that it does not look at again."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@constant_when_compiled
def autocast_available(kind: str) -> bool:
    """Whether there is autocast for a kind of device. Dynamo of PyTorch 2.8 does not enter the public function."""
    return torch.amp.is_autocast_available(kind)


@constant_when_compiled
def vmap_active() -> bool:
    """Whether one of the active transforms is vmap, which has modes for randomness."""
    return torch._C._functorch.TransformType.Vmap in _transforms()


def functionalize_active() -> bool:
    """Whether one of the active transforms is functionalize, which does not enter an autograd.Function."""
    return torch._C._functorch.TransformType.Functionalize in _transforms()


def is_batched(x: Tensor) -> bool:
    """Whether vmap maps over a tensor."""
    return torch._C._functorch.is_batchedtensor(x)


def is_usual_view(x: Tensor) -> bool:
    """Whether autograd allows writing to a view. It refuses one that was made by `split` or under other rules."""
    return _creation_meta(x) == _MADE_AS_USUAL


def _fx_tracing_in_torch_2_8() -> bool:
    return _symbolic_trace._is_fx_tracing_flag and not is_compiling()


_fx_tracing: Callable[[], bool] = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _fx_tracing_in_torch_2_8)


def fx_tracing() -> bool:
    """Whether torch.fx traces a forward symbolically, as opposed to make_fx and the compiler, which run it."""
    return _fx_tracing() and not dispatch_modes()


def recomputing_setting() -> tuple[str, str] | None:
    """Returns the setting, if any, under which the compiler's partitioner computes random numbers anew for backward.

    Returns:
        The setting, as the beginning of a sentence, and the remedy; None if nothing is computed anew.
    """
    config = torch._functorch.config
    budget = torch.fx.traceback.current_meta.get("custom", {}).get("_region_activation_memory_budget")
    where = "the budget of torch.autograd.graph.region_activation_memory_budget"
    if budget is None:
        where, budget = "torch._functorch.config.activation_memory_budget", config.activation_memory_budget
    if budget < 1.0:
        return f"{where} is {budget}: below 1", "Set it to 1"
    for name, wanted in (("aggressive_recomputation", False), ("ban_recompute_not_in_allowlist", True)):
        if bool(getattr(config, name)) is not wanted:
            return f"torch._functorch.config.{name} is {not wanted}: with that", f"Set it to {wanted}"
    return None


def is_watched() -> bool:
    """Whether a function mode is on that may put keys or masks of its own in the place of ours.

    The mode of `torch.set_default_device` does not: every device is named where a tensor is made. Nor do modes that say
    so by an attribute `ignores_layers`.
    """
    return any(
        not (isinstance(mode, DeviceContext) or getattr(mode, "ignores_layers", False))
        for mode in _get_current_function_mode_stack()
    )


def is_observed() -> bool:
    """Whether a transform, dispatch mode or trace has to see the calls. Function modes are left to the caller."""
    return transforms_active() or dispatch_modes() != 0 or forward_ad._current_level >= 0 or tracing_state() is not None


def is_plain(x: Tensor) -> bool:
    """Whether x's values are those in its memory, and no transform, mode or trace has to see the calls with it."""
    kind = type(x)
    return (
        (kind is Tensor or kind is Parameter)
        and not function_modes()
        and not is_observed()
        and has_storage(x)
        and not x.is_neg()
        and not x._is_zerotensor()
        and not x.is_meta
    )


def node_of(function: Any) -> Callable[..., Any]:
    """Returns `function.apply` of an autograd.Function, without the search for transforms that goes before it.

    It is for calls after a check that no transform is active.
    """
    return super(torch.autograd.Function, function).apply


def lean_node_of(function: Any) -> Callable[..., Any]:
    """Does what `node_of` does. Its backward is found without asking which of `backward` and `vjp` is defined."""
    function._backward_cls.apply = function.backward
    return node_of(function)

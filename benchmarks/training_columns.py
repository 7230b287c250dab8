"""One column of a table of training steps: a model whose dropout is absent, PyTorch's or replaced, and its process.

Each column has a process of its own, in which nothing that was compiled for another column is found again, and the
processes take turns. A step is forward, loss and backward; the gradients are cleared at its end.
"""

from __future__ import annotations

import math
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import memory
import torch
import training_models
from harness import cpu_clock, settle_allocator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from training_models import BF16, F32, Case, Size

import torchdrop

NONE, STOCK, OURS = "no dropout", "torch.nn", "replaced"
COLUMNS = (NONE, STOCK, OURS)

KEY = "key"
"""What a draw of two 64-bit integers is called: torchdrop's key of a mask."""

IDLE = "key at rate 0"
"""The same of a layer whose rate is 0: it serves no draw of PyTorch's, which makes none there."""

LOSS_APART = {F32: 1e-5, BF16: 1e-2}
GRADIENT_APART = {F32: 1e-3, BF16: 0.1}
"""How far the loss and the gradients of a compiled model may be from the eager model's, as a share.

Some tens of roundings follow each other, of 2^-24 in float32 and of 2^-8 in bfloat16. Gradients of small models were
1e-7 and 6e-3 apart by rounding, and 0.26 and more under other masks.
"""


def is_key(function: Any, result: Any) -> bool:
    """Whether a draw from PyTorch's generator is one of torchdrop's keys.

    `torchdrop.random` draws a key with `random_` on an int64 tensor of two elements; compiled code has an operator of
    torchdrop for that. No dropout of PyTorch's can be meant: it draws with `bernoulli_`, or inside of one operator,
    floating-point numbers, and as many as there are elements. That the model does not draw such integers by itself is
    seen before anything is replaced.
    """
    if function.namespace == "torchdrop":
        return True
    integers = isinstance(result, Tensor) and result.dtype == torch.int64 and result.shape == (2,)
    return function is torch.ops.aten.random_.default and integers


class RandomCalls(TorchDispatchMode):
    """Counts the operators that move PyTorch's default generator, by name.

    The state of the generator is compared before and after each operator, so none is missed, whatever its name. An
    operator that can draw but does not, as attention at a rate of 0, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.idle = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.get_rng_state()
        result = func(*args, **(kwargs or {}))
        if not torch.equal(before, torch.get_rng_state()):
            key = IDLE if self.idle else KEY
            self.counts[key if is_key(func, result) else str(func)] += 1
        return result

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Tells keys of layers at rate 0 from others."""
        idle = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.p == 0]

        def begin(*_: Any) -> None:
            self.idle = True

        def end(*_: Any) -> None:
            self.idle = False

        hooks = [module.register_forward_pre_hook(begin) for module in idle]
        hooks += [module.register_forward_hook(end) for module in idle]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def replaced(model: nn.Module) -> list[str]:
    """Replaces a model's dropout; returns what `replace` says that it did not reach."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [str(entry) for entry in torchdrop.replace(model).unreached]


class Column:
    """A model in one column, in train mode.

    Args:
        case: the model and its data.
        name: which of `COLUMNS`.
    """

    def __init__(self, case: Case, name: str) -> None:
        self.name = name
        self.model, self.inputs = case.made(0.0 if name == NONE else None)
        self.unreached = replaced(self.model) if name == OURS else []
        self.call, self.precision, self.compiled = self.model, F32, False

    def prepare(self, precision: str, compiled: bool) -> float:
        """Sets how steps are made, and makes one, in which a compiled model is compiled. Returns its seconds."""
        torch.compiler.reset()
        self.precision, self.compiled = precision, compiled
        self.call = torch.compile(self.model) if compiled else self.model
        return self.seconds(1)

    def loss(self, call: nn.Module | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == BF16):
            output = (call or self.call)(**self.inputs)
        return output if isinstance(output, Tensor) else output.loss

    def step(self) -> None:
        self.loss().backward()
        self.model.zero_grad(set_to_none=True)

    def seconds(self, count: int) -> float:
        return cpu_clock(self.step, count)

    def observed(self, seed: int, call: nn.Module | None = None) -> tuple[float, Tensor]:
        """The loss and all gradients of a step under this seed."""
        torch.manual_seed(seed)
        loss = self.loss(call)
        loss.backward()
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return loss.item(), torch.cat(gradients)

    def fault(self) -> str | None:
        """What is wrong with steps in this column; None if nothing is.

        Losses and gradients must be finite, equal under two seeds without dropout and different with it. Those of a
        compiled model must be the eager model's under the same seed, unless the model still draws from PyTorch, for
        which the compiler has numbers of its own.
        """
        first, other = self.observed(0), self.observed(1)
        for value, slope in (first, other):
            if not math.isfinite(value):
                return f"a loss of {value}"
            if not bool(slope.isfinite().all()):
                return "gradients that are not finite"
        if self.name == NONE and not self._agree(first, other, exact=not self.compiled):
            return "another step under another seed, without dropout"
        if self.name != NONE and torch.equal(first[1], other[1]):  # losses may be equal where layers start near 0
            return "the same step under two seeds: no dropout"
        if self.compiled and not self._draws_from_torch() and not self._agree(self.observed(0, self.model), first):
            return "compiled, another step than eager under the same seed"
        return None

    def _agree(self, one: tuple[float, Tensor], other: tuple[float, Tensor], exact: bool = False) -> bool:
        if exact:
            return one[0] == other[0] and torch.equal(one[1], other[1])
        losses, gradients = apart(one, other)
        return losses <= LOSS_APART[self.precision] and gradients <= GRADIENT_APART[self.precision]

    def outcome(self) -> float:
        """The loss in eval mode, which all columns must share."""
        self.model.eval()
        with torch.no_grad():
            value = self.loss(self.model).item()
        self.model.train()
        return value

    def draws(self, precision: str) -> dict[str, int]:
        """The random calls of an eager forward in train mode, by name."""
        self.precision = precision
        with RandomCalls() as calls, calls.watching(self.model):
            self.loss(self.model)
        return dict(calls.counts)

    def rest(self) -> list[str]:
        """What `replace` says that it did not reach."""
        return self.unreached

    def _draws_from_torch(self) -> bool:
        return bool(self.draws(self.precision).keys() - {KEY, IDLE})

    def memory(self) -> dict[str, int]:
        """Bytes: the peak of a step beyond what was there before, and what is kept for backward, twice.

        `saved` is what the hooks on saved tensors see, each storage once, without parameters, buffers and data;
        `held` is what PyTorch's allocator has still out while the loss is alive, wherever it is.
        """
        peak = memory.highest(memory.changes(self.step))
        held = sum(memory.changes(self.loss))
        return {"peak": peak, "saved": self._saved(), "held": held}

    def _saved(self) -> int:
        given = [*self.model.parameters(), *self.model.buffers(), *self.inputs.values()]
        own = {x.untyped_storage().data_ptr() for x in given}
        sizes: dict[int, int] = {}

        def pack(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return saved.detach()

        with saved_tensors_hooks(pack, lambda saved: saved):
            self.loss()
        return sum(sizes.values())

    def resident(self) -> int | None:
        """The growth of the process's resident memory in a step; None where it cannot be told."""
        return memory.peak_resident(self.step)


def apart(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> tuple[float, float]:
    """How far losses and gradients are apart, as shares of the first."""
    distance = float((one[1] - other[1]).norm() / one[1].norm())
    return abs(one[0] - other[0]) / abs(one[0]), distance


def serve(pipe: Any, case: str, column: str, size: Size, threads: int) -> None:
    """The life of a process: it makes the column and calls its methods as they are asked for."""
    torch.set_num_threads(threads)
    settle_allocator()
    warnings.simplefilter("ignore")
    made: Column | None = None
    while (asked := pipe.recv()) is not None:
        method, arguments = asked
        try:
            made = made or Column(training_models.found(case, size), column)
            pipe.send((True, getattr(made, method)(*arguments)))
        except Exception as error:  # a model that cannot be made, compiled or replaced is a result too
            text = (str(error).splitlines() or [""])[0][:120]
            pipe.send((False, f"{type(error).__name__}: {text}"))


class ColumnError(Exception):
    """What a column's process said when it could not do what it was asked for."""


class Remote:
    """A column in a process of its own. As a call it is a step."""

    def __init__(self, case: str, column: str, size: Size, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, case, column, size, threads))
        self._process.start()
        other.close()

    def begin(self, method: str, *arguments: Any) -> None:
        with suppress(OSError):  # where the process is gone, `end` says so
            self._pipe.send((method, arguments))

    def end(self) -> Any:
        """What the method returned that was begun last.

        Raises:
            ColumnError: it raised, or the process is gone.
        """
        try:
            fine, value = self._pipe.recv()
        except (EOFError, OSError):
            fine, value = False, "its process has ended"
        if not fine:
            raise ColumnError(value)
        return value

    def ask(self, method: str, *arguments: Any) -> Any:
        self.begin(method, *arguments)
        return self.end()

    def __call__(self) -> object:
        return self.ask("step")

    def close(self) -> None:
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join()


@contextmanager
def remotes(case: str, size: Size, threads: int, columns: Sequence[str] = COLUMNS) -> Iterator[dict[str, Remote]]:
    """A process for each column of a case, which ends with the context."""
    with ExitStack() as stack:
        made = {}
        for column in columns:
            made[column] = Remote(case, column, size, threads)
            stack.callback(made[column].close)
        yield made

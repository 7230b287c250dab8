"""The keep probability of a layer: how it is given, checked, held and turned into a law."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import handle_torch_function

from .. import kernels
from ..kernels.law import ONE, Formula, Law, inverted, law, law_tensor
from ..kernels.masking import COMPUTE_DTYPE, SERVED, WHOLE
from ..ops.operators import Operator
from ..random import check_generator, draw_key
from . import portable
from .exported import switched
from .shard import Cut, apply_to_dtensor, apply_to_whole, is_dtensor
from .torch_state import function_modes, is_compiling, is_usual_view, is_watched, tracing_state, transforms_active

Rate = float | Tensor


class Default(float, enum.Enum):
    """Default rates, told apart from numbers that the caller wrote; members of an enumeration, which compiled code
    knows as constants."""

    P = 0.5
    NO_DROP = 0.0

    def __repr__(self) -> str:
        return float.__repr__(self)


DEFAULT_P = Default.P
"""torch.nn's default rate."""


def read_rate(p: Any, keep_prob: Any) -> tuple[Rate, Rate]:
    """The two views of one rate, (keep_prob, p), from whichever of them was given.

    Raises:
        TypeError: both are given, or neither, or one that is neither a number nor a tensor.
        ValueError: the rate is outside [0, 1] or NaN, or a tensor that is not floating point or wants a gradient.
    """
    if keep_prob is None:
        if p is None:
            raise TypeError("give the rate as p or as keep_prob, got None for both")
        p = 0.5 if p is DEFAULT_P else _checked("p", p)
        return 1.0 - p, p
    if p is not DEFAULT_P and p is not None:
        raise TypeError(f"give the rate as p or as keep_prob, not both: got p={p} and keep_prob={keep_prob}")
    keep_prob = _checked("keep_prob", keep_prob)
    if isinstance(keep_prob, Tensor):
        return keep_prob, 1.0 - keep_prob
    return keep_prob, round(1.0 - keep_prob, 15)


def _checked(name: str, value: Any) -> Rate:
    if isinstance(value, Tensor):
        return _checked_tensor(name, value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    value = float(value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(_outside(name, value))
    return value


def _outside(name: str, value: Any) -> str:
    if name == "p":
        return f"dropout probability has to be between 0 and 1, but got {value}"
    return f"{name} must be in [0, 1], got {value}"


def _checked_tensor(name: str, value: Tensor) -> Tensor:
    if type(value) is not Tensor and is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor, the whole of it on every rank, got a DTensor: pass full_tensor()"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} gets no gradient through a mask: pass {name}.detach()")
    if value.is_cpu and not (is_compiling() or transforms_active()):
        wrong = value[~((value >= 0) & (value <= 1))]
        if wrong.numel():
            raise ValueError(_outside(name, wrong[0].item()))
    return value


def check_input(input: Any, name: str) -> None:
    """Refuses, before anything is drawn, what no kernel takes, or what the forced backend does not.

    Raises:
        TypeError: `input` is no tensor or has another layout than strided.
        RuntimeError: an integer tensor; torch.nn's class and leading text. Or the forced backend cannot serve it.
        NotImplementedError: a complex tensor, or another element type that is not served.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    dtype = input.dtype
    if dtype not in SERVED:
        served = ", ".join(str(d).removeprefix("torch.") for d in COMPUTE_DTYPE)
        if not (dtype.is_floating_point or dtype.is_complex):
            kind = (
                "Bool" if dtype is torch.bool else "Long" if dtype is torch.int64 else str(dtype).removeprefix("torch.")
            )
            raise RuntimeError(
                f"result type Float can't be cast to the desired output type {kind}: {name} takes {served} tensors; "
                "convert the input with .float() first"
            )
        raise NotImplementedError(f"{name} is not implemented for {dtype}: it takes {served} tensors")
    if input.layout is not torch.strided:
        raise TypeError(
            f"{name} takes strided tensors, got the layout {input.layout}: apply it to the tensor of values"
        )
    if kernels._forced is not None:
        kernels.backend_for(input.device, dtype)


def undrawn(input: Any, keep_prob: Rate, inplace: bool) -> Tensor | None:
    """What torch.nn gives for element types that no kernel takes, where there is nothing to draw: the input itself if
    all is kept or it is empty, zeros if all is dropped. None elsewhere."""
    if not isinstance(input, Tensor) or input.dtype in SERVED or isinstance(keep_prob, Tensor):
        return None
    if keep_prob == 1.0 or input.numel() == 0:
        return input
    if keep_prob == 0.0 and not input.is_floating_point():
        zero = torch.zeros((), dtype=input.dtype, device=input.device)
        return input.mul_(zero) if inplace else input * zero
    return None


def check_inplace(input: Tensor) -> None:
    """Refuses what must not be written to, with PyTorch's words, before it is. Views under compilation, where they
    cannot be told, are PyTorch's to refuse.

    Raises:
        RuntimeError: a leaf that wants a gradient, a view of one, one of several views of a tensor, a view that was
            made under other rules of autograd, an inference tensor, or a tensor whose elements share memory.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        is_view = not is_compiling() and input._is_view()
        if is_view and not is_usual_view(input):
            input.mul_(1)  # PyTorch says why it refuses, before it writes
        if input.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        base = input._base if is_view else None
        if base is not None and base.is_leaf and base.requires_grad:
            raise RuntimeError("a view of a leaf Variable that requires grad is being used in an in-place operation.")
    if not is_compiling() and input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed. You can make a clone to get a "
            "normal tensor before doing inplace update."
        )
    if any(stride == 0 and size > 1 for size, stride in zip(input.shape, input.stride(), strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )


def law_for(keep_prob: Rate, formula: Formula, shape: Sequence[int]) -> Law | Tensor:
    """The law of a rate that is a number, or a tensor that broadcasts against a mask of this shape.

    Raises:
        ValueError: it does not broadcast, or would make the mask larger.
    """
    if not isinstance(keep_prob, Tensor):
        if is_compiling():
            # A product is what the compiler makes code of for any number; a number given to torch.full is a constant.
            return switched(law_tensor(torch.ones((), dtype=torch.float64, device="cpu") * keep_prob, formula), formula)
        return law(keep_prob, formula)
    if keep_prob.dim() == 0:
        if keep_prob.is_cpu and not (is_compiling() or transforms_active()) and type(keep_prob) is Tensor:
            return law(keep_prob.item(), formula)
        return switched(law_tensor(keep_prob, formula), formula)
    missing = len(shape) - keep_prob.dim()
    sizes = (1,) * missing + tuple(keep_prob.shape)
    if missing < 0 or any(size != 1 and size != full for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"keep_prob of shape {tuple(keep_prob.shape)} does not broadcast against the mask's shape {tuple(shape)}"
        )
    return switched(law_tensor(keep_prob.reshape(sizes), formula), formula)


def realised(keep_prob: Rate) -> Rate:
    """The keep probability that the threshold really has: within 2**-32 of the nominal one."""
    if isinstance(keep_prob, Tensor) or is_compiling():
        if not isinstance(keep_prob, Tensor):
            keep_prob = torch.as_tensor(keep_prob, dtype=torch.float64, device="cpu")
        return law_tensor(keep_prob)[..., 0] / ONE
    return law(keep_prob).threshold / ONE


class Rated(_DropoutNd):
    """A layer with a rate, in two views: `keep_prob`, the probability of keeping, and torch.nn's `p`.

    Either can be read and set. A number set here reaches a compiled model as the value of a tensor, so it does not
    recompile.
    """

    _formula: Formula = staticmethod(inverted)
    __prepare_scriptable__ = portable.refuse_script

    def __init__(
        self,
        p: Any = DEFAULT_P,
        inplace: bool = False,
        *,
        keep_prob: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super(_DropoutNd, self).__init__()  # of nn.Module, in the form that compiled code enters
        check_generator(generator)
        self.inplace = inplace
        self.generator = generator
        self._hold(*read_rate(p, keep_prob))

    def _hold(self, keep_prob: Rate, p: Rate) -> None:
        self._check_rate(keep_prob)
        # Compiled code makes the law of a layer that is built there when it needs one, from the rate.
        number = None if isinstance(keep_prob, Tensor) or is_compiling() else law(keep_prob, self._formula)
        self._keep_prob, self._p, self._law = keep_prob, p, number
        self._law_tensor = None if number is None else number.tensor()

    def _check_rate(self, keep_prob: Rate) -> None:
        """What a layer demands of its rate beyond [0, 1]."""

    @property
    def keep_prob(self) -> Rate:
        """The probability that an element is kept."""
        return self._keep_prob

    @keep_prob.setter
    def keep_prob(self, value: Any) -> None:
        if value is None:
            raise TypeError("keep_prob must be a number or a tensor, got NoneType")
        self._hold(*read_rate(None, value))

    @property  # type: ignore[override]
    def p(self) -> Rate:
        """The probability that an element is dropped: 1 - keep_prob."""
        return self._p

    @p.setter
    def p(self, value: Any) -> None:
        self._hold(*read_rate(value, None))

    def _law_for(self, shape: Sequence[int]) -> Law | Tensor:
        if self._law_tensor is None:
            return law_for(self._keep_prob, self._formula, shape)
        return switched(self._law_tensor, self._formula) if is_compiling() else self._law  # type: ignore[return-value]

    def extra_repr(self) -> str:
        p = f"<tensor of shape {tuple(self._p.shape)}>" if isinstance(self._p, Tensor) else self._p
        return f"p={p}, inplace={self.inplace}"


class RateOfChild:
    """`keep_prob` and `p` of a module whose rate is that of its child `dropout`, under whose name it is listed."""

    dropout: Rated

    @property
    def keep_prob(self) -> Rate:
        """The probability of keeping: that of `dropout`."""
        return self.dropout.keep_prob

    @keep_prob.setter
    def keep_prob(self, value: Any) -> None:
        self.dropout.keep_prob = value

    @property
    def p(self) -> Rate:
        """The probability of dropping, 1 - keep_prob: that of `dropout`."""
        return self.dropout.p

    @p.setter
    def p(self, value: Any) -> None:
        self.dropout.p = value


def turned_on() -> bool:
    """Whether a function mode wants a layer on that is in eval mode: Monte Carlo inference answers here."""
    return not is_compiling() and function_modes() > 0 and is_watched() and bool(handle_torch_function(turned_on, ()))


def apply(
    operator: Operator,
    input: Tensor,
    law: Law | Tensor,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
    cut: Cut | None = None,
) -> Tensor:
    """A checked `input` under an operator and a law, with a new key. The input itself where nothing is dropped.

    Function modes see the call, so that Monte Carlo inference can put its own key in place of a drawn one.

    Of a DTensor, `shape` is the whole mask's. Of a plain tensor that is a part of a larger one, `cut` says which part.
    """
    if type(input) is not Tensor and is_dtensor(input):
        if inplace:
            check_inplace(input)
        return apply_to_dtensor(apply, operator, input, law, shape, inplace, generator)
    compiling = is_compiling()
    if not compiling and function_modes():
        args = (operator, input, law, shape, inplace, generator)
        if cut is None or (isinstance(law, Law) and law.threshold == ONE):
            return handle_torch_function(apply, (input,), *args)
        if not is_watched():
            return handle_torch_function(apply, (input,), *args, cut)
        return apply_to_whole(apply, *args, cut)
    if inplace:
        check_inplace(input)
    if portable.is_in_onnx_export() if compiling else tracing_state() is not None:
        return portable.apply(operator, input, law, shape, inplace, generator)
    key = new_key(input, law, generator)
    if key is None:
        return input
    return operator(input, key, law, shape, inplace, WHOLE if cut is None else cut.part)


def new_key(input: Tensor, law: Law | Tensor, generator: torch.Generator | None) -> Tensor | None:
    """None where nothing is dropped. A key is drawn then, too: what the layers after this one draw must not depend on
    its rate. Compiled code, which cannot see the rate, does the same. Only vmap, where drawing may be forbidden, is
    spared it."""
    keeps_all = isinstance(law, Law) and law.threshold == ONE
    if keeps_all and transforms_active():
        return None
    key = draw_key(input.device, generator)
    return None if keeps_all else key

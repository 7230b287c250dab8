"""The keep probability of a layer or a call: how it is given, checked, held, and converted to mask parameters."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from ..kernels.mask_params import ONE, Formula, MaskParams, inverted, mask_params, original, params_tensor
from ..kernels.masking import SERVED
from ..random import check_generator
from .exported import switched
from .held_params import HeldParams
from .portable import refuse_script
from .shard import is_dtensor
from .torch_state import is_compiling, transforms_active

Probability = float | Tensor
"""A probability of keeping or of dropping, for all elements or as a tensor that broadcasts against the mask."""


class Default(float, enum.Enum):
    """Default rates, distinct from numbers that the caller wrote. Members of an enumeration are constants in compiled
    code."""

    P = 0.5
    NO_DROP = 0.0

    def __repr__(self) -> str:
        return float.__repr__(self)


DEFAULT_P = Default.P
"""torch.nn's default rate."""


def read_rate(p: Any, keep_prob: Any) -> tuple[Probability, Probability]:
    """Returns one rate in two views, (keep_prob, p), from the one of them that was given.

    Raises:
        TypeError: both are given, or neither, or one that is neither a number nor a tensor.
        ValueError: the rate is outside [0, 1] or NaN, or a tensor that is not floating point or requires a gradient.
    """
    if keep_prob is None:
        if p is None:
            raise TypeError("give the rate as p or as keep_prob, got None for both")
        p = 0.5 if p is DEFAULT_P else _checked("p", p)
        return 1.0 - p, p
    if p is not DEFAULT_P and p is not None:
        raise TypeError(f"give the rate as p or as keep_prob, not both: got p={p} and keep_prob={keep_prob}")
    keep_prob = _checked("keep_prob", keep_prob)
    return keep_prob, 1.0 - keep_prob if isinstance(keep_prob, Tensor) else round(1.0 - keep_prob, 15)


def _checked(name: str, value: Any) -> Probability:
    if isinstance(value, Tensor):
        return _checked_tensor(name, value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    value = float(value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(_range_message(name, value))
    return value


def _range_message(name: str, value: Any) -> str:
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
            raise ValueError(_range_message(name, wrong[0].item()))
    return value


def formula_of(inverted_scale: bool) -> Formula:
    """Returns the formula of inverted dropout, or of the original formulation, which does not scale."""
    return inverted if inverted_scale else original


def params_for(keep_prob: Probability, formula: Formula, shape: Sequence[int]) -> MaskParams | Tensor:
    """Returns the parameters of a rate that is a number, or a tensor that broadcasts against a mask of this shape.

    Raises:
        ValueError: it does not broadcast, or would make the mask larger.
    """
    if not isinstance(keep_prob, Tensor):
        if is_compiling():
            # The compiler's code for a product serves any number; a number given to torch.full becomes a constant.
            return switched(
                params_tensor(torch.ones((), dtype=torch.float64, device="cpu") * keep_prob, formula), formula
            )
        return mask_params(keep_prob, formula)
    if keep_prob.dim() == 0:
        if keep_prob.is_cpu and not (is_compiling() or transforms_active()) and type(keep_prob) is Tensor:
            return mask_params(keep_prob.item(), formula)
        return switched(params_tensor(keep_prob, formula), formula)
    missing = len(shape) - keep_prob.dim()
    sizes = (1,) * missing + tuple(keep_prob.shape)
    if missing < 0 or any(size != 1 and size != full for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"keep_prob of shape {tuple(keep_prob.shape)} does not broadcast against the mask's shape {tuple(shape)}"
        )
    return switched(params_tensor(keep_prob.reshape(sizes), formula), formula)


def realized(keep_prob: Probability) -> Probability:
    """Returns the keep probability that the threshold really has: within 2**-32 of the nominal one."""
    if isinstance(keep_prob, Tensor) or is_compiling():
        if not isinstance(keep_prob, Tensor):
            keep_prob = torch.as_tensor(keep_prob, dtype=torch.float64, device="cpu")
        return params_tensor(keep_prob)[..., 0] / ONE
    return mask_params(keep_prob).threshold / ONE


class Rate:
    """A keep probability that has been checked, with the mask parameters that follow from it.

    A layer holds one and passes it to its function in the place of `p`, so that nothing is read or checked twice, and
    compiled code gets the parameters as a tensor whose values may change, and never looks at the number.

    Attributes:
        keep_prob: the probability of keeping.
        p: the probability of dropping.
        formula: the scaling of kept elements.
        params: the parameters of masks in eager mode; None if they depend on the mask's shape, as for tensors. A
            search that trains many models at once gives a tensor with parameters for each.
    """

    def __init__(
        self,
        keep_prob: Probability,
        p: Probability,
        formula: Formula,
        given: MaskParams | Tensor | None = None,
        given_as_p: bool = False,
    ) -> None:
        self.keep_prob = keep_prob
        self.p = p
        self.formula = formula
        self.params: Any = given
        if given is None and not (isinstance(keep_prob, Tensor) or is_compiling()):
            self.params = mask_params(keep_prob, formula)
        self._held: HeldParams | None = None
        self._given_as_p = given_as_p

    def held(self, layer: Rated) -> Rate:
        """Returns the rate as a layer holds it: with parameters as a tensor, which compiled code takes as an input."""
        # Compiled code makes the parameters of a layer that is built there when it needs one, from the rate.
        if is_compiling() or not isinstance(self.params, MaskParams):
            return self
        rate = self if self._held is None else Rate(self.keep_prob, self.p, self.formula, self.params)
        rate._held = HeldParams(self.params, id(layer), getattr(getattr(layer, "rate", None), "_held", None))
        return rate

    def params_for(self, shape: Sequence[int]) -> MaskParams | Tensor:
        """Returns the parameters for a mask of this shape.

        Raises:
            ValueError: a tensor of rates does not broadcast against it.
        """
        if not is_compiling():
            return params_for(self.keep_prob, self.formula, shape) if self.params is None else self.params
        if self._held is None:
            return params_for(self._exact(), self.formula, shape)
        return switched(self._held.tensor, self.formula)

    def compiled_p(self) -> Probability:
        """Returns the probability of dropping as a tensor, if it is a number that a layer holds."""
        return self.p if self._held is None else 1.0 - self._held.tensor[0] / ONE

    def _exact(self) -> Probability:
        """Returns `keep_prob`, as a tensor where it is a difference: of Python's numbers the compiler of PyTorch before
        2.13 would make a constant."""
        if not self._given_as_p or isinstance(self.p, Tensor):
            return self.keep_prob
        return 1.0 - torch.ones((), dtype=torch.float64, device="cpu") * self.p


Check = Callable[[Probability], None]


def as_rate(p: Any, keep_prob: Any, formula: Formula = inverted, check: Check | None = None) -> Rate:
    """Returns the rate of a call: that of the layer which makes it, or the one that a user gives as p or keep_prob.

    Args:
        p, keep_prob: as a user gives them; a layer gives its `Rate` as p.
        formula: the scaling of kept elements.
        check: raises an error for a keep probability in [0, 1] that the caller does not allow.

    Raises:
        TypeError, ValueError: as `read_rate`.
    """
    if isinstance(p, Rate):
        return p
    as_p = keep_prob is None
    keep_prob, p = read_rate(p, keep_prob)
    if check is not None:
        check(keep_prob)
    return Rate(keep_prob, p, formula, given_as_p=as_p)


def rate_named(name: str, p: Any, keep_prob: Any) -> Any:
    """Returns a rate for `as_rate` from an argument that has torchvision's or timm's name, with their errors.

    Raises:
        TypeError: both are given, or something that is no number.
        ValueError: a number outside [0, 1].
    """
    if isinstance(p, Rate):
        return p
    if p is Default.NO_DROP and keep_prob is None:
        return 0.0
    if keep_prob is not None:
        if p is not None and not isinstance(p, Default):
            raise TypeError(
                f"give the rate as {name} or as keep_prob, not both: got {name}={p} and keep_prob={keep_prob}"
            )
        return None
    if not isinstance(p, (numbers.Real, Tensor)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(p).__name__}")
    if isinstance(p, numbers.Real) and not 0.0 <= p <= 1.0:  # type: ignore[operator]
        raise ValueError(f"drop probability has to be between 0 and 1, but got {p}")
    return p


def check_count(keep_prob: Probability, name: str) -> None:
    """Refuses a rate from which no number of kept elements follows.

    Raises:
        TypeError: it is a tensor.
        ValueError: it is 0.
    """
    if isinstance(keep_prob, Tensor):
        raise TypeError(f"keep_prob must be a number for {name}, which keeps a fixed count of them, got a tensor")
    if keep_prob <= 0.0:
        raise ValueError(f"keep_prob must be in (0, 1] for {name}, got {keep_prob}: at least one must be kept")


def check_leaves_one(keep_prob: Probability, function: str, unit: str) -> None:
    """Raises ValueError if everything would be dropped, as far as that is known."""
    if isinstance(keep_prob, Tensor):
        if not keep_prob.is_cpu or is_compiling() or transforms_active() or not (keep_prob <= 0.0).any():
            return
        keep_prob = 0.0
    if keep_prob <= 0.0:
        raise ValueError(f"keep_prob must be in (0, 1] for {function}, got {keep_prob}: at least one {unit} stays")


def shown(p: Probability) -> str:
    """Returns a rate as a layer's repr shows it."""
    return f"<tensor of shape {tuple(p.shape)}>" if isinstance(p, Tensor) else str(p)


def undrawn(input: Any, rate: Rate, inplace: bool) -> Tensor | None:
    """Returns the output of torch.nn for element types that no kernel takes, if there is nothing to draw: the input
    itself if all is kept or it is empty, zeros if all is dropped. Returns None otherwise."""
    if not isinstance(input, Tensor) or input.dtype in SERVED or isinstance(rate.keep_prob, Tensor):
        return None
    if rate.keep_prob == 1.0 or input.numel() == 0:
        return input
    if rate.keep_prob == 0.0 and not input.is_floating_point():
        zero = torch.zeros((), dtype=input.dtype, device=input.device)
        return input.mul_(zero) if inplace else input * zero
    return None


class Rated(_DropoutNd):
    """A layer with a rate, in two views: `keep_prob`, the probability of keeping, and torch.nn's `p`.

    Either can be read and set. A number set here reaches a compiled model as the value of a tensor, so it does not
    recompile.

    Attributes:
        rate: the checked rate, which the layer's function gets in the place of p.
        generator: the source of keys; None for PyTorch's default generator.
        is_passed: whether the code of the module around the layer only passes its `p` on, to calls that are served.
            Compiled code then gets it as a tensor.
    """

    inplace = False
    is_passed = False
    _formula: Formula = staticmethod(inverted)
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super(_DropoutNd, self).__init__()  # nn.Module's, in the form that compiled code enters
        check_generator(generator)
        self.generator = generator
        self._set(p, keep_prob)

    def __setattr__(self, name: str, value: Any) -> None:
        # Dynamo of PyTorch before 2.13 does not call the setter of a module's property, but it enters this. That of 2.6
        # says that it cannot go on.
        setter = getattr(getattr(type(self), name, None), "fset", None)
        if setter is None:
            super().__setattr__(name, value)
        else:
            setter(self, value)

    def _set(self, p: Any, keep_prob: Any) -> None:
        self.rate: Any = as_rate(p, keep_prob, self._formula, self._check_rate).held(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.rate._held is not None:
            self.rate._held.move(self.rate.params, fn)
        return super()._apply(fn, recurse)

    def _check_rate(self, keep_prob: Probability) -> None:
        """Refuses rates in [0, 1] that the layer cannot have. By default there are none."""

    @property
    def keep_prob(self) -> Probability:
        """The probability that an element is kept."""
        return self.rate.keep_prob

    @keep_prob.setter
    def keep_prob(self, value: Probability) -> None:
        if value is None:
            raise TypeError("keep_prob must be a number or a tensor, got NoneType")
        self._set(None, value)

    @property  # type: ignore[override]
    def p(self) -> Probability:
        """The probability that an element is dropped: 1 - keep_prob."""
        if self.is_passed and self.training and is_compiling():
            return self.rate.compiled_p()
        return self.rate.p

    @p.setter
    def p(self, value: Probability) -> None:
        self._set(value, None)

    def extra_repr(self) -> str:
        return f"p={shown(self.p)}"


class InplaceRated(Rated):
    """A layer with a rate that can write its result into its input."""

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        inplace: bool = False,
        *,
        keep_prob: Probability | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        self.inplace = inplace

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inplace={self.inplace}"


class RateOfChild:
    """`keep_prob` and `p` of a module whose rate is that of its child `dropout`, under whose name it is listed."""

    dropout: Rated

    @property
    def keep_prob(self) -> Probability:
        """The probability of keeping: that of `dropout`."""
        return self.dropout.keep_prob

    @keep_prob.setter
    def keep_prob(self, value: Probability) -> None:
        self.dropout.keep_prob = value

    @property
    def p(self) -> Probability:
        """The probability of dropping, 1 - keep_prob: that of `dropout`."""
        return self.dropout.p

    @p.setter
    def p(self, value: Probability) -> None:
        self.dropout.p = value

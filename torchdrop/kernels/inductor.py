"""Masks inside the kernels that Inductor generates for CUDA.

An operator that Inductor does not know is a kernel of its own, between two others that write and read memory for it.
Here operators are written as expressions for one element, which Inductor puts into the kernel of what comes before and
after them. The masks are the reference's, bit for bit. Values are rounded as in all kernels of Inductor: half types
once for all operations of a kernel, and a product and a sum in one step.

A thread serves several neighbors, for which the compiler computes a common Philox block once. An expression has no
branches, so both halves of the random bits are computed.

On the CPU the operators stay as they are: Inductor does not vectorize unsigned integers there. They also stay where an
expression would not be the reference's, or too long: for parts of masks, several keys or sets of parameters, and
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.torch_inductor import InductorGraph
from .mask_params import ONE
from .reference import SECOND_PLANE

DEVICES = {"cuda"}
"""The types of devices for which operators are written as expressions."""

Value = Any
"""The value of one element, as Inductor has it."""

Node = Any
"""A tensor, as Inductor has it."""

Index = Sequence[Any]
Element = Callable[[Index], Value]

_WORD, _LONG, _REAL = torch.uint32, torch.uint64, torch.float32
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))


def _philox(graph: InductorGraph, low: Value, high: Value, key: Sequence[Value]) -> tuple[Value, ...]:
    """Returns the four words of the Philox block whose number has these words."""
    ops = graph.ops

    def product(word: Value, factor: int) -> tuple[Value, Value]:
        both = ops.mul(ops.to_dtype(word, _LONG), ops.constant(factor, _LONG))
        return _upper_word(graph, both), ops.to_dtype(both, _WORD)

    c0, c1, (k0, k1, c2, c3) = low, high, key
    for _ in range(10):
        (high0, low0), (high2, low2) = product(c0, 0xD2511F53), product(c2, 0xCD9E8D57)
        c0, c1 = ops.bitwise_xor(ops.bitwise_xor(high2, c1), k0), low2
        c2, c3 = ops.bitwise_xor(ops.bitwise_xor(high0, c3), k1), low0
        k0, k1 = ops.add(k0, ops.constant(0x9E3779B9, _WORD)), ops.add(k1, ops.constant(0xBB67AE85, _WORD))
    return c0, c1, c2, c3


def _upper_word(graph: InductorGraph, long: Value) -> Value:
    return graph.ops.to_dtype(graph.ops.bitwise_right_shift(long, graph.ops.constant(32, _LONG)), _WORD)


class _Mask:
    """A mask of one key and one set of parameters for a tensor: expressions for its elements."""

    def __init__(self, graph: InductorGraph, x: Node, key: Node, params: Node, shape: Sequence[Any]) -> None:
        self.graph, self.key, self.params = graph, graph.numbers(key), graph.numbers(params)
        self.place = graph.place(shape)
        self.kind = _WORD if graph.fits(shape, 2**31) else _LONG

    @staticmethod
    def is_possible(
        graph: InductorGraph, x: Node, key: Node, params: Node, shape: Sequence[Any], part: Sequence[Any]
    ) -> bool:
        """Whether it can be an expression in a generated kernel."""
        return (
            x.get_device().type in DEVICES
            and x.get_dtype() in _DTYPES
            and len(key.get_size()) == 1
            and len(params.get_size()) == 1
            and not any(part)
            and graph.broadcasts(shape, x.get_size())
        )

    def random_bits(self, index: Index) -> Value:
        """The random bits of an element, as a word."""
        graph, ops = self.graph, self.graph.ops
        place = ops.index_expr(self.place(index), self.kind)
        block = ops.bitwise_right_shift(place, ops.constant(3, self.kind))
        low, high = ops.to_dtype(block, _WORD), ops.constant(0, _WORD)
        if self.kind is _LONG:
            high = _upper_word(graph, block)
        seed, stream = (ops.to_dtype(self.key(i), _LONG) for i in range(2))
        key = [word for long in (seed, stream) for word in (ops.to_dtype(long, _WORD), _upper_word(graph, long))]
        last = ops.to_dtype(place, _WORD)

        def bit(number: int) -> Value:
            return ops.bitwise_and(ops.bitwise_right_shift(last, number_of(number)), number_of(1))

        def number_of(number: int) -> Value:
            return ops.constant(number, _WORD)

        def either(condition: Value, yes: Value, no: Value) -> Value:
            """Chooses by bits, since Inductor has no promotion of bools with unsigned integers."""
            return ops.bitwise_xor(no, ops.bitwise_and(ops.bitwise_xor(yes, no), ops.sub(number_of(0), condition)))

        def half(high: Value) -> Value:
            a, b, c, d = _philox(graph, low, high, key)
            word = either(bit(2), either(bit(1), d, c), either(bit(1), b, a))
            shift = ops.bitwise_left_shift(bit(0), number_of(4))
            return ops.bitwise_and(ops.bitwise_right_shift(word, shift), number_of(0xFFFF))

        upper, lower = half(high), half(ops.add(high, ops.constant(SECOND_PLANE >> 32, _WORD)))
        return ops.bitwise_or(ops.bitwise_left_shift(upper, ops.constant(16, _WORD)), lower)

    def kept(self, index: Index) -> Value:
        """Whether an element is kept. A threshold that is not a number keeps nothing."""
        ops, below = self.graph.ops, self.params(0)
        least, most = ops.constant(0.0, torch.float64), ops.constant(float(ONE), torch.float64)
        below = ops.where(ops.gt(below, least), ops.where(ops.lt(below, most), below, most), least)
        return ops.lt(ops.to_dtype(self.random_bits(index), torch.int64), ops.to_dtype(below, torch.int64))

    def parameter(self, number: int) -> Value:
        return self.graph.ops.to_dtype(self.params(number), _REAL)

    def scaled(self, value: Value) -> Value:
        return self.graph.ops.mul(value, self.parameter(1))

    def applied(self, value: Value, index: Index, linear: bool = True) -> Value:
        """An element's value under the mask. A shift of 0 is not added: it would change the sign of a zero."""
        ops, zero = self.graph.ops, self.graph.ops.constant(0.0, _REAL)
        scaled, fill = self.scaled(value), zero
        if not linear:
            shift, fill = self.parameter(2), self.parameter(3)
            scaled = ops.where(ops.eq(shift, zero), scaled, ops.add(scaled, shift))
        return ops.where(self.kept(index), scaled, fill)


def masked(
    graph: InductorGraph,
    x: Node,
    key: Node,
    params: Node,
    shape: Sequence[Any],
    part: Sequence[Any] = (),
    linear: bool = False,
) -> Element | None:
    """The operator ``torchdrop::masked`` for one element, or None where it stays an operator."""
    if not _Mask.is_possible(graph, x, key, params, shape, part):
        return None
    mask, value = _Mask(graph, x, key, params, shape), graph.elements(x, _REAL)
    return lambda index: mask.applied(value(index), index, linear)


def dropout_add(
    graph: InductorGraph, x: Node, bias: Node | None, residual: Node, key: Node, params: Node
) -> Element | None:
    """The operator ``torchdrop::dropout_add`` for one element, or None."""
    shape = x.get_size()
    if not _Mask.is_possible(graph, x, key, params, shape, ()):
        return None
    if bias is not None and not graph.broadcasts(bias.get_size(), shape[len(shape) - len(bias.get_size()) :]):
        return None
    ops, mask = graph.ops, _Mask(graph, x, key, params, shape)
    value, beside = graph.elements(x, _REAL), graph.elements(residual, _REAL)
    before = None if bias is None else graph.elements(bias, _REAL)

    def element(index: Index) -> Value:
        whole = value(index) if before is None else ops.add(value(index), before(index))
        return ops.add(beside(index), mask.applied(whole, index))

    return element


def _gelu(graph: InductorGraph, x: Value, tanh: bool) -> tuple[Value, Value]:
    """Returns a and b such that gelu(x) is ``x * a`` and its derivative is ``a + x * b``."""
    ops = graph.ops

    def number(value: float) -> Value:
        return ops.constant(value, _REAL)

    square = ops.mul(x, x)
    if tanh:
        root = math.sqrt(2.0 / math.pi)
        u = ops.mul(ops.mul(x, number(root)), ops.add(number(1.0), ops.mul(square, number(0.044715))))
        t = ops.tanh(u)
        slope = ops.mul(number(0.5 * root), ops.add(number(1.0), ops.mul(square, number(0.134145))))
        return ops.mul(number(0.5), ops.add(number(1.0), t)), ops.mul(slope, ops.sub(number(1.0), ops.mul(t, t)))
    a = ops.mul(number(0.5), ops.add(number(1.0), ops.erf(ops.mul(x, number(math.sqrt(0.5))))))
    return a, ops.mul(ops.exp(ops.mul(number(-0.5), square)), number(1.0 / math.sqrt(2.0 * math.pi)))


def activation_dropout(graph: InductorGraph, x: Node, key: Node, params: Node, activation: str) -> Element | None:
    """The operator ``torchdrop::activation_dropout`` for one element, or None."""
    if not _Mask.is_possible(graph, x, key, params, x.get_size(), ()):
        return None
    ops, mask, value = graph.ops, _Mask(graph, x, key, params, x.get_size()), graph.elements(x, _REAL)

    def element(index: Index) -> Value:
        given = value(index)
        if activation == "relu":
            zero = ops.constant(0.0, _REAL)
            return mask.applied(ops.where(ops.le(given, zero), zero, given), index)
        return mask.applied(ops.mul(given, _gelu(graph, given, activation == "gelu_tanh")[0]), index)

    return element


def activation_dropout_backward(
    graph: InductorGraph, grad: Node, kept: Node, key: Node, params: Node, activation: str
) -> Element | None:
    """The operator ``torchdrop::activation_dropout_backward`` for one element, or None. The rectifier keeps its
    output, which is positive where the gradient passes."""
    if not _Mask.is_possible(graph, grad, key, params, grad.get_size(), ()):
        return None
    ops, mask = graph.ops, _Mask(graph, grad, key, params, grad.get_size())
    given, beside = graph.elements(grad, _REAL), graph.elements(kept, _REAL)

    def element(index: Index) -> Value:
        x = beside(index)
        if activation == "relu":
            zero = ops.constant(0.0, _REAL)
            return ops.where(ops.le(x, zero), zero, mask.scaled(given(index)))
        a, b = _gelu(graph, x, activation == "gelu_tanh")
        return ops.mul(mask.applied(given(index), index), ops.add(a, ops.mul(x, b)))

    return element

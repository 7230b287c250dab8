"""An interpreter of PTX, as far as Triton uses it for the kernels: what a GPU would run, run where there is none.

The threads of a program go in step, those that are furthest behind first. What a GPU would not forgive is an error: an
address outside the tensors that a kernel was given, one that is not a multiple of what is read or written there, an
unknown instruction. The language: NVIDIA, PTX ISA, chapter 9.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Lanes = np.ndarray[Any, Any]
"""A value for each thread."""

WARP = 32
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
_SHARED_BYTES = 2**16


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind.removesuffix("x2").removeprefix("bf"))) if kind != "pred" else 1


def widened(raw: Lanes) -> Lanes:
    """bfloat16 to float32, exactly."""
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(value: Lanes) -> Lanes:
    """float32 to bfloat16: to the nearest, ties to even; not a number is 0x7FFF."""
    raw = np.ascontiguousarray(value).view(np.uint32)
    near = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), 0x7FFF, near).astype(np.uint16)


def decoded(raw: Lanes, kind: str) -> Lanes:
    """What the bits of a register mean under a type."""
    if kind == "pred":
        return raw
    if kind == "bf16":
        return widened(raw)
    table = _SIGNED if kind[0] == "s" else _FLOAT if kind[0] == "f" else _UNSIGNED
    return np.ascontiguousarray(raw).view(table[_bits(kind)])


def encoded(value: Lanes, kind: str) -> Lanes:
    """The bits of a value of this type."""
    if kind == "pred":
        return value.astype(bool)
    if kind == "bf16":
        return rounded(value)
    table = _SIGNED if kind[0] == "s" else _FLOAT if kind[0] == "f" else _UNSIGNED
    return np.ascontiguousarray(value.astype(table[_bits(kind)])).view(_UNSIGNED[_bits(kind)])


class Instruction(NamedTuple):
    guard: str
    negated: bool
    name: str
    operands: tuple[Any, ...]


class Address(NamedTuple):
    base: str
    offset: int


def _operand(text: str) -> Any:
    text = text.strip()
    if text[0] == "{":
        return [one.strip() for one in text[1:-1].split(",")]
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or 0))
    return text.split("|") if "|" in text else text


class Code:
    """A kernel's instructions."""

    def __init__(self, text: str) -> None:
        body = text[text.index("\n{") :]
        self.parameters = re.findall(r"\.param \.(\w+)[^,)]*?(\w+_param_\d+)", text[: text.index("\n{")])
        self.threads = int(re.search(r"\.reqntid (\d+)", text).group(1))  # type: ignore[union-attr]
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        for line in body.splitlines():
            for part in line.split("//")[0].split(";"):
                statement = part.strip().lstrip("{ ")
                if statement.endswith(":"):
                    self.labels[statement[:-1]] = len(self.instructions)
                elif statement and statement[0] not in '.}"':
                    self.instructions.append(self._parsed(statement))

    @staticmethod
    def _parsed(line: str) -> Instruction:
        guard = re.match(r"@(!?)(%p\d+)\s+", line)
        name, _, rest = line[guard.end() if guard else 0 :].partition(" ")
        name, tab, more = name.partition("\t")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", more + " " + rest if tab else rest)
        return Instruction(
            guard.group(2) if guard else "", bool(guard and guard.group(1)), name, tuple(map(_operand, operands))
        )


class Memory:
    """The bytes of several tensors, found by address."""

    def __init__(self, regions: Sequence[tuple[int, Lanes]]) -> None:
        self.regions = regions

    def _places(self, addresses: Lanes, size: int) -> tuple[Lanes, Lanes]:
        assert not (addresses % np.uint64(size)).any(), f"an address is no multiple of {size}"
        first = int(addresses[0])
        for base, content in self.regions:
            if base <= first < base + content.size:
                places = addresses.astype(np.int64) - base
                assert (places >= 0).all(), "an address before the tensor"
                assert (places + size <= content.size).all(), "an address behind the tensor"
                return content, places[:, None] + np.arange(size)
        raise AssertionError(f"the address {first:#x} is in no tensor")

    def read(self, addresses: Lanes, size: int) -> Lanes:
        content, places = self._places(addresses, size)
        return content[places]

    def write(self, addresses: Lanes, values: Lanes) -> None:
        content, places = self._places(addresses, values.shape[1])
        content[places] = values


class Program:
    """One program of a kernel's grid."""

    def __init__(self, code: Code, parameters: dict[str, Lanes], memory: Memory, index: int) -> None:
        self.code, self.parameters, self.memory = code, parameters, memory
        self.shared = Memory([(0, np.zeros(_SHARED_BYTES, np.uint8))])
        self.registers: dict[str, Lanes] = {}
        lanes = np.arange(code.threads, dtype=np.uint32)
        self.special = {"%tid.x": lanes, "%ctaid.x": np.full_like(lanes, index), "global_smem": np.zeros_like(lanes)}
        self.active = np.ones(code.threads, bool)

    def run(self) -> None:
        threads, code = self.code.threads, self.code.instructions
        at, alive = np.zeros(threads, np.int64), np.ones(threads, bool)
        while alive.any():
            here = int(at[alive].min())
            group = alive & (at == here)
            guard, negated, name, operands = code[here]
            self.active = group & (self.raw(guard, 1) ^ negated) if guard else group
            at[group] = here + 1
            operation, *modes = name.split(".")
            if operation == "bra":
                at[self.active] = self.code.labels[operands[0]]
            elif operation == "ret":
                alive &= ~self.active
            elif operation != "bar" and self.active.any():
                OPERATIONS[operation](self, modes, *operands)

    def raw(self, operand: str, bits: int) -> Lanes:
        """The bits of a register or constant."""
        if operand in self.registers:
            return self.registers[operand]
        if operand in self.special:
            return self.special[operand]
        assert operand[0] != "%", f"{operand} is read before it is written"
        number = int(operand[2:], 16) if operand[:2] in ("0f", "0d") else int(operand.rstrip("U"), 0)
        return np.full(self.code.threads, number % 2**bits, _UNSIGNED[bits])

    def value(self, operand: str, kind: str) -> Lanes:
        return decoded(self.raw(operand, _bits(kind)), kind)

    def store(self, register: str, raw: Lanes) -> None:
        if register == "_":
            return
        before = self.registers.get(register)
        self.registers[register] = raw if before is None else np.where(self.active, raw, before)

    def result(self, register: str, value: Lanes, kind: str) -> None:
        self.store(register, encoded(value, kind))


def _width_of(register: str) -> int:
    return {"s": 16, "d": 64}.get(register[2], 32)


def _move(p: Program, modes: list[str], to: Any, source: Any) -> None:
    bits = _bits(modes[0])
    if isinstance(to, list):
        whole, part = p.raw(source, bits), bits // len(to)
        for i, register in enumerate(to):
            p.store(register, (whole >> _UNSIGNED[bits](part * i)).astype(_UNSIGNED[part]))
    elif isinstance(source, list):
        part = bits // len(source)
        halves = [p.raw(one, part).astype(_UNSIGNED[bits]) << _UNSIGNED[bits](part * i) for i, one in enumerate(source)]
        p.store(to, np.bitwise_or.reduce(halves))
    else:
        p.store(to, p.raw(source, bits))


def _convert(p: Program, modes: list[str], to: str, *sources: str) -> None:
    *how, wanted, given = (mode for mode in modes if mode != "ftz")
    values = [p.value(source, given) for source in sources]
    assert how in ([], ["rn"], ["rni"], ["rzi"], ["sat"])
    if how == ["sat"]:
        values = [np.clip(v, 0.0, 1.0) for v in values]
    if how in (["rni"], ["rzi"]):
        values = [np.rint(v) if how == ["rni"] else np.trunc(v) for v in values]
    if wanted in ("bf16x2", "f16x2"):
        upper, lower = (encoded(v, wanted[:-2]).astype(np.uint32) for v in values)
        p.store(to, upper << np.uint32(16) | lower)
    else:
        assert not (given[0] == "f" and wanted[0] in "su") or how
        p.result(to, values[0], wanted)


def _shift(p: Program, modes: list[str], to: str, source: str, by: str, left: bool) -> None:
    kind = modes[0]
    value, amount = p.value(source, kind), p.raw(by, 32)
    most = _bits(kind) - 1
    by_less = np.minimum(amount, most).astype(value.dtype)
    shifted = value << by_less if left else value >> by_less
    p.result(to, np.where(amount > most, 0 if left or kind[0] != "s" else shifted, shifted).astype(value.dtype), kind)


def _product(p: Program, modes: list[str], to: str, *sources: str) -> None:
    mode, kind = modes[0], modes[-1]
    if mode == "hi":
        assert kind in ("u32", "s32")
        wide = np.dtype(np.uint64 if kind == "u32" else np.int64)
        a, b = (p.value(one, kind).astype(wide) for one in sources)
        p.result(to, a * b >> wide.type(32), kind)
        return
    if mode == "wide":
        kind = f"{kind[0]}{2 * _bits(kind)}"
        a, b = (p.value(one, modes[-1]).astype(p.value("0", kind).dtype) for one in sources[:2])
    else:
        assert mode in ("lo", "rn") or modes == [kind]  # without a word ptxas may fuse it with an addition
        a, b = p.value(sources[0], kind), p.value(sources[1], kind)
    p.result(to, a * b + p.value(sources[2], kind) if len(sources) > 2 else a * b, kind)


def _fused(p: Program, modes: list[str], to: str, *sources: str) -> None:
    """Of float32 rounded once, almost always; of float64 twice."""
    a, b, c = (p.value(one, modes[-1]).astype(np.float64) for one in sources)
    p.result(to, a * b + c, modes[-1])


def _quotient(p: Program, modes: list[str], to: str, a: str, b: str, rest: bool) -> None:
    x, y = p.value(a, modes[-1]), p.value(b, modes[-1])
    if modes[-1][0] == "f":
        p.result(to, x / y, modes[-1])
        return
    assert y[p.active].all(), "a division by zero"
    y = np.where(p.active, y, 1).astype(y.dtype)
    whole = (np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)).astype(x.dtype)
    p.result(to, x - whole * y if rest else whole, modes[-1])


COMPARISONS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b), "neu": np.not_equal,
    "geu": lambda a, b: ~(a < b), "gtu": lambda a, b: ~(a <= b), "leu": lambda a, b: ~(a > b),
    "ltu": lambda a, b: ~(a >= b),
}  # fmt: skip


def _compare(p: Program, modes: list[str], to: Any, a: str, b: str) -> None:
    compared, kind = COMPARISONS[modes[0]], modes[-1]
    assert len(modes) == 2
    if kind.endswith("x2"):
        for register, by in zip(to, (0, 16), strict=True):
            halves = [decoded((p.raw(s, 32) >> np.uint32(by)).astype(np.uint16), kind[:-2]) for s in (a, b)]
            p.store(register, compared(*halves))
    else:
        p.store(to, compared(p.value(a, kind), p.value(b, kind)))


def _extract(p: Program, modes: list[str], to: str, source: str, first: str, count: str) -> None:
    bits, width = _bits(modes[0]), int(count)
    raw = p.raw(source, bits) >> _UNSIGNED[bits](int(first)) & _UNSIGNED[bits](2**width - 1)
    sign = (raw >> _UNSIGNED[bits](width - 1) & _UNSIGNED[bits](1)) if modes[0][0] == "s" else np.zeros_like(raw)
    p.store(to, np.where(sign != 0, raw | _UNSIGNED[bits](2**bits - 2**width), raw))


def _permute(p: Program, modes: list[str], to: str, a: str, b: str, selector: str) -> None:
    assert modes == ["b32"]
    both = p.raw(a, 32).astype(np.uint64) | p.raw(b, 32).astype(np.uint64) << np.uint64(32)
    chosen, found = p.raw(selector, 32), np.zeros(p.code.threads, np.uint64)
    for i in range(4):
        nibble = (chosen >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(nibble > 7, np.where(byte > 127, 255, 0), byte).astype(np.uint64)
        found |= byte << np.uint64(8 * i)
    p.store(to, found.astype(np.uint32))


def _reduce(p: Program, modes: list[str], to: str, source: str, members: str) -> None:
    assert modes == ["sync", "max", "u32"]
    most = np.where(p.active, p.raw(source, 32), 0).reshape(-1, WARP).max(1)
    p.store(to, np.repeat(most, WARP).astype(np.uint32))


def _shuffle(p: Program, modes: list[str], to: str, source: str, lane: str, clamp: str, members: str) -> None:
    assert clamp == "31"
    own = np.arange(p.code.threads)
    other = p.raw(lane, 32).astype(np.int64) % WARP
    other = own ^ other if modes[1] == "bfly" else own // WARP * WARP + other
    assert modes[1] in ("bfly", "idx")
    assert p.active[other][p.active].all(), "a thread that is elsewhere is asked"
    p.store(to, p.raw(source, 32)[other])


def _addresses(p: Program, at: Address) -> Lanes:
    return (p.raw(at.base, 64).astype(np.int64) + at.offset).astype(np.uint64)[p.active]


def _space(p: Program, modes: list[str]) -> Memory:
    return {"global": p.memory, "shared": p.shared}[modes[0].removesuffix("::cta")]


def _load(p: Program, modes: list[str], to: Any, at: Address) -> None:
    if modes[0] == "param":
        p.store(to, p.parameters[at.base])
        return
    registers, bits = to if isinstance(to, list) else [to], _bits(modes[-1])
    assert len(registers) == (int(modes[1][1:]) if modes[1][0] == "v" else 1)
    found = _space(p, modes).read(_addresses(p, at), bits // 8 * len(registers)).view(_UNSIGNED[bits])
    for register, column in zip(registers, found.T, strict=True):
        whole = np.zeros(p.code.threads, _UNSIGNED[_width_of(register)])
        whole[p.active] = column
        p.store(register, whole)


def _save(p: Program, modes: list[str], at: Address, source: Any) -> None:
    registers, bits = source if isinstance(source, list) else [source], _bits(modes[-1])
    assert len(registers) == (int(modes[1][1:]) if modes[1][0] == "v" else 1)
    columns = [p.raw(register, bits)[p.active].astype(_UNSIGNED[bits]) for register in registers]
    _space(p, modes).write(_addresses(p, at), np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8))


def _save_matrices(p: Program, modes: list[str], at: Address, registers: list[str]) -> None:
    """Thread t of a warp holds two neighbors of row t // 4; the address of row r of matrix i is thread 8 i + r's."""
    assert modes[:4] == ["sync", "aligned", "m8n8", f"x{len(registers)}"]
    assert p.active.all()
    addresses = (p.raw(at.base, 32).astype(np.uint64) + np.uint64(at.offset)).reshape(-1, WARP)
    for i, register in enumerate(registers):
        rows = p.raw(register, 32).reshape(-1, 8, 4).view(np.uint8)
        p.shared.write(addresses[:, 8 * i : 8 * i + 8].reshape(-1), rows.reshape(-1, 16))


def _of(function: Callable[..., Lanes]) -> Callable[..., None]:
    """An operation whose operands and result have the type that its name ends with."""

    def operation(p: Program, modes: list[str], to: str, *sources: str) -> None:
        p.result(to, function(*[p.value(source, modes[-1]) for source in sources]), modes[-1])

    return operation


def _choose(p: Program, modes: list[str], to: str, a: str, b: str, condition: str) -> None:
    bits = _bits(modes[0])
    p.store(to, np.where(p.raw(condition, 1), p.raw(a, bits), p.raw(b, bits)))


OPERATIONS: dict[str, Callable[..., None]] = {
    "mov": _move, "cvt": _convert, "selp": _choose, "setp": _compare, "ld": _load, "st": _save,
    "xor": _of(np.bitwise_xor), "or": _of(np.bitwise_or), "and": _of(np.bitwise_and), "not": _of(np.invert),
    "add": _of(np.add), "sub": _of(np.subtract), "neg": _of(np.negative), "max": _of(np.fmax), "min": _of(np.fmin),
    "shl": lambda *a: _shift(*a, left=True), "shr": lambda *a: _shift(*a, left=False),
    "mul": _product, "mad": _product, "fma": _fused, "abs": _of(np.abs), "ex2": _of(np.exp2),
    "div": lambda *a: _quotient(*a, rest=False), "rem": lambda *a: _quotient(*a, rest=True),
    "bfe": _extract, "prmt": _permute, "redux": _reduce, "shfl": _shuffle, "stmatrix": _save_matrices,
}  # fmt: skip


def launch(text: str, programs: int, arguments: Sequence[tuple[str, Any]]) -> None:
    """Runs a kernel on tensors of the CPU.

    Args:
        text: the kernel in PTX.
        programs: the size of the grid.
        arguments: for each parameter its type, as Triton names it, and a value. Scratch memory, for which Triton adds
            parameters, is not there.
    """
    code, regions = Code(text), []
    values: list[Lanes] = []
    for kind, value in arguments:
        if kind[0] == "*":
            regions.append((value.data_ptr(), _bytes(value)))
            values.append(np.full(code.threads, value.data_ptr(), np.uint64))
        else:
            kind = kind.replace("fp", "f").replace("i", "s")
            values.append(encoded(np.full(code.threads, value), kind))
    assert 0 <= len(code.parameters) - len(values) <= 2
    values += [np.zeros(code.threads, np.uint64)] * (len(code.parameters) - len(values))
    parameters = {}
    for (kind, name), value in zip(code.parameters, values, strict=True):
        assert _bits(kind) == 8 * value.itemsize, f"the parameter {name} is a {kind}"
        parameters[name] = value
    memory = Memory(regions)
    with np.errstate(all="ignore"):
        for index in range(programs):
            Program(code, parameters, memory, index).run()


def _bytes(tensor: Any) -> Lanes:
    """A tensor's memory, to be read and written."""
    import ctypes

    size = tensor.numel() * tensor.element_size()
    return np.frombuffer((ctypes.c_uint8 * size).from_address(tensor.data_ptr()), np.uint8)

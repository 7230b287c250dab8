"""Compiles the C kernels for another processor, makes thousands of calls there, and compares them with the reference.

python -m tests.kernels.replay                                        64-bit Arm, by Debian's gcc-aarch64-linux-gnu and
                                                                      qemu-user
python -m tests.kernels.replay s390x-linux-gnu-gcc qemu-s390x         another compiler and emulator
python -m tests.kernels.replay cc                                     this machine

The expected outputs come from torchdrop/kernels/reference.py and from the formulas in csrc/entry_points.h. Bytes on
both sides of an output must stay as they were. A NaN must be a NaN, of whatever bits.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests import ROOT
from torchdrop.kernels import reference
from torchdrop.kernels.mask_params import ONE, MaskParams, alpha, inverted, mask_params
from torchdrop.kernels.masking import COMPUTE_DTYPE, MaskSlice, masked_values
from torchdrop.kernels.native import ELEMENT_TYPES, Operation

SOURCES = [ROOT / "tests" / "kernels" / "replay.c", ROOT / "torchdrop" / "kernels" / "csrc" / "dropout.c"]
ROWS, ROW, GROUPS, FUSED, STRATIFIED, SELECT, PHILOX = range(7)
NUMBERS, BUFFERS = 9, 8
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, -3e-8, 6e4, -7e4, 3e38, 1e-300]
LENGTHS = [1, 2, 3, 7, 8, 9, 31, 63, 64, 65, 129, 255, 256, 257, 263, 511, 700, 1023]
LARGE = 2 * 16384 + 77
"""So many elements are divided among threads."""

DTYPES = list(ELEMENT_TYPES)
RATES = [0.0, 2.0**-32, 1e-6, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1 - 2.0**-32, 1.0]


class Call(NamedTuple):
    """A call and what must be in its output afterwards."""

    function: int
    numbers: list[int]
    inputs: list[Tensor | None]
    """The buffers behind the output."""
    expected: Tensor
    before: Tensor | None = None
    """What the output holds before the call, if it is not overwritten as a whole."""


class Draw:
    """Everything that is drawn for calls, from one generator."""

    def __init__(self, seed: int) -> None:
        self.numpy = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        """Returns an integer from low to high, both included."""
        return int(self.numpy.integers(low, high + 1))

    def one_of(self, values: list[int]) -> int:
        return values[self.integer(0, len(values) - 1)]

    def keys(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.numpy.integers(-(2**63), 2**63, (*shape, 2), dtype=np.int64))

    def values(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Returns normal variates, some of which are replaced by zeros, infinities, NaNs, tiny and large numbers."""
        x = torch.from_numpy(self.numpy.standard_normal(shape))
        special = torch.from_numpy(self.numpy.choice(SPECIAL, shape))
        return torch.where(torch.from_numpy(self.numpy.random(shape) < 0.1), special, x).to(dtype)

    def params(self, key: Tensor, start: int = 0) -> MaskParams:
        """Returns parameters of any rate, or with a threshold that is next to the random bits of an element."""
        which = self.integer(0, len(RATES) + 3)
        formula = inverted if self.integer(0, 2) else alpha
        if which < len(RATES):
            return mask_params(RATES[which], formula if 0.01 < RATES[which] < 0.99 else inverted)
        bits = int(reference.random_bits((1,), key.reshape(-1, 2)[0], MaskSlice(start)))
        near = min(max(bits + which - len(RATES) - 1, 1), ONE - 1)
        scale, shift, fill = formula(max(near, ONE // 8) / ONE)
        return MaskParams(near, scale, shift, fill)


def kept(key: Tensor, params: list[MaskParams], part: MaskSlice, rows: int, length: int) -> Tensor:
    """Returns the mask of a key's rows, each with its own parameters, from the reference."""
    bits = reference.random_bits((rows * length,), key, part).reshape(rows, length)
    return bits < torch.tensor([p.threshold for p in params]).unsqueeze(-1)


def dropped(x: Tensor, mask: Tensor, params: list[MaskParams]) -> Tensor:
    """Applies TD_DROPOUT's formula to rows, each with its own parameters."""
    return torch.stack([masked_values(row, m, p).to(x.dtype) for row, m, p in zip(x, mask, params, strict=True)])


def relu_dropped(x: Tensor, mask: Tensor, params: list[MaskParams]) -> Tensor:
    scaled = torch.stack([scaled_by(row, p) for row, p in zip(x, params, strict=True)])
    return torch.where(mask & ~(x <= 0), scaled, 0).to(x.dtype)


def scaled_by(x: Tensor, params: MaskParams) -> Tensor:
    return x.to(COMPUTE_DTYPE[x.dtype]) * params.scale


def numbers_of(params: list[MaskParams]) -> Tensor:
    return torch.stack([p.tensor() for p in params])


def rows(draw: Draw, large: bool) -> Call:
    operation = Operation(draw.one_of([0, 1, 2, 3, 4]))
    dtype, key_count, per_key = draw.one_of(DTYPES), draw.integer(1, 3), draw.integer(1, 3)
    length = LARGE // (key_count * per_key) + 1 if large else draw.one_of(LENGTHS)
    pitch, start = length + draw.integer(0, 9), draw.one_of([0, 1, 5, 8, 1001, 2**33 + 3, 2**40])
    part, keys, count = MaskSlice(start, length, pitch), draw.keys(key_count), key_count * per_key
    step = draw.one_of([0, 4])
    params = [draw.params(keys, start)] * count if step == 0 else [draw.params(keys, start) for _ in range(count)]
    x: Tensor | None = None
    if operation == Operation.RANDOM_BITS:
        expected = reference.random_bits((per_key * length,), keys, part)
    elif operation == Operation.STANDARD_NORMAL:
        expected = reference.standard_normal((per_key * length,), keys, part)
    else:
        masks = [kept(k, params[i * per_key : (i + 1) * per_key], part, per_key, length) for i, k in enumerate(keys)]
        mask, x = torch.cat(masks), draw.values(dtype, count, length)
        if operation == Operation.KEEP_MASK:
            expected, x = mask, None
        else:
            expected = (dropped if operation == Operation.DROPOUT else relu_dropped)(x, mask, params)
    numbers = [operation, ELEMENT_TYPES[dtype], count, length, per_key, start, pitch, step, draw.integer(1, 4)]
    return Call(ROWS, numbers, [x, keys, numbers_of(params)], expected)


def row(draw: Draw, large: bool) -> Call:
    operation, dtype, key = Operation(draw.one_of([0, 1])), draw.one_of(DTYPES), draw.keys()
    x, params = draw.values(dtype, 1, LARGE if large else draw.one_of(LENGTHS)), [draw.params(key)]
    mask = kept(key, params, MaskSlice(), 1, x.numel())
    expected = (dropped if operation == Operation.DROPOUT else relu_dropped)(x, mask, params)
    numbers = [operation, ELEMENT_TYPES[dtype], x.numel(), draw.integer(1, 4)]
    return Call(ROW, numbers, [x, key, numbers_of(params)], expected)


def groups(draw: Draw, large: bool) -> Call:
    dtype, key, count = draw.one_of(DTYPES), draw.keys(), draw.one_of(LENGTHS)
    x = draw.values(dtype, count, LARGE // count + 1 if large else draw.one_of([1, 2, 5, 16, 130]))
    params = draw.params(key)
    mask = kept(key, [params], MaskSlice(), 1, count).T
    numbers = [ELEMENT_TYPES[dtype], count, x.shape[1], draw.integer(1, 4)]
    return Call(GROUPS, numbers, [x, key, params.tensor()], masked_values(x, mask, params).to(dtype))


def fused(draw: Draw, large: bool) -> Call:
    operation = Operation(draw.one_of([Operation.DROPOUT_ADD, Operation.RELU_DROPOUT_BACKWARD]))
    dtype, key, n = draw.one_of(DTYPES), draw.keys(), LARGE if large else draw.one_of(LENGTHS)
    wide, params = COMPUTE_DTYPE[dtype], draw.params(key)
    x, other, bias, columns = draw.values(dtype, n), draw.values(dtype, n), None, 1
    if operation == Operation.RELU_DROPOUT_BACKWARD:
        expected = torch.where(~(other <= 0), scaled_by(x, params), 0).to(dtype)
    else:
        total = x.to(wide)
        if draw.integer(0, 1):
            columns = draw.one_of([1, 3, 8, 100, 300])
            bias = draw.values(dtype, columns)
            total = total + bias.to(wide).repeat(n // columns + 1)[:n]
        mask = kept(key, [params], MaskSlice(), 1, n)[0]
        expected = (other.to(wide) + torch.where(mask, total * params.scale, 0)).to(dtype)
    numbers = [operation, ELEMENT_TYPES[dtype], columns, n, draw.integer(1, 4)]
    return Call(FUSED, numbers, [x, key, params.tensor(), bias, other], expected)


def stratified(draw: Draw, large: bool) -> Call:
    samples, count, family = draw.integer(1, 4), draw.integer(1, 3), draw.one_of([1, 2, 5, 24])
    length = LARGE // count if large else draw.one_of(LENGTHS)
    shifts, choices = draw.keys(count), draw.keys(count)
    offsets = torch.from_numpy(draw.numpy.integers(0, ONE, (samples, family)))
    params = draw.params(shifts)
    first, chosen = (reference.random_bits((length,), keys) for keys in (shifts, choices))
    number = (first + offsets[:, chosen * family >> 32]) % ONE
    numbers = [samples, count, length, family, draw.integer(1, 4)]
    return Call(STRATIFIED, numbers, [shifts, choices, params.tensor(), as_words(offsets)], number < params.threshold)


def as_words(numbers: Tensor) -> Tensor:
    """Returns 32-bit unsigned numbers as the int32 of the same bits."""
    return torch.where(numbers >= 2**31, numbers - ONE, numbers).to(torch.int32)


def select(draw: Draw, large: bool) -> Call:
    dtype, dims = draw.one_of(DTYPES), draw.integer(1, 4)
    sizes = [LARGE // 100 + 1, 100] if large else [draw.integer(1, 7) for _ in range(dims - 1)] + [draw.one_of(LENGTHS)]
    out, x, mask = (arranged(draw, sizes) for _ in range(3))
    before, values = draw.values(dtype, extent(out)), draw.values(dtype, extent(x))
    bytes_of_mask = torch.from_numpy(draw.numpy.integers(0, 2, extent(mask), dtype=np.uint8))
    if draw.integer(0, 1):
        mask = [(size, 0 if draw.integer(0, 1) else step) for size, step in mask]
    params = draw.params(draw.keys())
    expected = before.clone()
    given, drawn = view(values, x), view(bytes_of_mask, mask) != 0
    view(expected, out).copy_(masked_values(given, drawn, params))
    strides = [torch.tensor([step for _, step in layout]) for layout in (out, x, mask)]
    numbers = [ELEMENT_TYPES[dtype], len(sizes), draw.integer(1, 4)]
    inputs = [values, bytes_of_mask, params.tensor(), torch.tensor(sizes), *strides]
    return Call(SELECT, numbers, inputs, expected, before)


def arranged(draw: Draw, sizes: list[int]) -> list[tuple[int, int]]:
    """Returns sizes and strides of a tensor whose dimensions lie in any order in memory, maybe with gaps."""
    steps, step = [0] * len(sizes), draw.integer(1, 2)
    for dim in draw.numpy.permutation(len(sizes)) if draw.integer(0, 1) else reversed(range(len(sizes))):
        steps[dim] = step
        step *= sizes[dim]
    return list(zip(sizes, steps, strict=True))


def extent(layout: list[tuple[int, int]]) -> int:
    return 1 + sum((size - 1) * step for size, step in layout)


def view(values: Tensor, layout: list[tuple[int, int]]) -> Tensor:
    return values.as_strided([size for size, _ in layout], [step for _, step in layout])


def philox(draw: Draw, large: bool) -> Call:
    key, block = draw.keys(), draw.integer(-(2**63), 2**63 - 1)
    words = torch.stack(reference.philox(torch.tensor(block), key))
    return Call(PHILOX, [block], [key], as_words(words))


KINDS = {"rows": (rows, 1500), "row": (row, 500), "groups": (groups, 400), "fused": (fused, 600),
         "stratified": (stratified, 300), "select": (select, 600), "philox": (philox, 100)}  # fmt: skip
ALIGNED = {"rows": {2, 3}, "row": {3}, "groups": {3}, "fused": {3}, "stratified": {1, 2, 3, 4},
           "select": {3, 4, 5, 6, 7}, "philox": {0, 1}}  # fmt: skip
"""The buffers of each function whose type promises that they are aligned."""


def calls() -> Iterator[tuple[str, Call]]:
    draw = Draw(20260101)
    for name, (make, count) in KINDS.items():
        for number in range(count):
            yield name, make(draw, large=number % 50 == 0)


def bytes_of(values: Tensor, order: str) -> bytes:
    bits = values.contiguous().view(BITS[values.element_size()]).numpy()
    return bits.astype(bits.dtype.newbyteorder(order)).tobytes()


def written(name: str, call: Call, order: str, draw: Draw) -> bytes:
    """Returns a call as replay.c reads it, with buffers at odd addresses where their types allow it."""
    whole = bytes_of(torch.zeros_like(call.expected) if call.before is None else call.before, order)
    buffers = [whole, *[None if one is None else bytes_of(one, order) for one in call.inputs]]
    buffers += [None] * (BUFFERS - len(buffers))
    numbers = [call.function, *call.numbers, *[0] * (NUMBERS - len(call.numbers))]
    parts = [np.array(numbers, dtype=f"{order}i8").tobytes()]
    for place, buffer in enumerate(buffers):
        distance = 0 if place in ALIGNED[name] else draw.integer(0, 15)
        parts.append(np.array([-1 if buffer is None else len(buffer), distance], dtype=f"{order}i8").tobytes())
        parts.append(buffer or b"")
    return b"".join(parts)


def build(compiler: str, folder: Path) -> Path:
    """Compiles with the flags of setup.py, and everything that is needed into one file."""
    setup = ast.parse((ROOT / "setup.py").read_text())
    (flags,) = (n.value for n in setup.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "FLAGS")
    program = folder / "replay.exe"  # Windows asks for the suffix
    command = [compiler, *ast.literal_eval(flags), "-fopenmp", "-static", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{SOURCES[1].parent}", *map(str, SOURCES), "-o", str(program), "-lm"]
    subprocess.run(command, check=True)
    return program


def byte_order(compiler: str) -> str:
    macros = subprocess.run(
        [compiler, "-dM", "-E", "-xc", "/dev/null"], check=True, capture_output=True, text=True
    ).stdout
    return ">" if "#define __BYTE_ORDER__ __ORDER_BIG_ENDIAN__" in macros else "<"


def is_same(output: bytes, expected: Tensor, order: str) -> bool:
    bits = np.frombuffer(output, dtype=f"{order}i{expected.element_size()}")
    got = torch.from_numpy(bits.astype(bits.dtype.newbyteorder("=")))
    wanted = expected.contiguous().view(BITS[expected.element_size()]).flatten()
    same = got == wanted.view(got.dtype)
    if expected.is_floating_point():
        same |= got.view(expected.dtype).isnan() & expected.flatten().isnan()
    return bool(same.all())


def main(arguments: list[str]) -> int:
    compiler, *emulator = arguments or ["aarch64-linux-gnu-gcc", "qemu-aarch64"]
    order, draw, made = byte_order(compiler), Draw(1), list(calls())
    with tempfile.TemporaryDirectory() as folder:
        program = build(compiler, Path(folder))
        sent = b"".join(written(name, call, order, draw) for name, call in made)
        run = subprocess.run([*emulator, str(program)], input=sent, stdout=subprocess.PIPE, check=True)
    compared: Counter[str] = Counter()
    wrong, at = [], 0
    for name, call in made:
        size = call.expected.numel() * call.expected.element_size()
        output, result = run.stdout[at : at + size], run.stdout[at + size : at + size + 8]
        at += size + 8
        compared[name] += size
        if result != bytes(8) or not is_same(output, call.expected, order):
            wrong.append(f"{name}{call.numbers}, {call.expected.dtype}")
    for name, (_, count) in KINDS.items():
        print(f"{name}: {count} calls, {compared[name]:,} bytes")
    print(f"{len(made)} calls, {compared.total():,} bytes compared, {len(wrong)} calls with another output")
    print("\n".join(wrong[:20]))
    return int(bool(wrong) or at != len(run.stdout))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

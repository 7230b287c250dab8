"""What the registered operators refuse: with one message, real or fake, before a kernel reads a wrong address.

Also gradients that are handed to a node by hand, which autograd has not looked at.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchdrop
from tests import ROOT
from torchdrop import functional as TF
from torchdrop.kernels.mask_params import mask_params, params_tensor
from torchdrop.kernels.masking import COMPUTE_DTYPE

OPS = torch.ops.torchdrop
KEY, KEYS = torch.tensor([3, 4]), torch.arange(6).reshape(3, 2)
HALF, LAWS = mask_params(0.5).tensor(), params_tensor(torch.rand(3, 1))
X, ROW = torch.randn(3, 4), torch.randn(4)
DISTINCT = (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64, torch.bool, torch.complex64)


def outcome(f: Callable[[], Any]) -> tuple[Any, ...]:
    """What a call returns, but for its values, or its error."""
    try:
        y = f()
    except Exception as error:
        return type(error), str(error)
    steps = [step for step, size in zip(y.stride(), y.shape, strict=True) if size > 1] if y.numel() else []
    return y.shape, y.dtype, steps, y.device


def faked(operator: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        return outcome(lambda: operator(*given))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Fake tensors log what they refuse."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.disabled = True
    yield
    logger.disabled = False


REFUSED: list[tuple[str, tuple[Any, ...], type, str]] = [
    ("masked", (X.int(), KEY, HALF, [3, 4]), TypeError, "x must be one of .*, got torch.int32"),
    ("masked", (X.to_sparse(), KEY, HALF, [3, 4]), TypeError, "x must be a strided tensor, got the layout"),
    ("masked", (X, KEY.int(), HALF, [3, 4]), TypeError, "key must be a strided int64 tensor, got one of torch.int32"),
    ("masked", (X, KEY[:1], HALF, [3, 4]), ValueError, r"key must hold \(seed, stream\) .*, got shape \(1,\)"),
    ("masked", (X, KEY[0], HALF, [3, 4]), ValueError, r"key must hold \(seed, stream\) .*, got shape \(\)"),
    (
        "masked",
        (X, KEY, HALF.float(), [3, 4]),
        TypeError,
        "params must be a strided float64 tensor, got one of torch.flo",
    ),
    ("masked", (X, KEY, HALF[:3], [3, 4]), ValueError, r"params must hold \(threshold, .*, got shape \(3,\)"),
    ("masked", (X, KEY, LAWS[:2], [3, 4]), ValueError, r"a size for each of the dimensions \(3, 4\), .* \(2, 1, 4\)"),
    (
        "masked",
        (X, KEY, LAWS[0], [3, 4]),
        ValueError,
        r"params must have the shape \(4,\), .* \(1, 4\)",
    ),
    ("masked", (X, KEY, HALF, [3, 5]), ValueError, r"x's \(3, 4\), or 1 .*, got keys of \(\) and the shape \(3, 5\)"),
    ("masked", (X, KEY, HALF, [4]), ValueError, r"got keys of \(\) and the shape \(4,\)"),
    ("masked", (X, KEYS[:2], HALF, [4]), ValueError, r"got keys of \(2,\) and the shape \(4,\)"),
    ("masked", (X, KEY, HALF, [3, 4], [1]), ValueError, r"part must hold start, run and pitch, .*, got \(1,\)"),
    ("masked", (X, KEY, HALF, [3, 4], [0]), ValueError, r"part must hold start, run and pitch, .*, got \(0,\)"),
    ("masked", (X, KEY, HALF, [3, 4], [-1, 2, 3]), ValueError, r"none of them negative, .*, got \(-1, 2, 3\)"),
    ("masked", (X, KEY, HALF, [3, 4], [0, 5, 9]), ValueError, "run of a part must divide its number of elements"),
    ("masked", (X, KEY.to("meta"), HALF, [3, 4]), RuntimeError, "same device, but .* got key on meta beside .* cpu"),
    ("gaussian", (X, KEY, HALF, [3, 5]), ValueError, r"got keys of \(\) and the shape \(3, 5\)"),
    ("keep_mask", (KEY, [3], None), ValueError, "params must be a tensor, got None"),
    ("keep_mask", (KEY, [-3], HALF), ValueError, r"shape must hold sizes of at least 0, got \(-3,\)"),
    ("keep_mask", (KEY, [3, 4], LAWS[:2]), ValueError, r"a size for each of the dimensions \(3, 4\)"),
    ("random_bits", (KEY.int(), [3]), TypeError, "key must be a strided int64 tensor"),
    ("random_bits", (KEY, [3], HALF), ValueError, "params must be None"),
    ("standard_normal", (KEY.double(), [3]), TypeError, "key must be a strided int64 tensor"),
    ("dropout_add", (X, None, ROW, KEY, HALF), ValueError, r"residual must have .* shape \(3, 4\), got \(4,\)"),
    ("dropout_add", (X, None, X.double(), KEY, HALF), TypeError, "residual must have .* dtype torch.float32, got"),
    ("dropout_add", (X, ROW[:2], X, KEY, HALF), ValueError, r"bias must broadcast against x of \(3, 4\), got \(2,\)"),
    ("dropout_add", (ROW, X, ROW, KEY, HALF), ValueError, r"bias must broadcast against x of \(4,\), got \(3, 4\)"),
    ("dropout_add", (X, ROW.half(), X, KEY, HALF), TypeError, "bias must have .* dtype torch.float32, got"),
    (
        "dropout_add",
        (X, None, X, KEYS, HALF),
        ValueError,
        r"one key of shape \(2,\) and params .* \(3, 2\) and \(4,\)",
    ),
    ("dropout_add", (X, None, X, KEY, LAWS), ValueError, "params of shape"),
    ("dropout_add", (X, None, X, KEY.int(), HALF), TypeError, "key must be a strided int64 tensor"),
    ("activation_dropout", (X, KEY, HALF, "tanh"), ValueError, "activation must be one of 'relu', .*, got 'tanh'"),
    ("activation_dropout", (X, KEYS, HALF, "relu"), ValueError, "one key of shape"),
    ("activation_dropout_backward", (X, ROW, KEY, HALF, "relu"), ValueError, "kept must have the first tensor's shape"),
    ("activation_dropout_backward", (ROW[:1], X, KEY, HALF, "relu"), ValueError, "kept must have the first tensor's"),
    ("activation_dropout_backward", (X, X.double(), KEY, HALF, "relu"), TypeError, "kept must have the first tensor's"),
    ("block_anchors", (HALF.float(), [7], 3), TypeError, "params must be a strided float64 tensor"),
    ("block_anchors", (HALF, [7, 2], 3), ValueError, r"block must be .* at most each of the sizes \(7, 2\), got 3"),
    ("block_anchors", (HALF, [7], 0), ValueError, "block must be at least 1"),
    ("block_scales", (LAWS, [7, 7], 3), ValueError, r"a size for each of the dimensions \(7, 7\)"),
]


@pytest.mark.parametrize(("name", "args", "error", "message"), REFUSED)
def test_what_no_kernel_takes_is_refused(name: str, args: tuple[Any, ...], error: type, message: str) -> None:
    operator = getattr(OPS, name)
    with pytest.raises(error, match=message) as caught:
        operator(*args)
    assert faked(operator, args) == (error, str(caught.value))


@pytest.mark.parametrize("size", [2, 3])
def test_a_large_tensor_beside_a_small_one_is_refused(size: int) -> None:
    """Reading past the small one's end would end the process."""
    x, small = torch.ones(1 << 22), torch.ones(size)
    with pytest.raises(ValueError, match="residual must have the first tensor's shape"):
        OPS.dropout_add(x, None, small, KEY, HALF)
    with pytest.raises(ValueError, match="kept must have the first tensor's shape"):
        OPS.activation_dropout_backward(x, small, KEY, HALF, "relu")


# Arguments drawn at random: right ones, and the same with a few changes.

Argument = Any


def _sizes(rng: random.Random) -> list[int]:
    sizes = [rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.randrange(4))]
    return [*sizes[:-1], 70] if rng.random() < 0.1 else sizes


def _filled(rng: random.Random, sizes: list[int], dtype: torch.dtype) -> Tensor:
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(rng.randrange(2**31))).to(dtype)
    if sizes and rng.random() < 0.3:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def _key(rng: random.Random, batch: list[int]) -> Tensor:
    return torch.randint(-(2**62), 2**62, (*batch, 2), generator=torch.Generator().manual_seed(rng.randrange(2**31)))


def _law(rng: random.Random, sizes: list[int] | None) -> Tensor:
    """One set of parameters, or one for each of some dimensions; now and then with a threshold that is none."""
    if sizes is None or rng.random() < 0.6:
        threshold = rng.choice((2.0**31, 0.0, 2.0**32, rng.random() * 2**32, -5.0, 1e300, float("nan")))
        return torch.tensor(
            [threshold, rng.choice((1.0, 2.0)), rng.choice((0.0, 0.5)), rng.choice((0.0, -1.0))]
        ).double()
    return params_tensor(torch.rand([size if rng.random() < 0.5 else 1 for size in sizes]))


def _shared(rng: random.Random, sizes: list[int]) -> list[int]:
    return [1 if rng.random() < 0.2 else size for size in sizes]


def _for_masked(rng: random.Random) -> list[Argument]:
    sizes = _sizes(rng)
    x = _filled(rng, sizes, rng.choice(list(COMPUTE_DTYPE)))
    keys = rng.randrange(len(sizes) + 1) if rng.random() < 0.3 else 0
    shape = _shared(rng, sizes)
    n = torch.Size(shape[keys:]).numel()
    runs = [run for run in range(1, 8) if n % run == 0]
    part = rng.choice(
        ([], [0, 0, 0], [rng.randrange(99), 0, 0], [rng.randrange(99), rng.choice(runs), rng.randrange(99)])
    )
    return [x, _key(rng, shape[:keys]), _law(rng, sizes), shape[keys:], part]


def _for_numbers(rng: random.Random, with_law: bool) -> list[Argument]:
    batch, shape = _sizes(rng)[:1], _sizes(rng)
    return [_key(rng, batch), shape, _law(rng, batch + shape) if with_law else None]


def _for_add(rng: random.Random) -> list[Argument]:
    sizes, dtype = _sizes(rng), rng.choice(list(COMPUTE_DTYPE))
    skipped = rng.randrange(len(sizes) + 1)
    bias = rng.choice((None, _filled(rng, sizes[-1:], dtype), _filled(rng, _shared(rng, sizes)[skipped:], dtype)))
    return [_filled(rng, sizes, dtype), bias, _filled(rng, sizes, dtype), _key(rng, []), _law(rng, None)]


def _for_activation(rng: random.Random, backward: bool) -> list[Argument]:
    sizes, dtype = _sizes(rng), rng.choice(list(COMPUTE_DTYPE))
    given = [_filled(rng, sizes, dtype) for _ in range(1 + backward)]
    return [*given, _key(rng, []), _law(rng, None), rng.choice(("relu", "gelu", "gelu_tanh"))]


def _for_blocks(rng: random.Random, scales: bool) -> list[Argument]:
    sizes = [rng.randrange(1, 9) for _ in range(rng.randrange(1, 4))]
    batch = [*_sizes(rng), *([1] * len(sizes) if scales else [])] if rng.random() < 0.5 else []
    return [params_tensor(torch.full(batch, 0.999)), sizes, rng.randrange(1, min(sizes) + 1)]


RIGHT: dict[str, Callable[[random.Random], list[Argument]]] = {
    "masked": _for_masked,
    "gaussian": _for_masked,
    "keep_mask": lambda rng: _for_numbers(rng, True),
    "random_bits": lambda rng: _for_numbers(rng, False),
    "standard_normal": lambda rng: _for_numbers(rng, False),
    "dropout_add": _for_add,
    "activation_dropout": lambda rng: _for_activation(rng, False),
    "activation_dropout_backward": lambda rng: _for_activation(rng, True),
    "block_anchors": lambda rng: _for_blocks(rng, False),
    "block_scales": lambda rng: _for_blocks(rng, True),
    "draw_key": lambda rng: [torch.empty([*_sizes(rng), 2])],
}


def _changed(rng: random.Random, argument: Argument) -> Argument:
    """Another one, which may be wrong."""
    if isinstance(argument, Tensor):
        how = rng.choice(("dtype", "narrow", "longer", "batch", "fewer", "expand", "step", "meta", "permute"))
        if how == "dtype":
            argument = argument.real if argument.is_complex() else argument
            return argument.to(rng.choice(DISTINCT))
        if how == "batch":
            return argument.expand(rng.choice((1, 2, 3)), *argument.shape)
        if how == "meta":
            return argument.to("meta")
        if how == "permute":
            return argument.permute(rng.sample(range(argument.dim()), argument.dim()))
        if argument.dim() == 0:
            return argument.reshape(rng.choice(([1], [1, 1])))
        if how == "fewer":
            return argument[0] if argument.shape[0] else argument.sum(0)
        if how == "expand":
            return argument.unsqueeze(-1).expand(*argument.shape, rng.choice((1, 2, 4)))
        if how == "step":
            return argument[..., ::2]
        if how == "narrow":
            return argument.narrow(rng.randrange(argument.dim()), 0, 0) if rng.random() < 0.3 else argument[:1]
        return torch.cat([argument, argument[..., :1]], -1)
    if isinstance(argument, list):
        numbers = [*argument]
        how = rng.choice(("more", "fewer", "other"))
        if how == "more" or not numbers:
            numbers.insert(rng.randrange(len(numbers) + 1), rng.choice((0, 1, 2, 3)))
        elif how == "fewer":
            numbers.pop(rng.randrange(len(numbers)))
        else:
            numbers[rng.randrange(len(numbers))] = rng.choice((-1, 0, 1, 2, 3, 7))
        return numbers
    if isinstance(argument, str):
        return rng.choice(("", "relu ", "tanh", "gelu"))
    if isinstance(argument, int):
        return argument + rng.choice((-3, -1, 1, 9))
    return rng.choice((None, torch.ones(4), mask_params(0.3).tensor()))


def _check(name: str, args: list[Argument]) -> bool:
    """That the real operator and its fake agree, and that numbers are the reference's. Whether they accept."""
    keywords = {"device": torch.device("cpu")} if name == "draw_key" else {}

    def operator(*given: Argument) -> Tensor:
        return getattr(OPS, name)(*given, **keywords)

    found, promised = outcome(lambda: operator(*args)), faked(operator, tuple(args))
    if isinstance(found[1], str) and found[1].startswith("scaling='marginal'"):
        return True  # what a fake cannot know, which sees no values
    assert found == promised, (name, args, found, promised)
    if len(found) == 2:
        assert issubclass(found[0], (TypeError, ValueError, RuntimeError)), (name, args, found)
        return False
    exact = name not in ("draw_key", "gaussian", "standard_normal", "activation_dropout_backward") and not any(
        "gelu" in str(a) for a in args[-1:]
    )
    if exact and found[3].type == "cpu":
        y = operator(*args)
        with torchdrop.use_backend("reference"):
            assert torch.equal(y.nan_to_num(7.0), operator(*args).nan_to_num(7.0)), (name, args)
    return True


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """How many of so many tuples of arguments were accepted and refused."""
    rng, accepted = random.Random(seed), 0
    for _ in range(count):
        name = rng.choice(list(RIGHT))
        args = RIGHT[name](rng)
        for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
            place = rng.randrange(len(args))
            args[place] = _changed(rng, args[place])
        accepted += _check(name, args)
    return accepted, count - accepted


def test_fuzzed_arguments_are_taken_by_kernels_and_fakes_alike() -> None:
    accepted, refused = fuzz(500, 1)
    assert min(accepted, refused) > 125


@pytest.mark.slow
def test_thousands_of_fuzzed_arguments_in_a_process_of_their_own() -> None:
    code = "from tests.ops.test_arguments import fuzz; n = fuzz(3_000, 2); assert sum(n) == 3_000 < 4 * min(n)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


# Gradients that are handed to a node by hand.

BIAS, RESIDUAL = torch.randn(4), torch.randn(3, 4)
NODES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": TF.dropout,
    "shared": lambda x: TF.dropout(x, shared_axes=1),
    "in place": lambda x: TF.dropout(x * 1.0, inplace=True),
    "alpha": lambda x: TF.alpha_dropout(x, 0.5, True),
    "gaussian": TF.gaussian_dropout,
    "add": lambda x: TF.dropout_add(x, RESIDUAL),
    "bias and add": lambda x: TF.bias_dropout_add(x, BIAS, RESIDUAL),
    "general add": lambda x: TF.dropout_add(x.t(), RESIDUAL.t()).t(),
    "relu": TF.relu_dropout,
    "general relu": lambda x: TF.relu_dropout(x.t()).t(),
    "gelu": TF.gelu_dropout,
    "block": lambda x: TF.drop_block1d(x, 0.5, 2),
}
GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "one element": lambda: torch.ones(1),
    "scalar": lambda: torch.tensor(2.0),
    "column": lambda: torch.arange(3.0).unsqueeze(1),
    "row": lambda: torch.arange(4.0),
    "double": lambda: torch.ones(3, 4, dtype=torch.float64),
    "half": lambda: torch.ones(3, 4, dtype=torch.float16),
    "one double": lambda: torch.ones(1, dtype=torch.float64),
    "integers": lambda: torch.ones(3, 4, dtype=torch.int32),
    "as many elements": lambda: torch.ones(4, 3),
    "fewer": lambda: torch.ones(3, 3),
    "more": lambda: torch.ones(3, 5),
    "dimensions": lambda: torch.ones(2, 3, 4),
    "none": lambda: torch.ones(0),
    "meta": lambda: torch.ones(3, 4, device="meta"),
}


def node_of(y: Tensor) -> Any:
    """The dropout's own, under a view's."""
    node = y.grad_fn
    while type(node).__name__ in ("TBackward0", "MulBackward0"):
        assert node is not None
        node = node.next_functions[0][0]
    return node


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", NODES)
def test_a_gradient_given_by_hand_is_broadcast_or_refused(name: str, recorded: bool) -> None:
    y = NODES[name](torch.randn(3, 4, requires_grad=True))
    node = node_of(y)
    transposed = name.startswith("general")

    def given(grad: Tensor) -> Tensor:
        with torch.set_grad_enabled(recorded):
            found = node.apply(grad.t() if transposed and grad.dim() == 2 else grad)
        first = found[0] if isinstance(found, tuple) else found
        return first.t() if transposed else first

    for which, made in GRADIENTS.items():
        grad = made()
        fits = grad.dim() <= 2 and all(a in (1, b) for a, b in zip(reversed(grad.shape), (4, 3), strict=False))
        if transposed and grad.dim() == 1:
            continue
        if not fits or grad.is_meta:
            with pytest.raises(RuntimeError, match="gradient"):
                given(grad)
            continue
        if grad.dtype != torch.float32 and isinstance(outcome(lambda grad=grad: given(grad))[0], type):
            continue  # PyTorch or a backend takes no such elements there
        found = given(grad)
        expected = given(grad.float().expand(3, 4).clone())
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2, msg=which)

"""Mask parameters of compiled code on CUDA: on the device, in memory that stays, and never read by the host.

There need not be a CUDA device: tensors are fake, and code is only traced.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torchdrop
from tests.seeding import seeded
from torchdrop import functional as TF
from torchdrop.core import held_params
from torchdrop.kernels.mask_params import ONE, alpha, mask_params

DEVICE = torch.device("cuda", 0)

LAYERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "dropout": lambda: torchdrop.Dropout(0.25),
    "channels": lambda: torchdrop.Dropout1d(0.25),
    "alpha": lambda: torchdrop.AlphaDropout(0.25),
    "gaussian": lambda: torchdrop.GaussianDropout(0.25),
    "rows": lambda: torchdrop.DropPath(0.25),
    "relu": lambda: torchdrop.ReLUDropout(0.25),
    "gelu": lambda: torchdrop.GELUDropout(0.25),
    "mask": lambda: torchdrop.LockedDropout(0.25),
    "a whole model": lambda: nn.Sequential(nn.ReLU(), torchdrop.Dropout(0.25), torchdrop.ReLUDropout(0.5)),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: TF.dropout(x, 0.25),
    "add": lambda x: TF.dropout_add(x, x, keep_prob=0.75),
    "gelu": lambda x: TF.gelu_dropout(x, 0.25),
}


@pytest.fixture
def fake() -> Iterator[None]:
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield
    torch.compiler.reset()


class Graphs:
    """A compiler that notes the mask parameters of every operator, with their devices, and what graphs call."""

    def __init__(self) -> None:
        self.count = 0
        self.params: list[tuple[fx.Node, torch.device]] = []
        self.calls: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return self  # Lightning, once it is imported, copies the arguments of torch.compile, and fake tensors cannot be

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        for node in graph.graph.nodes:
            self.calls.add(str(node.target))
            if str(node.target).startswith("torchdrop."):
                given = [one for one in node.args if isinstance(one, fx.Node)]
                values = [(one, one.meta.get("example_value")) for one in given]
                self.params += [
                    (one, value.device) for one, value in values if getattr(value, "dtype", 0) is torch.float64
                ]
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_the_device_has_its_parameters_there(name: str, fake: None) -> None:
    layer, graphs = LAYERS[name](), Graphs()
    assert isinstance(layer, nn.Module)
    layer.to(DEVICE)
    torch.compile(layer, fullgraph=True, backend=graphs)(torch.randn(4, 6, 8, device=DEVICE))
    assert graphs.params
    for node, device in graphs.params:
        assert device == DEVICE
        assert node.op == "placeholder"
        assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"
    assert not graphs.calls & {"item", "to", "tolist"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_number_goes_to_the_device_without_waiting(name: str, fake: None) -> None:
    graphs = Graphs()
    torch.compile(FUNCTIONS[name], fullgraph=True, backend=graphs)(torch.randn(4, 6, 8, device=DEVICE))
    assert graphs.params
    for node, device in graphs.params:
        assert (node.target, device) == ("to", DEVICE)
        assert node.kwargs == {"non_blocking": True}


@pytest.mark.slow
def test_a_layer_that_was_not_moved_is_served_too(fake: None) -> None:
    graphs, layer = Graphs(), torchdrop.Dropout(0.25)
    torch.compile(layer, fullgraph=True, backend=graphs)(torch.randn(4, 6, 8, device=DEVICE))
    ((node, device),) = graphs.params
    assert (node.target, device) == ("to", DEVICE)
    layer.to(DEVICE)
    torch.compile(layer, fullgraph=True, backend=graphs)(torch.randn(4, 6, 8))
    node, device = graphs.params[-1]
    assert (node.target, device) == ("to", torch.device("cpu"))
    assert node.kwargs == {"non_blocking": False}


def test_what_moves_no_tensor_moves_no_parameters(fake: None) -> None:
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        layer = torchdrop.Dropout(0.25)
        tensor = layer.rate._held.tensor
        change(layer)
        assert layer.rate._held.tensor is tensor
        assert tensor.dtype == torch.float64
    layer = torchdrop.Dropout(0.25)
    tensor = layer.to("meta").rate._held.tensor
    assert tensor.is_cpu
    assert layer.to_empty(device="cpu").rate._held.tensor is tensor


def test_parameters_are_in_no_state_and_in_no_buffer(fake: None) -> None:
    layer = torchdrop.Dropout(0.25).to(DEVICE)
    assert not layer.state_dict()
    assert not list(layer.buffers())


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if graphs of the CPU's work were captured, so that there are numbers to look at."""
    monkeypatch.setattr(held_params, "CAPTURED", {"cpu"})


def numbers(layer: Any) -> list[float]:
    found: list[float] = layer.rate._held.tensor.tolist()
    return found


def test_memory_has_the_numbers_of_the_last_rate(in_place: None) -> None:
    layer = torchdrop.AlphaDropout(0.25)
    tensor = layer.rate._held.tensor
    layer.keep_prob = 0.5
    assert layer.rate._held.tensor is tensor
    given = mask_params(0.5, alpha)
    assert numbers(layer) == [given.threshold, given.scale, given.shift, given.fill]
    layer.keep_prob = torch.rand(8)  # has parameters for each element, which are computed in each call
    assert layer.rate._held is None


@pytest.mark.slow
def test_compiled_code_reads_new_rates_from_the_same_memory(in_place: None) -> None:
    layer, graphs, x = torchdrop.Dropout(0.25), Graphs(), torch.ones(4096)
    compiled, tensor = torch.compile(layer, fullgraph=True, backend=graphs), layer.rate._held.tensor
    for keep_prob in (0.75, 0.5, 1.0, 0.0, 0.9):
        layer.keep_prob = keep_prob
        assert torch.equal(seeded(1, compiled, x), seeded(1, layer, x))
        assert layer.rate._held.tensor is tensor
    assert graphs.count == 1


@pytest.mark.slow
def test_a_new_rate_between_forward_and_backward_is_an_error_and_no_other_mask(in_place: None) -> None:
    layer, x = torchdrop.Dropout(0.25), torch.ones(64, requires_grad=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    layer.keep_prob = 0.5
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["copy", "deep", "pickle"],
)
def test_copies_have_memory_of_their_own_before_their_rates_differ(
    copied: Callable[[torchdrop.Dropout], torchdrop.Dropout], in_place: None
) -> None:
    layer = torchdrop.Dropout(0.25)
    other = copied(layer)
    for changed, kept, keep_prob in ((other, layer, 0.5), (layer, other, 0.125)):
        before = numbers(kept)
        changed.keep_prob = keep_prob
        assert numbers(kept) == before
        assert numbers(changed)[0] == keep_prob * ONE
    tensor = other.rate._held.tensor
    other.keep_prob = 0.75
    assert other.rate._held.tensor is tensor


def test_a_rate_that_two_layers_are_given_is_none_that_they_share(in_place: None) -> None:
    first, second = torchdrop.Dropout(0.25), torchdrop.Dropout(0.5)
    second._set(first.rate, None)
    assert second.p == 0.25
    second.keep_prob = 0.125
    assert (numbers(first)[0], numbers(second)[0]) == (0.75 * ONE, 0.125 * ONE)

"""What only CUDA has: nothing waits for the device, masks in captured graphs, indices beyond 2**31, mixed devices.

conftest.py leaves this file out where there is no CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop import functional as TF
from torchdrop import kernels
from torchdrop.kernels import reference
from torchdrop.kernels.mask_params import mask_params
from torchdrop.kernels.masking import MaskSlice

CUDA = torch.device("cuda")
LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": torchdrop.Dropout(0.5),
    "shared": torchdrop.Dropout(0.5, shared_axes=0),
    "channels": torchdrop.Dropout1d(0.5),
    "alpha": torchdrop.AlphaDropout(0.5),
    "add": lambda x: TF.dropout_add(x, x, 0.5),
    "relu": torchdrop.ReLUDropout(0.5),
    "gelu": torchdrop.GELUDropout(0.5),
}


def both(layer: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    y = layer(x)
    return y, torch.autograd.grad(y, x, g)[0]


def test_triton_serves_cuda() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert kernels.backend_for(CUDA, dtype).NAME == "triton"


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_waits_for_the_device(name: str) -> None:
    x = torch.randn(64, 8, 16, device=CUDA, requires_grad=True)
    g = torch.ones_like(x)
    both(LAYERS[name], x, g)  # kernels are compiled at the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(LAYERS[name], x, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LAYERS)
def test_a_captured_graph_draws_new_masks_and_backward_has_them(name: str) -> None:
    layer = LAYERS[name]
    x = torch.randn(64, 8, 16, device=CUDA, requires_grad=True)
    g = torch.ones_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(layer, x, g)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradient = both(layer, x, g)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        graph.replay()
        found.append((y.clone(), gradient.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])
    if name == "dropout":
        assert torch.equal(found[2][0], x * found[2][1])


RATED: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: torchdrop.Dropout(0.5),
    "alpha": lambda: torchdrop.AlphaDropout(0.5),
    "gaussian": lambda: torchdrop.GaussianDropout(0.5),
    "add": lambda: torchdrop.DropoutAdd(0.5),
    "relu": lambda: torchdrop.ReLUDropout(0.5),
    "gelu": lambda: torchdrop.GELUDropout(0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("name", RATED)
def test_a_new_rate_takes_effect_in_a_captured_graph_and_compiles_nothing(name: str, moved: bool) -> None:
    """Calls after the first ones replay a graph. A layer that was not moved has its parameters copied for each call."""
    torch.compiler.reset()
    layer = RATED[name]()
    if moved:
        layer = layer.to(CUDA)
    x = torch.randn(64, 8, 16, device=CUDA, requires_grad=True)
    others = (x.detach(),) if name == "add" else ()
    compiled, counts = torch.compile(layer, fullgraph=True, mode="reduce-overhead"), []
    for step, keep_prob in enumerate((0.5, 0.5, 0.5, 0.9, 0.25, 1.0, 0.0, 0.75, 0.75)):
        layer.keep_prob = keep_prob  # type: ignore[assignment]
        found = []
        for function in (compiled, layer):
            torch.compiler.cudagraph_mark_step_begin()
            torch.manual_seed(step)
            y = function(x, *others)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            found.append((y.detach().clone(), gradient.clone()))
        torch.testing.assert_close(*found)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[-1]


@pytest.mark.slow
def test_indices_beyond_2_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("it takes 12 GiB of the device's memory")
    key, drawn, n = torch.tensor([3, -4]), mask_params(0.7), 2**31 + 4096
    there = key.to(CUDA)
    expected = reference.keep_mask((4096,), key, drawn, MaskSlice(2**31))
    assert torch.equal(kernels.keep_mask((n,), there, drawn)[-4096:].cpu(), expected)
    x = torch.ones(n, dtype=torch.float16, device=CUDA)
    y = kernels.masked(x, there, drawn, x.shape, out=x)
    assert torch.equal(y[-4096:].cpu() != 0, expected)


def test_a_cpu_generator_for_a_cuda_tensor_is_refused() -> None:
    x = torch.ones(10, device=CUDA)
    message = r"^generator must be on the input's device, got a generator on cpu for an input on cuda"
    with pytest.raises(ValueError, match=message):
        TF.dropout(x, generator=torch.Generator())
    own = torch.Generator(device=CUDA).manual_seed(3)
    first = TF.dropout(x, generator=own)
    assert torch.equal(TF.dropout(x, generator=own.manual_seed(3)), first)


def test_the_native_backend_says_why_it_is_not_for_cuda() -> None:
    x = torch.ones(10, device=CUDA)
    with torchdrop.use_backend("native"), pytest.raises(RuntimeError, match="it works on CPU tensors, not on cuda"):
        TF.dropout(x)


def test_frozen_masks_freeze_cuda_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torchdrop.Dropout(0.5)).to(CUDA)
    x, before = torch.randn(5, 8, device=CUDA), torch.cuda.get_rng_state()
    with torchdrop.frozen_masks(model, seed=1):
        assert torch.equal(model(x), model(x))
    assert torch.equal(torch.cuda.get_rng_state(), before)

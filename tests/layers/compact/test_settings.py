"""Compact dropout where layers live: element types, hooks, checkpoints, compiled code, torch.func, Monte Carlo."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.layers.compact.test_sequential import Fixed, both, cuts, factors, mlp, run, stacks
from torchdrop.layers.compact.sequential import CompactSequential, compact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    modules = [nn.Linear(6, 64), nn.GELU(), Fixed(factors(64, 1, 0.9)), nn.Linear(64, 3)]
    dense, cut = both(modules, torch.float64)
    x = torch.randn(50, 6, dtype=torch.float64)
    expected, found = run(dense, x), run(cut.to(dtype), x.to(dtype))
    for key, value in expected.items():
        assert found[key].dtype == dtype
        assert found[key].isfinite().all()
        torch.testing.assert_close(found[key].double(), value, rtol=0.05, atol=0.05 * float(value.abs().max()))


def test_the_scale_of_half_types_is_not_rounded() -> None:
    k = 0.9  # 1 / 0.9 is 1.109375 in bfloat16
    model = CompactSequential(Fixed([1 / k] * 8 + [0.0]), nn.Linear(9, 9, bias=False)).to(torch.bfloat16)
    nn.init.eye_(model[1].weight)
    x = torch.full((1, 9), 255.0, dtype=torch.bfloat16)
    assert model(x)[0, 0] == torch.tensor(255 / k).bfloat16() != x[0, 0] * torch.tensor(1 / k).bfloat16()


def test_bfloat16_under_autocast() -> None:
    dense, cut = both([nn.Linear(6, 64), nn.ReLU(), Fixed(factors(64, 1)), nn.Linear(64, 3)], torch.float32)
    x = torch.randn(20, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = run(dense, x), run(cut, x)
    assert found["output"].dtype == torch.bfloat16
    assert found["0.weight"].dtype == torch.float32
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0.03, atol=0.03 * float(value.abs().max()))


def test_parameters_that_are_frozen_or_shared() -> None:
    modules = [nn.Linear(8, 8), nn.Tanh(), Fixed(factors(8, 1)), nn.Linear(8, 8), nn.Tanh(), Fixed(factors(8, 2))]
    modules.append(modules[0])
    dense, cut = both(modules, torch.float64)
    for model in (dense, cut):
        model[3].weight.requires_grad_(False)
        model[0].bias.requires_grad_(False)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected, found = run(dense, x), run(cut, x)
    assert found["3.weight"] is None
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


def test_a_parametrized_weight_is_cut_and_trained() -> None:
    dense, cut = both([nn.Linear(6, 9), nn.ReLU(), Fixed(factors(9, 1)), nn.Linear(9, 3)], torch.float64)
    for model in (dense, cut):
        parametrizations.weight_norm(model[0])
    assert len(cut[0].parametrizations.weight) == 1
    expected, found = (run(model, torch.ones(4, 6, dtype=torch.float64)) for model in (dense, cut))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


def test_layers_with_hooks_see_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cuts(monkeypatch)
    dense, cut = both([nn.Linear(6, 9), nn.ReLU(), Fixed(factors(9, 1)), nn.Linear(9, 3)], torch.float64)
    x, seen = torch.randn(4, 6, dtype=torch.float64), []
    run(cut, x)
    assert len(made) == 2
    handle = cut[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    run(cut, x)
    handle.remove()
    assert seen == [(4, 9)]
    for model in (dense, cut):  # a hook that makes the weight
        prune.random_unstructured(model[0], "weight", 0.5) if model is dense else prune.custom_from_mask(
            model[0], "weight", dense[0].weight_mask
        )
    expected, found = run(dense, x), run(cut, x)
    assert len(made) == 2
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


def test_hooks_that_only_observe_leave_layers_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cuts(monkeypatch)
    model = CompactSequential(nn.Linear(6, 9), nn.ReLU(), torchdrop.Dropout(0.5), nn.Linear(9, 3))
    with torchdrop.frozen_masks(model):
        model(torch.randn(4, 6))
    assert made


def test_what_is_inserted_at_a_layer_runs_and_sees_whole_tensors() -> None:
    model = CompactSequential(nn.Linear(6, 9), nn.ReLU(), torchdrop.Dropout(0.5), nn.Linear(9, 3))
    put = torchdrop.insert(model, {"0": torchdrop.Dropout(0.9)})
    seen: list[tuple[int, ...]] = []
    inserted = model.get_submodule("0.inserted.after")
    inserted.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model(torch.randn(4, 6))
    assert seen == [(4, 9)]
    put.undo()


def test_an_input_of_another_width_is_refused_before_anything_is_drawn() -> None:
    model, state = mlp(), torch.get_rng_state()
    with pytest.raises(
        RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied: the input of shape \(4, 5\) must"
    ):
        model(torch.randn(4, 5, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, x = mlp().double(), torch.randn(5, 6, dtype=torch.float64)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    torch.manual_seed(4)
    expected = run(model, x)
    torch.manual_seed(4)
    found = run(Checkpointed(), x)
    assert torch.equal(found.pop("output"), expected.pop("output"))
    assert torch.equal(found.pop("input"), expected.pop("input"))
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_compiled_code_masks_with_the_same_masks_and_rates_do_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp().double(), torch.randn(5, 6, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for keep_prob in (0.5, 0.8, 0.3):
        torchdrop.set_keep_prob(model, {"*": keep_prob})
        torch.manual_seed(6)
        expected = run(model, x)
        torch.manual_seed(6)
        model.zero_grad()
        y = compiled(x.requires_grad_())
        (y.square() * torch.linspace(1, 2, 3, dtype=y.dtype)).sum().backward()
        torch.testing.assert_close(y.detach(), expected["output"], rtol=1e-12, atol=1e-12)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1
    made = cuts(monkeypatch)
    compiled(x)
    assert not made


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(model, parameters, (x,)).sum()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmaps_randomness_modes(randomness: str) -> None:
    model, x = mlp(), torch.randn(4, 6)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    each = vmap(grad(loss_of(model)), (None, 0), randomness=randomness)(parameters, x)
    dropped = (each["3.weight"] == 0).all(1)
    assert 0 < dropped.sum() < dropped.numel()
    assert torch.equal(dropped[0], dropped[1]) == (randomness == "same")


def test_gradients_for_each_sample_add_up_to_the_batchs() -> None:
    _, model = both(stacks()["two hidden"], torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    each = vmap(grad(loss_of(model)), (None, 0))(parameters, x)
    whole = grad(loss_of(model))(parameters, x)
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-12, atol=1e-12)


def test_batched_gradients() -> None:
    _, model = both(stacks()["two hidden"], torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y, wanted = model(x), torch.randn(5, 4, 3, dtype=torch.float64)
    inputs = (x, *model.parameters())
    each = [torch.autograd.grad(y, inputs, g, retain_graph=True) for g in wanted]
    together = torch.autograd.grad(y, inputs, wanted, is_grads_batched=True)
    for one, other in zip(zip(*each, strict=True), together, strict=True):
        torch.testing.assert_close(torch.stack(one), other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [torchdrop.Dropout, nn.Dropout])
def test_monte_carlo_samples_are_one_function_each_and_those_of_a_loop_are_cut(
    layer: Callable[[float], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Identity(), mlp(layer=layer)).eval().double(), torch.randn(7, 6, dtype=torch.float64)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first, second = model(x), model(x)
        assert [source.module for source in report.active] == ["1.2", "1.5"]
    assert not torch.equal(first, second)
    with torchdrop.mc_dropout(model, seed=1):
        torch.testing.assert_close(model(x[:2]), first[:2])
    made = cuts(monkeypatch)
    means = []
    for strategy in ("loop", "vectorized", "auto"):
        before = len(made)
        masks = "shared" if strategy == "loop" else "independent"
        result = torchdrop.mc_predict(model, x, 8, seed=3, masks=masks, strategy=strategy, task="regression")
        means.append(result.mean)
        assert (len(made) - before > 8 * 3) == (strategy != "vectorized")
        assert result.strategy == ("vectorized" if strategy == "vectorized" else "loop")
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0])
    with torchdrop.mc_dropout(model, seed=1, sources="1.2") as report:
        model(x)
    assert [source.module for source in report.active] == ["1.2"]


def test_rates_are_set_by_name_and_layers_disabled() -> None:
    model, x = mlp(), torch.randn(5, 6)
    torchdrop.set_keep_prob(model, {"2": 0.9, "5": 0.0})
    assert torchdrop.keep_probs(model) == {"2": 0.9, "5": 0.0}
    assert torch.equal(model(x), model[6].bias.expand(5, 3))
    with torchdrop.disabled(model):
        torch.testing.assert_close(model(x), nn.Sequential(*model).eval()(x))
    stock = mlp(layer=nn.Dropout)
    torchdrop.replace(stock)
    assert type(stock[2]) is torchdrop.Dropout
    assert stock(x).shape == (5, 3)


def test_copies_pickles_and_keys() -> None:
    model, x = mlp(), torch.randn(5, 6)
    plain = nn.Sequential(*[nn.Dropout(0.5) if isinstance(m, nn.Dropout) else copy.deepcopy(m) for m in model])
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)


def test_modules_of_a_dict_keep_their_names() -> None:
    modules = nn.ModuleDict({"fc1": nn.Linear(6, 9), "fc2": nn.Linear(9, 3)})
    assert list(compact(modules, 0.5)._modules) == ["fc1", "dropout0", "fc2"]


def test_compact_keeps_children_names_and_mode() -> None:
    block = nn.Sequential(OrderedDict(fc1=nn.Linear(6, 9), act=nn.GELU(), fc2=nn.Linear(9, 6), drop=nn.Dropout(0.1)))
    with pytest.raises(ValueError, match=r"nothing can be cut: .* got Linear, GELU, Linear, Dropout"):
        compact(block)
    block = nn.Sequential(OrderedDict(fc1=nn.Linear(6, 9), act=nn.GELU(), fc2=nn.Linear(9, 6)))
    made = compact(block.eval(), keep_prob=0.7)
    assert list(made._modules) == ["fc1", "act", "dropout0", "fc2"]
    assert list(made.state_dict()) == list(block.state_dict())
    assert made.fc1 is block.fc1
    assert torchdrop.keep_probs(made) == {"dropout0": 0.7}
    assert not any(module.training for module in made.modules())
    again = compact(made)
    assert list(again._modules.values()) == list(made._modules.values())
    by_name = compact({"fc1": block.fc1, "dropout0": nn.ReLU(), "fc2": block.fc2}, 0.25)
    assert list(by_name._modules) == ["fc1", "dropout0", "dropout1", "fc2"]
    assert by_name.dropout1.p == 0.25
    many = compact([nn.Linear(3, 3) for _ in range(3)], 0.5)
    assert [name for name, m in many._modules.items() if isinstance(m, nn.Dropout)] == ["dropout0", "dropout1"]
    assert type(many[:3]) is CompactSequential

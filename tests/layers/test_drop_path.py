"""Stochastic depth: one draw a sample or a batch, under the names and signatures of timm and torchvision."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from torchdrop.kernels.mask_params import ONE, mask_params
from torchdrop.layers.drop_path import DropPath, StochasticDepth, drop_path, stochastic_depth
from torchdrop.rules import linear_in_depth

FORMS: dict[str, Callable[..., Tensor]] = {
    "drop_path": lambda x, p, **given: drop_path(x, p, True, **given),
    "row": lambda x, p, **given: stochastic_depth(x, p, "row", **given),
    "batch": lambda x, p, **given: stochastic_depth(x, p, "batch", **given),
}
every_form = pytest.mark.parametrize("form", FORMS)

LAYERS: dict[str, Callable[..., Any]] = {
    "drop_path": DropPath,
    "row": lambda p: StochasticDepth(p, "row"),
    "batch": lambda p: StochasticDepth(p, "batch"),
}


def positional(callable_: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(callable_).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def test_signatures_are_those_of_timm_and_torchvision() -> None:
    assert positional(drop_path) == {
        "x": inspect.Parameter.empty, "drop_prob": 0.0, "training": False, "scale_by_keep": True,
    }  # fmt: skip
    assert positional(DropPath) == {"drop_prob": 0.0, "scale_by_keep": True}
    assert list(positional(stochastic_depth)) == ["input", "p", "mode", "training"]
    assert positional(stochastic_depth)["training"] is True
    assert list(positional(StochasticDepth)) == ["p", "mode"]
    assert list(positional(DropPath.forward)) == ["self", "x"]
    assert list(positional(StochasticDepth.forward)) == ["self", "input"]


@every_form
@pytest.mark.parametrize("k", [0.3, 0.6])
def test_expectation_of_a_block_is_x_plus_f_by_enumeration(form: str, k: float) -> None:
    x, branch = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    found: dict[tuple[bool, ...], Tensor] = {}
    for seed in range(200):
        y = seeded(seed, FORMS[form], branch, 1 - k)
        found[tuple((y != 0).flatten(1).all(1).tolist())] = x + y
    masks = itertools.product([False, True], repeat=3) if form != "batch" else [(False,) * 3, (True,) * 3]
    realized = mask_params(k).threshold / ONE
    mean, total = torch.zeros_like(x), 0.0
    for mask in masks:
        draws = mask[:1] if form == "batch" else mask
        chance = realized ** sum(draws) * (1 - realized) ** (len(draws) - sum(draws))
        mean, total = mean + chance * found.pop(mask), total + chance
    assert not found
    assert total == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(mean, x + branch, rtol=1e-12, atol=1e-12)


def test_rows_have_draws_of_their_own_and_a_batch_has_one() -> None:
    x = torch.ones(200, 3, 4)
    for form in FORMS:
        y = FORMS[form](x, 0.5)
        assert torch.equal(y, y[:, :1, :1].expand_as(y))
        assert set(y[:, 0, 0].tolist()) == {0.0, 2.0} or form == "batch"
    batches = torch.stack([stochastic_depth(x, 0.5, "batch") for _ in range(40)])
    assert torch.equal(batches, batches[:, :1, :1, :1].expand_as(batches))
    assert set(batches[:, 0, 0, 0].tolist()) == {0.0, 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_samples_are_kept_with_probability_keep_prob(k: float) -> None:
    n = draws_for(k, 0.005)
    y = DropPath(keep_prob=k)(torch.ones(n, 1))
    check_rate(int((y != 0).sum()), n, k, 0.005)


def test_both_names_are_one_map() -> None:
    x = torch.randn(30, 5)
    expected = seeded(3, drop_path, x, 0.3, True)
    assert torch.equal(seeded(3, stochastic_depth, x, 0.3, "row"), expected)
    assert torch.equal(seeded(3, DropPath(0.3), x), expected)
    assert torch.equal(seeded(3, StochasticDepth(0.3, "row"), x), expected)
    assert torch.equal(seeded(3, drop_path, x=x, drop_prob=0.3, training=True, scale_by_keep=True), expected)
    assert torch.equal(seeded(3, stochastic_depth, input=x, p=0.3, mode="row", training=True), expected)
    assert torch.equal(seeded(3, drop_path, x, training=True, keep_prob=0.7), expected)


@every_form
def test_eval_and_keep_prob_one_give_the_input_itself_and_keep_prob_zero_gives_zeros(form: str) -> None:
    x = torch.randn(4, 3)
    layer = LAYERS[form](0.5).eval()
    assert layer(x) is x
    assert FORMS[form](x, 0.0) is x
    assert FORMS[form](x, None, keep_prob=1) is x
    assert torch.equal(FORMS[form](x, 1.0), torch.zeros_like(x))
    assert drop_path(x, 0.5) is x
    assert stochastic_depth(x, 0.5, "row", False) is x
    assert DropPath()(x) is x


@every_form
def test_empty_inputs(form: str) -> None:
    for shape in [(0,), (0, 3), (3, 0)]:
        assert FORMS[form](torch.empty(shape), 0.5).shape == shape


def test_unscaled_paths_keep_their_values() -> None:
    x = torch.full((60, 2), 3.0)
    layer = DropPath(0.5, False)
    assert set(layer(x).unique().tolist()) == {0.0, 3.0}
    assert set(drop_path(x, 0.5, True, False).unique().tolist()) == {0.0, 3.0}
    assert layer.eval()(x) is x
    layer.train().scale_by_keep = True
    assert set(layer(x).unique().tolist()) == {0.0, 6.0}
    layer.scale_by_keep, layer.drop_prob = False, 0.25
    assert set(layer(x).unique().tolist()) == {0.0, 3.0}


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_have_no_nan_and_no_zeroed_output(form: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-60000, 60000, 4096).reshape(16, 16, 16).to(dtype) * 0.5
    seen = 0
    for seed in range(10):
        y = seeded(seed, FORMS[form], x, 0.25)
        wide = seeded(seed, FORMS[form], x.float(), 0.25)
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert torch.equal(y, wide.to(dtype))
        seen += int((y != 0).any())
    assert seen >= 5 if form == "batch" else seen == 10


@every_form
def test_a_dropped_sample_is_exactly_zero(form: str) -> None:
    x = torch.tensor([torch.inf, torch.nan, -torch.inf]).repeat(40, 1)
    values = torch.stack([FORMS[form](x, 0.5) for _ in range(20)])
    assert (values == 0).any()
    assert torch.equal(values[values[..., 0] == 0], torch.zeros_like(values[values[..., 0] == 0]))


@every_form
def test_strides_do_not_matter(form: str) -> None:
    x = torch.randn(6, 4, 5, 3)
    expected = seeded(1, FORMS[form], x, 0.5)
    last = seeded(1, FORMS[form], x.contiguous(memory_format=torch.channels_last), 0.5)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, expected)
    assert torch.equal(seeded(1, FORMS[form], x.repeat_interleave(2, 3)[..., ::2], 0.5), expected)
    assert torch.equal(seeded(1, FORMS[form], x.transpose(0, 3).contiguous().transpose(0, 3), 0.5), expected)


@every_form
def test_backward_has_the_mask_of_forward(form: str) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return seeded(0, FORMS[form], x, 0.4)

    ones = torch.ones_like(x)
    assert torch.equal(torch.autograd.grad(f(x).sum(), x)[0], f(ones))
    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


@every_form
def test_seeds_generators_and_frozen_masks(form: str) -> None:
    x = torch.ones(64, 2)
    draws = [FORMS[form](x, 0.5) for _ in range(20)]
    assert any(not torch.equal(draws[0], other) for other in draws)
    first, second = (FORMS[form](x, 0.5, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    for layer in (DropPath, StochasticDepth):
        made = (layer(0.5, generator=torch.Generator().manual_seed(4))(x) for _ in range(2))
        assert torch.equal(*made)
    model = nn.Sequential(LAYERS[form](0.5))
    with torchdrop.frozen_masks(model, seed=2):
        y = model(x)
        assert torch.equal(model(x), y)
        assert torch.equal(model(x[:9]), y[:9])


def test_checkpointing_repeats_the_mask() -> None:
    layer, x = DropPath(0.5), torch.randn(50, 3, requires_grad=True)
    torch.manual_seed(0)
    y = checkpoint(lambda x: torch.sin(layer(x) * x), x, use_reentrant=False)
    again = seeded(0, lambda x: torch.sin(layer(x) * x), x)
    assert torch.equal(y, again)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, again)))


@every_form
def test_vmap_draws_for_each_or_for_all(form: str) -> None:
    x = torch.ones(30, 8, 2)
    different = vmap(lambda x: FORMS[form](x, 0.5), randomness="different")(x)
    assert len({tuple(row.flatten().tolist()) for row in different}) > 1
    same = vmap(lambda x: FORMS[form](x, 0.5), randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    assert set(different.unique().tolist()) == {0.0, 2.0}


def test_rates_can_be_a_tensor_with_one_for_each_sample() -> None:
    k = torch.tensor([0.0, 1.0, 0.5]).reshape(3, 1, 1)
    y = torch.stack([drop_path(torch.ones(3, 2, 2), training=True, keep_prob=k) for _ in range(30)])
    assert not y[:, 0].any()
    assert (y[:, 1] == 1).all()
    assert set(y[:, 2].unique().tolist()) == {0.0, 2.0}
    layer = DropPath(keep_prob=k)
    assert str(layer) == "DropPath(drop_prob=<tensor of shape (3, 1, 1)>)"
    assert not layer(torch.ones(3, 2, 2))[0].any()
    with pytest.raises(ValueError, match=r"^keep_prob of shape \(3,\) does not broadcast"):
        drop_path(torch.ones(3, 2), training=True, keep_prob=torch.ones(3))


def test_drop_prob_can_be_read_and_set_as_in_timm() -> None:
    layer = DropPath(0.1)
    assert (layer.drop_prob, layer.p, layer.keep_prob) == (0.1, 0.1, 0.9)
    layer.drop_prob = 0.5
    assert (layer.drop_prob, layer.p, layer.keep_prob) == (0.5, 0.5, 0.5)
    assert set(layer(torch.ones(50, 1)).unique().tolist()) == {0.0, 2.0}
    layer.keep_prob = 0.8
    assert layer.drop_prob == 0.2
    assert str(layer) == "DropPath(drop_prob=0.2)"
    assert str(DropPath(0.5, False)) == "DropPath(drop_prob=0.5, scale_by_keep=False)"
    assert str(StochasticDepth(0.2, "batch")) == "StochasticDepth(p=0.2, mode=batch)"


@pytest.mark.parametrize("layer", [DropPath(0.3, False), DropPath(0.3), StochasticDepth(0.3, "batch")])
def test_copies_pickles_and_state(layer: Any) -> None:
    x = torch.randn(20, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(seeded(1, twin, x), seeded(1, layer, x))
    assert isinstance(layer, _DropoutNd)
    assert not layer.state_dict()
    assert not list(layer.parameters())


class Stack(nn.Module):
    """Residual blocks whose branches are dropped."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"f": nn.Linear(3, 3), "drop": DropPath(0.2)}) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["drop"](block["f"](x))  # type: ignore[index]
        return x


@pytest.mark.parametrize("depth", [1, 2, 7, 54])
def test_the_linear_rule_sets_a_stack_by_name_and_the_expected_depth_is_3L_minus_1_over_4(depth: int) -> None:  # noqa: N802
    model = Stack(depth)
    torchdrop.set_keep_prob(model, {"blocks.*": linear_in_depth(0.5)})
    kept = torchdrop.keep_probs(model)
    assert list(kept) == [f"blocks.{block}.drop" for block in range(depth)]
    assert list(kept.values()) == pytest.approx([1 - layer / depth * (1 - 0.5) for layer in range(1, depth + 1)])
    assert sum(kept.values()) == pytest.approx((3 * depth - 1) / 4)  # type: ignore[arg-type]
    assert model.blocks[-1]["drop"].drop_prob == 0.5  # type: ignore[index]


def test_schedules_reach_them() -> None:
    model = Stack(3)
    scheduler = torchdrop.KeepProbScheduler(model, {"*": torchdrop.schedules.linear(1.0, 0.5, 10)})
    for _ in range(10):
        scheduler.step()
    assert set(torchdrop.keep_probs(model).values()) == {0.5}
    assert model.blocks[0]["drop"].drop_prob == 0.5  # type: ignore[index]


def test_disabled_reaches_layers_and_functions() -> None:
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return drop_path(x, 0.5, True)

    x = torch.ones(50, 2)
    for layer in (DropPath(0.5), Function()):
        with torchdrop.disabled(layer):
            assert torch.equal(layer(x), x)
        assert not torch.equal(layer(x), x)


def test_monte_carlo_gives_each_row_its_mask_in_any_batch() -> None:
    model, x = Stack(3).eval(), torch.randn(40, 3)
    torchdrop.set_keep_prob(model, {"*": 0.5})
    with torchdrop.mc_dropout(model, seed=1) as report:
        whole = model(x)
        flags: list[bool] = []
        model.blocks[0]["drop"].register_forward_hook(lambda layer, *_: flags.append(layer.training))  # type: ignore[index, union-attr]
        model(x)
    assert flags == [False]  # it is asked for, not put into train mode
    with torchdrop.mc_dropout(model, seed=1):
        assert torch.allclose(model(x[:7]), whole[:7], atol=1e-6)
    assert len(report.active) == 3
    assert report.replayable
    assert not torch.allclose(whole, model(x))
    means = [
        torchdrop.mc_predict(model, x, samples=32, seed=3, strategy=strategy, chunk=chunk, task="regression").mean
        for strategy, chunk in (("loop", None), ("auto", None), ("auto", 16))
    ]
    assert all(torch.allclose(means[0], mean, atol=1e-5) for mean in means[1:])


@pytest.mark.slow
def test_compiled_masks_are_those_of_eager_and_rates_do_not_recompile() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = nn.Sequential(DropPath(0.5), StochasticDepth(0.5, "batch"), DropPath(0.5, False)), torch.randn(64, 3)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for k in (0.5, 0.9, 1.0):
        for layer in model:
            layer.keep_prob = k  # type: ignore[assignment]
        assert torch.equal(seeded(2, compiled, x), seeded(2, model, x))
    assert counter.frame_count == 1
    function = torch.compile(lambda x: FORMS["batch"](FORMS["drop_path"](x, 0.3), 0.1), fullgraph=True)
    expected = seeded(5, lambda x: FORMS["batch"](FORMS["drop_path"](x, 0.3), 0.1), x)
    torch.testing.assert_close(seeded(5, function, x), expected)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_rates_outside_the_unit_interval(p: float) -> None:
    message = rf"^drop probability has to be between 0 and 1, but got {p}$"
    for call in (
        lambda: drop_path(torch.ones(2), p),
        lambda: DropPath(p),
        lambda: stochastic_depth(torch.ones(2), p, "row", False),
        lambda: StochasticDepth(p, "row"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    layer = DropPath(0.25)
    with pytest.raises(ValueError, match="probability has to be between 0 and 1, but got"):
        layer.drop_prob = p
    assert layer.drop_prob == 0.25
    with pytest.raises(ValueError, match=r"^keep_prob must be in \[0, 1\], got"):
        DropPath(keep_prob=p)


def test_other_errors() -> None:
    x, mode = torch.ones(2, 3), r"^mode has to be either 'batch' or 'row', but got column$"
    with pytest.raises(ValueError, match=mode):
        stochastic_depth(x, 0.5, "column", training=False)
    with pytest.raises(ValueError, match=mode):
        StochasticDepth(0.5, "column")
    layer = StochasticDepth(0.5, "row")
    layer.mode = "column"
    with pytest.raises(ValueError, match=mode):
        layer(x)
    with pytest.raises(
        TypeError, match=r"^give the rate as drop_prob or as keep_prob, not both: got drop_prob=0.0 and"
    ):
        DropPath(0.0, keep_prob=0.9)
    with pytest.raises(TypeError, match=r"^give the rate as p or as keep_prob, not both: got p=0.5 and keep_prob=0.9$"):
        stochastic_depth(x, 0.5, "row", keep_prob=0.9)
    for name, call in (("drop_prob", drop_path), ("p", stochastic_depth)):
        for rate in ("half", None):
            message = rf"^{name} must be a number or a tensor, got {type(rate).__name__}$"
            with pytest.raises(TypeError, match=message):
                call(x, rate)
    with pytest.raises(ValueError, match=r"^drop_path: input must have its samples in the first dimension, \(B, ...\)"):
        drop_path(torch.tensor(1.0), 0.5, True)
    with pytest.raises(
        RuntimeError, match=r"^result type Float can't be cast to the desired output type Long: drop_path"
    ):
        drop_path(torch.ones(2, dtype=torch.int64), 0.5, True)
    with pytest.raises(TypeError, match=r"^generator must be a torch.Generator or None, got int$"):
        DropPath(0.5, generator=3)  # type: ignore[arg-type]

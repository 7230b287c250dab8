"""Frozen masks: the same in every forward, whatever the batch, checkpointed or not."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
import torchdrop.functional as F
from tests.seeding import (
    FAMILY,
    agree,
    every_layer,
    gradients,
    reentrant_or_not,
    row_masks,
    seeded,
    shape_of,
    small_and_large,
)
from torchdrop import random

"""What PyTorch itself does at the first use of forward mode and of the compiler."""


class Twice(nn.Module):
    """One layer called twice, another once, a function, and something non-linear after each."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.drop, self.other = torchdrop.Dropout(0.5), torchdrop.Dropout(0.5)
        self.use_reentrant, self.runs = use_reentrant, 0

    def first(self, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.tanh(self.linear(self.drop(x))) + 1.0

    def second(self, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.sin(self.linear(self.drop(F.dropout(self.other(x), 0.25)))) + 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.second(self.first(x))
        x = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        return checkpoint(self.second, x, use_reentrant=self.use_reentrant)


class Calls(nn.Module):
    """What every dropout of a forward makes of ones: one layer twice and a function twice."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = torchdrop.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.drop(x), self.drop(x), F.dropout(x), F.dropout(x)], 1)


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing of `frozen_masks` stays behind."""
    assert not random.frozen
    yield
    assert not random.frozen


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )


@pytest.mark.usefixtures("clean")
class TestFrozen:
    @every_layer
    @small_and_large
    def test_same_masks_in_every_forward(self, name: str, large: bool) -> None:
        model, x = nn.Sequential(FAMILY[name][0]()), torch.randn(shape_of(name, large))
        with torchdrop.frozen_masks(model, seed=1):
            y, again = model(x), model(x)
        assert torch.equal(y, again)
        assert not torch.equal(y, x)
        assert not torch.equal(model(x), y)

    def test_does_not_depend_on_the_generators_state(self) -> None:
        model, x = Twice(), torch.randn(4, 16)
        with torchdrop.frozen_masks(model, seed=1):
            y = seeded(7, model, x)
            assert torch.equal(seeded(8, model, x), y)
        with torchdrop.frozen_masks(model, seed=1):
            assert torch.equal(model(x), y)

    @pytest.mark.parametrize(("seed", "other"), [(1, 2), (0, -1), (0, 2**32), (1, 2**63), (2**63 - 1, -(2**63))])
    def test_seeds_differ(self, seed: int, other: int) -> None:
        model, outputs = Calls(), []
        for number in (seed, other):
            with torchdrop.frozen_masks(model, seed=number):
                outputs.append(model(torch.ones(2, 64)))
        assert not any(torch.equal(a, b) for a, b in zip(*(y.unbind(1) for y in outputs), strict=True))

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [(torchdrop.Dropout(), (64, 24)), (torchdrop.Dropout2d(), (64, 24, 2, 2)), (torchdrop.AlphaDropout(), (64, 24)),
         (torchdrop.GaussianDropout(), (64, 24)), (torchdrop.Dropout(), (64, 1024))],
    )  # fmt: skip
    def test_a_smaller_batch_has_the_first_masks(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        model, x = nn.Sequential(layer), torch.randn(shape)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(x)
            for size in (1, 7, 64):
                assert torch.equal(model(x[:size]), y[:size])
        assert len(row_masks(y)) == 64 or isinstance(layer, (torchdrop.GaussianDropout, torchdrop.AlphaDropout))

    def test_every_call_in_a_forward_has_its_own_mask(self) -> None:
        model, x = Calls(), torch.ones(2, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y, again = model(x), model(x)
        assert torch.equal(y, again)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(y.unbind(1), 2))

    def test_submodule_called_directly(self) -> None:
        model, x = Calls(), torch.ones(2, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y = model.drop(x)
            model(x)
            assert torch.equal(model.drop(x), y)
            assert torch.equal(model.drop(x[:1]), y[:1])

    def test_modules_differ_by_their_names(self) -> None:
        model, x = nn.ModuleDict({"a": torchdrop.Dropout(), "b": torchdrop.Dropout()}), torch.ones(64)
        with torchdrop.frozen_masks(model, seed=1):
            assert not torch.equal(model["a"](x), model["b"](x))

    def test_layer_itself_as_the_model(self) -> None:
        layer, x = torchdrop.Dropout(), torch.ones(64)
        with torchdrop.frozen_masks(layer):
            assert torch.equal(layer(x), layer(x))

    def test_what_is_outside_the_model_stays_random(self) -> None:
        model, x = Calls(), torch.ones(1, 64)
        with torchdrop.frozen_masks(model, seed=1):
            model(x)
            assert not torch.equal(F.dropout(x), F.dropout(x))
            assert torch.equal(seeded(7, torchdrop.Dropout(), x), seeded(7, torchdrop.Dropout(), x))

    def test_layers_with_a_generator_follow_that(self) -> None:
        layer = torchdrop.Dropout(generator=torch.Generator().manual_seed(5))
        model, x = nn.Sequential(layer, torchdrop.Dropout(0.0)), torch.ones(64)
        with torchdrop.frozen_masks(model, seed=1):
            y, again = model(x), model(x)
        assert not torch.equal(y, again)
        layer.generator.manual_seed(5)
        assert torch.equal(layer(x), y)

    def test_changing_a_rate_changes_no_other_mask(self) -> None:
        model, x = nn.Sequential(torchdrop.Dropout(0.0), torchdrop.Dropout(0.5)), torch.ones(64)
        with torchdrop.frozen_masks(model, seed=1):
            second = model(x)
            model[0].p = 0.3
            both = model(x)
        assert torch.equal((both != 0) & (second != 0), both != 0)
        assert not torch.equal(both != 0, second != 0)

    def test_inner_context_wins(self) -> None:
        model, x = Calls(), torch.ones(1, 64)
        with torchdrop.frozen_masks(model, seed=2):
            alone = model(x)
        with torchdrop.frozen_masks(model, seed=1):
            outer = model(x)
            with torchdrop.frozen_masks(model, seed=2):
                assert torch.equal(model(x), alone)
            assert torch.equal(model(x), outer)
        assert not torch.equal(outer, alone)

    def test_two_models(self) -> None:
        left, right, x = Calls(), Calls(), torch.ones(1, 64)
        with torchdrop.frozen_masks(left, seed=1), torchdrop.frozen_masks(right, seed=2):
            outputs = [left(x), right(x), left(x), right(x)]
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])
        assert not torch.equal(outputs[0], outputs[1])
        with torchdrop.frozen_masks(left, seed=2):
            assert torch.equal(left(x), outputs[1])

    def test_a_part_of_a_model(self) -> None:
        model = nn.Sequential(nn.Sequential(torchdrop.Dropout()), nn.Sequential(torchdrop.Dropout()))
        x = torch.ones(256)
        with torchdrop.frozen_masks(model[0]):
            inner = [model[0](x), model[0](x)]
            whole = [model(x), model(x)]
        assert torch.equal(*inner)
        assert all(torch.equal((y != 0) & (inner[0] != 0), y != 0) for y in whole)
        assert not torch.equal(*whole)

    def test_restores_after_an_exception_inside(self) -> None:
        model, x = Calls(), torch.ones(1, 64)
        with pytest.raises(IndexError), torchdrop.frozen_masks(model):
            model(x)[1]
        assert hooks_of(model) == 0
        assert not torch.equal(model(x), model(x))

    def test_removes_its_hooks_and_leaves_others(self) -> None:
        model = Calls()
        model.register_forward_hook(lambda *_: None)
        with torchdrop.frozen_masks(model):
            assert hooks_of(model) > 1
            model(torch.ones(1, 8))
        assert hooks_of(model) == 1
        assert set(model.state_dict()) == set()

    def test_forward_that_fails_does_not_disturb_the_next(self) -> None:
        class Fragile(Calls):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                if x.dim() == 1:
                    raise KeyError
                return y

        model, x = nn.Sequential(Fragile()), torch.ones(1, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(x)
            with pytest.raises((KeyError, IndexError)):
                model(x[0])
            assert torch.equal(model(x), y)

    def test_hook_that_fails_before_ours_does_not_disturb_the_rest_of_the_forward(self) -> None:
        class Forgiving(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fragile, self.drop = nn.Identity(), torchdrop.Dropout()

            def forward(self, x: Tensor) -> Tensor:
                with contextlib.suppress(KeyError):
                    x = self.fragile(x)
                return torch.stack([self.drop(x), F.dropout(x)])

        def fail(module: nn.Module, args: Any) -> None:
            raise KeyError

        model, x = Forgiving(), torch.ones(64)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(x)
            model.fragile.register_forward_pre_hook(fail, prepend=True)
            assert torch.equal(model(x), y)
            assert torch.equal(model(x), y)

    def test_gradient_agrees_with_finite_differences(self) -> None:
        model = nn.Sequential(
            nn.Linear(6, 5), torchdrop.GaussianDropout(0.2), nn.Tanh(), torchdrop.AlphaDropout(0.3), nn.Linear(5, 3),
            torchdrop.Dropout(), nn.Sigmoid(),
        ).double()  # fmt: skip
        x = torch.randn(4, 6, dtype=torch.float64)
        names, values = zip(*model.named_parameters(), strict=True)

        def cost(*values: Tensor) -> Tensor:
            return functional_call(model, dict(zip(names, values, strict=True)), (x,)).square().sum()

        with torchdrop.frozen_masks(model, seed=1):
            assert torch.autograd.gradcheck(cost, values)
            assert torch.autograd.gradgradcheck(cost, values)
            model.zero_grad()
            model(x).square().sum().backward()
            frozen = torch.cat([p.grad.flatten() for p in values if p.grad is not None])
            assert frozen.numel() == sum(p.numel() for p in values)
            slopes = torch.func.grad(cost, argnums=tuple(range(len(values))))(*values)
            assert torch.allclose(torch.cat([s.flatten() for s in slopes]), frozen, rtol=1e-12)

    def test_vmap_shares_the_masks(self) -> None:
        model, x = Calls(), torch.ones(5, 1, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(x[0])
            for randomness in ("same", "different", "error"):
                assert torch.equal(vmap(model, randomness=randomness)(x), y.expand(5, *y.shape))
            assert torch.equal(model(x[0]), y)

    def test_gradient_of_each_sample(self) -> None:
        model, x = Twice().double(), torch.randn(3, 1, 16, dtype=torch.float64)
        parameters = dict(model.named_parameters())

        def cost(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, p, x).sum()

        with torchdrop.frozen_masks(model, seed=1):
            slopes = vmap(grad(cost), in_dims=(None, 0))(parameters, x)["linear.weight"]
            for i in range(3):
                (expected,) = torch.autograd.grad(model(x[i]).sum(), model.linear.weight)
                assert torch.allclose(slopes[i], expected, rtol=1e-12)

    def test_eval_draws_nothing_and_says_so(self) -> None:
        model, x = nn.Sequential(torchdrop.Dropout()).eval(), torch.ones(8)
        message = "^frozen_masks: no mask was drawn in this context"
        with pytest.warns(UserWarning, match=message), torchdrop.frozen_masks(model):
            assert model(x) is x

    @pytest.mark.parametrize("model", [nn.Linear(8, 8), torchdrop.Dropout()])
    def test_warns_at_the_callers_line_where_no_mask_was_drawn(self, model: nn.Module) -> None:
        with pytest.warns(UserWarning, match="no mask was drawn") as caught, torchdrop.frozen_masks(model):
            F.dropout(torch.ones(8))
        assert [warning.filename for warning in caught] == [__file__]

    def test_refuses_stock_dropout_by_name(self) -> None:
        model = nn.Sequential(torchdrop.Dropout(), nn.Sequential(nn.Dropout(), nn.AlphaDropout()))
        with (
            pytest.raises(ValueError, match=r"torch\.nn, whose masks cannot be frozen: 1\.0, 1\.1\. Put torchdrop's"),
            torchdrop.frozen_masks(model),
        ):
            pass
        assert hooks_of(model) == 0

    @pytest.mark.parametrize("wrong", [None, 3, F.dropout, nn.Dropout])
    def test_model_of_the_wrong_type(self, wrong: Any) -> None:
        with (
            pytest.raises(TypeError, match=f"^model must be a torch.nn.Module, got {type(wrong).__name__}$"),
            torchdrop.frozen_masks(wrong),
        ):
            pass

    @pytest.mark.parametrize("wrong", [None, 1.0, "1", True, torch.tensor(1)])
    def test_seed_of_the_wrong_type(self, wrong: Any) -> None:
        with (
            pytest.raises(TypeError, match=f"^seed must be an integer, got {type(wrong).__name__}$"),
            torchdrop.frozen_masks(Calls(), seed=wrong),
        ):
            pass

    def test_any_integer_is_a_seed(self) -> None:
        x = torch.ones(2, 64)
        for seed in (2**64, -(2**63) - 1, 10**40):
            model = Calls()
            with torchdrop.frozen_masks(model, seed=seed):
                assert torch.equal(model(x), model(x))

    def test_shapes_alone(self) -> None:
        model = nn.Sequential(torchdrop.Dropout())
        with torchdrop.frozen_masks(model):
            assert model(torch.ones(4, 8, device="meta")).shape == (4, 8)

    @pytest.mark.slow
    def test_compiled_model_given_as_compiled(self) -> None:
        model = torch.compile(nn.Sequential(nn.Linear(64, 64), torchdrop.Dropout(), nn.Tanh(), torchdrop.Dropout()))
        x = torch.randn(4, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y, again = model(x), model(x)
        with torchdrop.frozen_masks(model, seed=2):
            other = model(x)
        assert torch.equal(y, again)
        assert (y == 0).any()
        assert not torch.equal(y, other)


def several_costs(how: str, model: Twice, x: Tensor) -> tuple[Tensor, ...]:
    """Gradients at x and at the weight, in the ways in which forwards and backwards take turns."""
    x, model.linear.weight.grad = x.detach().clone().requires_grad_(), None
    with torchdrop.frozen_masks(model, seed=1):
        cost = model(x).square().sum()
        if how == "a forward without gradients between":
            with torch.no_grad():
                model(3.0 * x)
        elif how == "two forwards, one backward":
            cost = cost + model(2.0 * x).square().sum()
        elif how == "two forwards, two backwards":
            other = model(2.0 * x).square().sum()
            cost.backward()
            cost = other
        elif how == "steps":
            cost.backward()
            cost = model(2.0 * x).square().sum()
        if how != "backward after the context":
            cost.backward()
    if how == "backward after the context":
        cost.backward()
    assert x.grad is not None
    assert model.linear.weight.grad is not None
    return cost.detach(), x.grad, model.linear.weight.grad.clone()


def test_no_32_bits_of_a_seed_decide() -> None:
    """Seeds whose hashes have their first 32 bits in common."""
    model, x = nn.Sequential(torchdrop.Dropout(0.5)), torch.ones(300)
    for first, second in ((22061, 49026), (1955, 54946)):
        masks = []
        for seed in (first, second, first):
            with torchdrop.frozen_masks(model, seed):
                masks.append(model(x))
        assert torch.equal(masks[0], masks[2])
        assert not torch.equal(masks[0], masks[1])


@pytest.mark.usefixtures("clean")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
class TestFrozenCheckpoint:
    @reentrant_or_not
    @pytest.mark.parametrize(
        "how",
        ["one", "steps", "a forward without gradients between", "two forwards, one backward",
         "two forwards, two backwards", "backward after the context"],
    )  # fmt: skip
    def test_gradient_is_that_of_the_plain_run(self, how: str, use_reentrant: bool) -> None:
        x = torch.randn(4, 16, dtype=torch.float64)
        plain, saving = Twice().double(), Twice(use_reentrant).double()
        saving.load_state_dict(plain.state_dict())
        expected = several_costs(how, plain, x)
        assert agree(several_costs(how, saving, x), expected)
        assert saving.runs > plain.runs

    @reentrant_or_not
    def test_a_layer_or_the_model_checkpointed_from_outside(self, use_reentrant: bool) -> None:
        model, x = Twice().double(), torch.randn(4, 16, dtype=torch.float64)
        with torchdrop.frozen_masks(model, seed=1):
            for part in (model, lambda x: model.drop(x * model.linear.weight.sum()).sin()):
                expected = gradients(part, model.linear.weight, x)
                run = lambda x: checkpoint(part, x, use_reentrant=use_reentrant)  # noqa: B023, E731
                assert agree(gradients(run, model.linear.weight, x), expected)

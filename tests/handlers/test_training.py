"""Training of replaced models: the random calls that modules make in their own code, one kind after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
import torchdrop.functional as ours
from tests.mc_models import Draws, call
from tests.seeding import in_threads, seeded
from torchdrop import keep_probs, replace, set_keep_prob
from torchdrop.core.torch_state import function_modes
from torchdrop.handlers import training

pytestmark = pytest.mark.usefixtures("one_thread")


def module(forward: Callable[..., Any], **children: Any) -> nn.Module:
    """A module of a class of its own, whose forward is this function."""
    made: nn.Module = type("Made", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def replaced(forward: Callable[..., Any], **children: Any) -> nn.Module:
    model = module(forward, **children)
    assert "" in replace(model).reached
    return model.train()


def dropout(self: Any, x: Tensor) -> Tensor:
    return F.dropout(x, 0.25, self.training)


def dropout_of_torch(self: Any, x: Tensor) -> Tensor:
    return torch.dropout(x, 0.25, self.training)


def dropout_in_place(self: Any, x: Tensor) -> Tensor:
    return F.dropout(x * 1, 0.25, self.training, inplace=True)


def dropout_1d(self: Any, x: Tensor) -> Tensor:
    return F.dropout1d(x, 0.25, self.training)


def dropout_2d(self: Any, x: Tensor) -> Tensor:
    return F.dropout2d(x.unsqueeze(-1), 0.25, self.training).squeeze(-1)


def dropout_3d(self: Any, x: Tensor) -> Tensor:
    return F.dropout3d(x[..., None, None], 0.25, self.training)[..., 0, 0]


def feature_dropout(self: Any, x: Tensor) -> Tensor:
    return torch.feature_dropout(x, 0.25, self.training)


def alpha_dropout(self: Any, x: Tensor) -> Tensor:
    return F.alpha_dropout(x, 0.25, self.training)


def feature_alpha_dropout(self: Any, x: Tensor) -> Tensor:
    return F.feature_alpha_dropout(x, 0.25, self.training)


RATED: dict[Callable[..., Any], tuple[str, Callable[[Tensor], Tensor]]] = {
    dropout: ("dropout:0", lambda x: ours.dropout(x, 0.25)),
    dropout_of_torch: ("dropout:0", lambda x: ours.dropout(x, 0.25)),
    dropout_in_place: ("dropout:0", lambda x: ours.dropout(x, 0.25)),
    dropout_1d: ("dropout1d:0", lambda x: ours.dropout1d(x, 0.25)),
    dropout_2d: ("dropout2d:0", lambda x: ours.dropout1d(x, 0.25)),
    dropout_3d: ("dropout3d:0", lambda x: ours.dropout1d(x, 0.25)),
    feature_dropout: ("feature_dropout:0", lambda x: ours.dropout1d(x, 0.25)),
    alpha_dropout: ("alpha_dropout:0", lambda x: ours.alpha_dropout(x, 0.25, True)),
    feature_alpha_dropout: ("feature_alpha_dropout:0", lambda x: ours.feature_alpha_dropout(x, 0.25, True)),
}
"""Modules with the name of their call, and torchdrop's function of the same rate."""

every_rated = pytest.mark.parametrize("forward", RATED, ids=lambda forward: forward.__name__)


def data(*shape: int) -> Tensor:
    return torch.randn(shape or (6, 5, 4), generator=torch.Generator().manual_seed(1))


def with_gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), slope


@every_rated
class TestRated:
    def test_masks_and_gradients_are_those_of_our_function(self, forward: Any) -> None:
        model, (name, function) = replaced(forward), RATED[forward]
        got, expected = (seeded(3, with_gradient, f, data()) for f in (model, function))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert not torch.equal(got[0], data())
        assert dict(keep_probs(model)) == {name: 0.75}

    def test_in_eval_mode_nothing_is_done(self, forward: Any) -> None:
        model = replaced(forward).eval()
        with Draws() as draws:
            y = model(data())
        assert torch.equal(y, data())
        assert not draws.operators

    def test_a_rate_set_by_name(self, forward: Any) -> None:
        """It holds from the next call on; 1 keeps all, and draws as much as any other rate."""
        model, (name, _) = replaced(forward), RATED[forward]
        plain = seeded(3, model, data())
        set_keep_prob(model, {name: 0.75})
        assert torch.equal(seeded(3, model, data()), plain)
        after = torch.rand(3)
        set_keep_prob(model, {name: 1.0})
        torch.testing.assert_close(seeded(3, model, data()), data())
        assert torch.equal(torch.rand(3), after)
        set_keep_prob(model, {name: 0.25})
        kept = (seeded(3, model, data(99, 50, 4)) == data(99, 50, 4) / 0.25).float().mean()
        assert "alpha" in name or abs(float(kept) - 0.25) < 0.05


class TestRandomTensors:
    @pytest.mark.parametrize(
        "forward",
        [
            lambda self, x: torch.rand_like(x),
            lambda self, x: torch.rand(x.shape),
            lambda self, x: torch.empty_like(x).uniform_(),
            lambda self, x: torch.randn(x.shape),
            lambda self, x: torch.randn_like(x),
            lambda self, x: torch.normal(0.0, 1.0, x.shape),
            lambda self, x: torch.empty_like(x).normal_(),
            lambda self, x: torch.bernoulli(torch.full_like(x, 0.3)),
            lambda self, x: torch.full_like(x, 0.3).bernoulli(),
            lambda self, x: torch.empty_like(x).bernoulli_(0.3),
            lambda self, x: torch.empty_like(x).exponential_(),
            lambda self, x: F.gumbel_softmax(x),
            lambda self, x: F.rrelu(x, training=self.training),
        ],
    )
    def test_numbers_come_from_a_key(self, forward: Any) -> None:
        model = replaced(forward)
        with Draws() as draws:
            first = seeded(3, model, data())
        assert draws.sizes == [2]
        assert torch.equal(seeded(3, model, data()), first)
        assert not torch.equal(model(data()), first)
        assert not keep_probs(model)

    def test_their_distribution(self) -> None:
        model = replaced(lambda self, x: (torch.rand_like(x), torch.randn_like(x), torch.empty_like(x).bernoulli_(0.3)))
        uniform, normal, bits = model(torch.empty(100_000))
        assert uniform.mean() == pytest.approx(0.5, abs=0.01)
        assert 0.0 <= uniform.min() < uniform.max() < 1.0
        assert (normal.mean(), normal.std()) == (pytest.approx(0.0, abs=0.02), pytest.approx(1.0, abs=0.02))
        assert set(bits.unique().tolist()) == {0.0, 1.0}
        assert bits.mean() == pytest.approx(0.3, abs=0.01)

    def test_their_gradients_are_those_of_torch(self) -> None:
        mean = torch.ones(4, requires_grad=True)
        model = replaced(lambda self, x: (torch.rand(4, requires_grad=True), torch.normal(mean, 1.0) * mean.detach()))
        leaf, noise = model(data())
        assert leaf.requires_grad
        assert leaf.is_leaf
        assert not noise.requires_grad, "torch.normal has a gradient of 0"

    def test_complex_numbers_are_left_alone(self) -> None:
        model = replaced(lambda self, x: torch.rand(4, dtype=torch.complex64))
        assert torch.equal(seeded(3, model, data()), seeded(3, torch.rand, 4, dtype=torch.complex64))

    def test_a_generator_or_a_given_output_is_left_alone(self) -> None:
        generator = torch.Generator()
        model = replaced(lambda self, x: torch.rand(9, generator=generator))
        generator.manual_seed(4)
        assert torch.equal(model(data()), torch.rand(9, generator=generator.manual_seed(4)))
        model = replaced(lambda self, x: torch.rand(9, out=torch.empty(9)))
        assert torch.equal(seeded(4, model, data()), seeded(4, torch.rand, 9))


@pytest.mark.parametrize(
    ("function", "dims"),
    [(F.dropout, 3), (F.dropout1d, 3), (F.dropout2d, 4), (F.dropout3d, 5), (F.alpha_dropout, 3),
     (F.feature_alpha_dropout, 3)],
)  # fmt: skip
def test_defaults_are_those_of_torch(function: Any, dims: int) -> None:
    """alpha_dropout and feature_alpha_dropout are off unless they are told otherwise."""
    x = data(*(6, 50, 4, 1, 1)[:dims])
    assert torch.equal(replaced(lambda self, x: function(x))(x), x) == torch.equal(function(x), x)


def numbered(self: Any, x: Tensor) -> Tensor:
    x = F.dropout(x, 0.25, self.training)
    x = F.dropout(x, 0.0, self.training)
    return F.dropout(x, 0.5, True) + F.dropout(x, 0.5, False)


def test_calls_are_numbered_in_the_order_of_the_code() -> None:
    """A call at rate 0 is one that could drop; one that is never in train mode is not."""
    model = replaced(numbered)
    model(data())
    assert dict(keep_probs(model)) == {"dropout:0": 0.75, "dropout:1": 1.0, "dropout:2": 0.5}
    set_keep_prob(model, {"dropout:0": 1.0, "dropout:1": 0.0})
    assert not model(data()).any()


class FailsError(Exception):
    pass


def failing(self: Any, x: Tensor) -> Tensor:
    F.dropout(x, 0.5, self.training)
    raise FailsError


def test_nothing_stays_on_after_an_exception() -> None:
    inner = module(failing)
    model = replaced(lambda self, x: self.inner(F.dropout(x, 0.5)), inner=inner)
    for _ in range(2):
        with pytest.raises(FailsError):
            model(data())
        assert function_modes() == 0
        assert not training._running.modules
    handle = inner.register_forward_pre_hook(lambda m, args: failing(m, *args))
    with pytest.raises(FailsError):
        model(data())
    handle.remove()
    assert function_modes() == 0
    assert torch.equal(seeded(3, F.dropout, data()), seeded(3, nn.Dropout(0.5), data()))


class TestNested:
    def test_a_call_belongs_to_the_innermost_module(self) -> None:
        """Also if that does not serve it because it is in eval mode."""
        model = replaced(
            lambda self, x: self.second(F.dropout(self.first(x), 0.5, self.training)),
            first=module(dropout), second=module(alpha_dropout),
        )  # fmt: skip
        model(data())
        assert dict(keep_probs(model)) == {"dropout:0": 0.5, "first.dropout:0": 0.75, "second.alpha_dropout:0": 0.75}
        set_keep_prob(model, {"dropout:0": 1.0, "second": 1.0, "first": 0.0})
        assert not model(data()).any()
        model.first.eval()
        assert torch.equal(model(data()), data())

    def test_a_layer_of_torchdrop_draws_its_own_mask(self) -> None:
        model = replaced(lambda self, x: self.drop(F.dropout(x, 0.5, self.training)), drop=nn.Dropout(0.5))
        expected = seeded(3, lambda x: ours.dropout(ours.dropout(x, 0.5), 0.5), data())
        assert torch.equal(seeded(3, model, data()), expected)
        set_keep_prob(model, {"dropout:0": 1.0})
        expected = seeded(3, lambda x: (ours.dropout(x, 0.0), ours.dropout(x, 0.5))[1], data())
        assert torch.equal(seeded(3, model, data()), expected)

    def test_one_module_in_two_places_and_within_itself(self) -> None:
        """Its calls have the names of one call of it: the rate holds for each."""

        def twice(self: Any, x: Tensor, again: bool = True) -> Tensor:
            x = F.dropout(x, 0.5, self.training)
            return self(x, False) if again else x

        model = nn.Sequential(replaced(twice))
        model.append(model[0])
        model(data())
        assert dict(keep_probs(model)) == {"0.dropout:0": 0.5}
        with Draws() as draws:
            model(data())
        assert draws.sizes == [2] * 4
        set_keep_prob(model, {"1.dropout:0": 1.0})
        assert torch.equal(model(data()), data())

    def test_a_skipped_layer(self) -> None:
        """A coin of the outer module decides; the layers that run draw theirs."""

        def forward(self: Any, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not self.training or torch.rand([]) >= 0.5:
                    x = layer(x)
            return x

        model = replaced(forward, layers=nn.ModuleList(module(dropout) for _ in range(3)))
        counts = set()
        for _ in range(60):
            with Draws() as draws:
                model(data())
            assert set(draws.sizes) == {2}
            counts.add(len(draws.sizes))
        assert counts == {3, 4, 5, 6}
        assert set(keep_probs(model)) == {f"layers.{i}.dropout:0" for i in range(3)}


def recomputed(reentrant: bool | None) -> Callable[..., Tensor]:
    """A forward that checkpoints a part of itself."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if reentrant is None:
            return self.part(x)
        return checkpoint(self.part, x, use_reentrant=reentrant)  # type: ignore[return-value]

    return forward


def part(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(F.dropout(self.fc(x), 0.5, self.training)) * x


reentrant_or_not = pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])


def checkpointing(reentrant: bool | None) -> nn.Module:
    torch.manual_seed(0)
    kind = type("Checkpointing", (nn.Module,), {"forward": recomputed(reentrant), "part": part})
    model = kind()
    model.fc = nn.Linear(4, 4)
    assert replace(model).reached
    return model


def gradients(model: nn.Module, call: Callable[[Tensor], Any]) -> list[Tensor]:
    x = data().requires_grad_()
    model.zero_grad()
    y = seeded(5, call, x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item, union-attr]


class TestCheckpointing:
    @reentrant_or_not
    def test_of_modules(self, reentrant: bool) -> None:
        """Backward runs them again, and they draw the same masks again."""
        model = checkpointing(None)
        plain = gradients(model, model)
        again = gradients(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
        assert all(map(torch.equal, plain, again))
        set_keep_prob(model, {"dropout:0": 0.125})
        other = gradients(model, model)
        assert not torch.equal(plain[0], other[0])
        again = gradients(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
        assert all(map(torch.equal, other, again))

    @reentrant_or_not
    def test_by_the_code_of_a_module(self, reentrant: bool) -> None:
        """Backward does not run its forward again, where its calls would be served, so they keep PyTorch's masks."""
        model, stock = checkpointing(reentrant), checkpointing(None)
        replace(stock, to="torch")
        served, expected = gradients(model, model), gradients(stock, stock)
        assert all(map(torch.equal, served, expected))

    @reentrant_or_not
    def test_a_rate_of_what_backward_would_run_unseen_is_refused(self, reentrant: bool) -> None:
        model = checkpointing(reentrant)
        set_keep_prob(model, {"dropout:0": 0.5})
        message = r"the code of Checkpointing makes the call 'dropout:0' within activation checkpointing, which makes"
        with pytest.raises(RuntimeError, match=message):
            gradients(model, model)
        assert function_modes() == 0
        model = checkpointing(reentrant)
        with torchdrop.disabled(model), pytest.raises(RuntimeError, match="activation checkpointing"):
            gradients(model, model)


class TestTransforms:
    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_vmap(self, randomness: str) -> None:
        model = replaced(dropout)
        y = torch.func.vmap(model, randomness=randomness)(torch.ones(5, 40, 3))
        assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert torch.equal(y[0], y[1]) == (randomness == "same")

    def test_vmap_where_drawing_is_forbidden(self) -> None:
        model = replaced(dropout)
        with pytest.raises(RuntimeError, match="randomness error mode"):
            torch.func.vmap(model)(torch.ones(5, 4))
        assert function_modes() == 0
        assert torch.equal(torch.func.vmap(model.eval())(torch.ones(5, 4)), torch.ones(5, 4))

    def test_gradients_of_samples(self) -> None:
        """Those of a functional call, by vmap of grad: each sample's gradient has its own mask."""
        model = replaced(lambda self, x: F.dropout(self.fc(x), 0.5, self.training), fc=nn.Linear(4, 400, bias=False))
        parameters = dict(model.named_parameters())

        def loss(values: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(model, values, (x,)).sum()

        x = torch.ones(3, 4)
        slopes = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, x)["fc.weight"]
        assert set(slopes.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(slopes[0], slopes[1])
        value, slope = torch.func.grad_and_value(loss)(parameters, x[0])
        assert value["fc.weight"].shape == (400, 4)
        assert slope.dim() == 0

    def test_forward_mode(self) -> None:
        """The derivative along a direction has the mask of the value."""
        model = replaced(dropout)
        y, slope = seeded(3, torch.func.jvp, model, (data(),), (torch.ones_like(data()),))
        assert torch.equal(y, seeded(3, model, data()))
        torch.testing.assert_close(slope, (y != 0) / 0.75)

    def test_autocast(self) -> None:
        model = replaced(lambda self, x: F.dropout(self.fc(x), 0.5, self.training), fc=nn.Linear(4, 40))
        with torch.autocast("cpu", torch.bfloat16):
            y = seeded(3, model, data(7, 4))
            plain = model.eval()(data(7, 4))
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, seeded(3, ours.dropout, plain, 0.5))

    def test_half_types_and_float64(self) -> None:
        model = replaced(dropout)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            y = seeded(3, model, data().to(dtype))
            assert torch.equal(y, seeded(3, ours.dropout, data().to(dtype), 0.25))


def test_threads_serve_their_own_modules() -> None:
    """One model in two threads, in train mode: each call draws a key of its own, and is given to its own module."""
    model = nn.Sequential(replaced(dropout), replaced(alpha_dropout))

    def work(_: int) -> list[bytes]:
        return [call(model, data()).numpy().tobytes() for _ in range(100)]

    masks = [mask for result in in_threads(work) for mask in result]
    assert len(set(masks)) == 200
    assert dict(keep_probs(model)) == {"0.dropout:0": 0.75, "1.alpha_dropout:0": 0.75}
    assert not training._running.modules


class Attends(nn.Module):
    """Calls the function of nn.MultiheadAttention under a flag of its own, or within a checkpoint of its own."""

    def __init__(self, flag: bool = True, checkpointed: bool = False) -> None:
        super().__init__()
        self.inner, self.flag, self.checkpointed = nn.MultiheadAttention(8, 2), flag, checkpointed

    def attend(self, x: Tensor) -> Tensor:
        m = self.inner
        out, _ = F.multi_head_attention_forward(
            x, x, x, 8, 2, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.125, m.out_proj.weight,
            m.out_proj.bias, training=self.flag, need_weights=False,
        )  # fmt: skip
        return out

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x)


@pytest.mark.parametrize("model", [Attends(flag=False), Attends(checkpointed=True)], ids=["flag", "checkpoint"])
def test_the_function_of_multihead_attention_keeps_its_flag_and_its_rate(model: nn.Module) -> None:
    x = torch.randn(7, 3, 8)
    expected = seeded(3, model, x)
    replace(model)
    assert torch.allclose(seeded(3, model, x), expected, atol=1e-6)

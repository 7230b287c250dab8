"""The survey of a model leaves no trace: in its arguments, its state, its hooks, or its gradients."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests import TORCH
from tests.mc_models import unchanged

pytestmark = pytest.mark.usefixtures("one_thread")


class Of(nn.Module):
    """A linear layer and dropout around a function of the module and its input."""

    def __init__(self, function: Callable[[Of, Tensor], Tensor], p: float = 0.5, **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.drop, self._function = nn.Linear(4, 4), nn.Dropout(p), function
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self._function(self, self.drop(self.linear(x)), *args)


def identity(model: nn.Module, y: Tensor) -> Tensor:
    return y


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def predicted(model: nn.Module, *args: Any, **options: Any) -> torchdrop.Prediction:
    return torchdrop.mc_predict(model, args or X, samples=4, seed=0, keep_samples=True, **options)


def passes(model: nn.Module, *args: Any, count: int = 4) -> Tensor:
    with torchdrop.mc_dropout(model, seed=0):
        return torch.stack([model(*(args or (X,))) for _ in range(count)])


# Arguments.


class Cache:
    """Holds tensors where PyTorch's trees do not look."""

    def __init__(self, *values: Tensor) -> None:
        self.values = list(values)


def appended(model: nn.Module, y: Tensor, cache: Any) -> Tensor:
    values = cache.values if isinstance(cache, Cache) else cache["values"] if isinstance(cache, dict) else cache
    values.append(y)
    return torch.stack(values).sum(0) if all(len(value) == len(y) for value in values) else torch.cat(values)


@pytest.mark.parametrize(
    "make", [Cache, lambda *v: list(v), lambda *v: {"values": list(v)}], ids=["object", "list", "dict"]
)
@pytest.mark.parametrize("filled", [False, True])
def test_an_argument_that_the_model_writes_to_has_what_the_callers_own_calls_wrote(
    make: Callable[..., Any], filled: bool
) -> None:
    model = Of(appended).eval()
    start = [torch.ones(6, 4)] * filled
    cache = make(*start)
    with torchdrop.mc_dropout(model, seed=0) as report:
        first = model(X, cache)
        model(X, cache)
    written = cache.values if isinstance(cache, Cache) else cache["values"] if isinstance(cache, dict) else cache
    assert [len(value) for value in written] == [6] * (filled + 2)
    assert torch.equal(first, torch.stack([*start, written[filled]]).sum(0))
    assert len(report.active) == 1
    assert report.replayable

    cache = make(*start)
    result = predicted(model, X, cache)
    assert torch.equal(result.samples[0], first.double().float()) or torch.allclose(result.samples[0], first)
    written = cache.values if isinstance(cache, Cache) else cache["values"] if isinstance(cache, dict) else cache
    assert len(written) == filled


def test_an_argument_that_cannot_be_copied_has_the_survey_in_the_real_call() -> None:
    model, lock = Of(lambda model, y, lock: y).eval(), threading.Lock()
    with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
        first, second = model(X, lock), model(X, lock)
    assert not torch.equal(first, second)
    assert len(report.active) == 1
    assert any("an argument of type lock cannot be copied (TypeError" in note for note in report.notes)
    with pytest.raises(TypeError, match="an argument of type lock cannot be copied"):
        predicted(model, X, lock)


# Hooks.


def test_hooks_see_the_callers_own_calls_alone() -> None:
    model, seen = Of(identity).eval(), []
    model.linear.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model.register_forward_pre_hook(lambda module, args: seen.append("before"))
    with torchdrop.mc_dropout(model, seed=0):
        model(X)
        model(X)
    assert seen == ["before", (6, 4)] * 2


def test_hooks_that_need_gradients_have_them() -> None:
    """As packages for attributions register them: a hook on a module that puts one on its output's gradient."""
    model, gradients = Of(identity).eval(), []
    model.linear.register_forward_hook(lambda module, args, out: out.register_hook(gradients.append) and None)
    with torchdrop.mc_dropout(model, seed=0):
        model(X.clone().requires_grad_()).sum().backward()
    assert [tuple(gradient.shape) for gradient in gradients] == [(6, 4)]


def test_dropout_in_a_hook_is_served_as_any_other() -> None:
    model = Of(identity, p=0.0).eval()
    model.linear.register_forward_hook(lambda module, args, out: F.dropout(out, 0.5, training=True))
    with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
        first, second = model(X), model(X)
    assert [(source.module, source.known) for source in report.active] == [("linear", "drawn in a train-mode forward")]
    assert report.replayable
    assert not torch.equal(first, second)
    samples = predicted(model).samples
    assert samples is not None
    assert torch.allclose(samples[:2], torch.stack([first, second]))


def test_hooks_without_which_the_model_fails_run() -> None:
    model = nn.Sequential(Of(identity), nn.Linear(8, 2)).eval()
    model[0].register_forward_hook(lambda module, args, out: torch.cat([out, out], -1))
    assert passes(model).shape == (4, 6, 2)
    assert predicted(model).mean.shape == (6, 2)


def test_hooks_of_torch_compute_weights_in_the_survey_too() -> None:
    model = Of(identity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.linear)
    del model.linear.weight  # the hook makes it
    assert passes(model.eval()).shape == (4, 6, 4)


# Gradients in a forward.


class Forces(nn.Module):
    """The negative gradient of an energy with dropout, by positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()
        return -torch.autograd.grad(self.net(x).sum(), x, create_graph=self.training)[0]


def test_a_model_that_differentiates_in_its_forward() -> None:
    model, x = Forces().eval(), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    by_hand = passes(model, x.clone())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = torchdrop.mc_predict(model, x, samples=4, seed=0, keep_samples=True)
    assert result.samples is not None
    assert torch.allclose(result.samples, by_hand)
    assert not result.mean.requires_grad
    assert not x.requires_grad
    predicted(model, x, strategy="loop")
    assert not x.requires_grad
    assert len(by_hand.unique(dim=0)) == 4
    with (
        torch.no_grad(),
        torchdrop.mc_dropout(model, seed=0),
        pytest.raises(RuntimeError, match="does not require grad"),
    ):
        model(x)  # as without the context


def test_gradients_flow_through_a_pass() -> None:
    model, x = Of(identity).eval(), X.clone().requires_grad_()
    with torchdrop.mc_dropout(model, seed=0):
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert gradient.abs().sum() > 0


# State.


def kept(model: Any, y: Tensor) -> Tensor:
    model.last = y
    model.all.append(y)
    model.box["inner"].append(y)
    return y


def test_what_a_module_keeps_is_nothing_of_the_survey_and_can_be_copied() -> None:
    shared: list[Tensor] = []
    model = Of(kept, all=[], box={"inner": []}, last=None).eval()
    model.also = shared
    with unchanged(model):
        predicted(model)
    assert model.last is None
    assert model.all == []
    assert model.box == {"inner": []}
    with torch.no_grad(), torchdrop.mc_dropout(model, seed=0):
        outputs = [model(X), model(X)]
    assert model.last is outputs[1]
    assert all(one is other for one, other in zip(model.all, outputs, strict=True))
    assert len(model.box["inner"]) == 2
    copied = copy.deepcopy(model)
    torch.save(model.state_dict(), io.BytesIO())
    assert torch.equal(copied.last, outputs[1])


def counted(model: Any, y: Tensor) -> Tensor:
    model.calls += 1
    model.buffer.add_(1.0)
    model.plain.mul_(2.0)
    return y * model.calls + model.buffer + model.plain


@pytest.mark.parametrize("inference", [False, True])
def test_every_sample_starts_from_the_same_state_and_the_model_ends_as_it_was(inference: bool) -> None:
    model = Of(counted, buffer=torch.zeros(4), calls=0).eval()
    model.plain = torch.ones(4)
    context = torch.inference_mode() if inference else torch.no_grad()
    stateless = passes(Of(identity).eval()).detach()
    with context, unchanged(model):
        samples = predicted(model).samples
    assert samples is not None
    assert torch.allclose(samples, stateless * 1 + 1 + 2)
    assert torch.equal(model.plain, torch.ones(4))
    with torchdrop.mc_dropout(model, seed=0), torch.no_grad():
        first, second = model(X), model(X)  # the callers' calls write, as without the context
    assert torch.allclose(first, stateless[0] * 1 + 1 + 2)
    assert torch.allclose(second, stateless[1] * 2 + 2 + 4)


# Randomness that no seed of torch repeats.


@contextmanager
def seeded_numpy(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def test_samples_that_cannot_be_repeated_are_run_and_warned_of() -> None:
    model = Of(lambda model, y: y * (1 + np.random.rand())).eval()
    with seeded_numpy(1), pytest.warns(UserWarning, match=r"two passes with the same masks differ.*numpy"):
        result = predicted(model)
    assert result.strategy == "loop"
    assert result.samples is not None
    assert len(result.samples.unique(dim=0)) == 4


def test_an_error_of_the_model_itself_is_shown_and_is_the_only_message() -> None:
    def fails(model: nn.Module, y: Tensor) -> Tensor:
        raise KeyError("the user's own")

    model = Of(fails).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="the user's own"):
            predicted(model)
        with torchdrop.mc_dropout(model):
            for _ in range(2):
                with pytest.raises(KeyError, match="the user's own"):
                    model(X)


# Compiled code.


@pytest.mark.parametrize("how", ["whole", "part", "in place", "part in place"])
def test_compiled_models_have_the_masks_of_the_original(how: str) -> None:
    original = nn.Sequential(Of(identity), nn.Linear(4, 2)).eval()
    expected, samples = passes(original), predicted(original).samples
    model: Any = original
    if how == "whole":
        model = torch.compile(original, backend="eager")
    elif how == "part":
        model = nn.Sequential(torch.compile(original[0], backend="eager"), original[1]).eval()
    else:
        (original if how == "in place" else original[0]).compile(backend="eager")
    model(X)
    with unchanged(original):
        assert torch.equal(passes(model), expected)
        assert torch.equal(predicted(model).samples, samples)  # type: ignore[arg-type]
    assert torch.equal(model(X), original(X))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: x * 2, (x,)))


class Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q = x.unflatten(0, (-1, 3))[:, None]
        return self.drop(flex_attention(q, q, q)).flatten(0, 2)


@pytest.mark.skipif(TORCH < (2, 11), reason="what is compiled under a dispatch mode cannot be told apart before")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", [Branches, Flex])
def test_operators_that_compile_their_arguments(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), X.repeat(1, 4) if kind is Flex else X
    batch_dim = None if kind is Flex else 0
    with torch.no_grad(), unchanged(model), torchdrop.mc_dropout(model, seed=0, batch_dim=batch_dim) as report:
        first, second = model(x), model(x)
    assert [source.module for source in report.active] == ["drop"]
    assert not torch.equal(first, second)
    samples = predicted(model, x, batch_dim=batch_dim).samples
    assert samples is not None
    assert torch.allclose(samples[:2], torch.stack([first, second]))
    with torch.no_grad():
        model(x)  # PyTorch still compiles it


# One sample, several calls.


def test_calls_within_a_sample_have_its_masks() -> None:
    model = Of(identity).eval()
    expected = passes(model)
    with torchdrop.mc_dropout(model, seed=0) as report:
        with report.sample(2):
            assert torch.equal(model(X), expected[2])
            assert torch.equal(model(X), expected[2])
            assert torch.equal(model(X[:3]), expected[2][:3])
            with report.sample(1):
                assert torch.equal(model(X), expected[1])
        assert torch.equal(model(X), expected[0])
        assert torch.equal(model(X), expected[1])
        for number, error in ((-1, ValueError), (1.5, TypeError)):
            with pytest.raises(error, match="number"):
                report.sample(number)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="is for use within"):
        report.sample(1)

"""Modules that `replace` reaches, under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.configure.reached import blocks, data, made, of
from tests.seeding import seeded
from torchdrop import replace, set_keep_prob

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
class TestCompiled:
    """With Dynamo's own backends; masks are those of eager mode under one seed."""

    @staticmethod
    def both(model: nn.Module, compiled: Any, x: Tensor) -> list[list[Tensor]]:
        results = []
        for call in (model, compiled):
            x = x.detach().clone().requires_grad_()
            y = seeded(3, call, x)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, torch.rand(2)])
        return results  # type: ignore[return-value]

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_rates(self, backend: str) -> None:
        """A rate that was set by name is an input of the compiled code."""
        model, x = blocks(1), data()
        replace(model)
        counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend(backend)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        counts = []
        for rate in (0.5, 0.75, 0.25):
            set_keep_prob(compiled, {"0.dropout:0": rate})
            for eager, own in zip(*self.both(model, compiled, x), strict=True):
                torch.testing.assert_close(own, eager)
            counts.append(counter.frame_count)
        assert counts == [counts[0]] * 3

    def test_disabled(self) -> None:
        model, x = blocks(), data()
        replace(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        set_keep_prob(model, {"0.dropout:0": 0.5})
        compiled(x)
        with torchdrop.disabled(compiled):
            silent = compiled(x)
        for eager, own in zip(*self.both(model, compiled, x), strict=True):
            torch.testing.assert_close(own, eager)
        torch.testing.assert_close(silent, model.eval()(x))

    def test_disabled_where_no_rate_was_set(self) -> None:
        model, x = blocks(), data()
        replace(model)
        set_keep_prob(model, {"*.drop": 1.0})
        compiled = torch.compile(model, backend="aot_eager")
        assert not torch.equal(compiled(x), compiled(x))
        with torchdrop.disabled(compiled):
            torch.testing.assert_close(compiled(x), compiled(x))
        assert not torch.equal(compiled(x), compiled(x))

    def test_kinds(self) -> None:
        calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
            (lambda self, x: F.dropout1d(x.unsqueeze(-1), 0.5, self.training).squeeze(-1), {}),
            (lambda self, x: F.alpha_dropout(x, 0.5, self.training), {}),
            (lambda self, x: F.alpha_dropout(F.feature_alpha_dropout(x, 0.5), 0.5), {}),  # off, by their defaults
            (lambda self, x: x * torch.rand(x.shape[0], 1) + x.new_empty(x.shape).bernoulli_(0.4), {}),
            (lambda self, x: F.gumbel_softmax(x), {}),
            (lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0), {}),
            (lambda self, x: self.inner(x, x, x)[0], {"inner": nn.MultiheadAttention(4, 2, dropout=0.5)}),
            (lambda self, x: self.inner(x, x, x)[0], {"inner": nn.MultiheadAttention(4, 2, dropout=0.5).eval()}),
        ]
        for forward, children in calls:
            torch.compiler.reset()
            model = made(forward, **children)
            replace(model)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            for eager, own in zip(*self.both(model, compiled, data()), strict=True):
                torch.testing.assert_close(own, eager)

    def test_what_dynamo_does_not_show(self) -> None:
        """torch.rand_like, torch.randn_like and torch.normal keep PyTorch's numbers in compiled code, where Dynamo
        shows them to no function mode."""
        for function in (torch.rand_like, torch.randn_like):
            torch.compiler.reset()
            model = made(of(function))
            replace(model)
            compiled = torch.compile(model, backend="aot_eager")
            assert torch.equal(seeded(3, compiled, data()), seeded(3, function, data()))
            assert not torch.equal(seeded(3, model, data()), seeded(3, function, data()))

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
    def test_recurrent_layers_break_the_graph(self, kind: Any) -> None:
        torch.compiler.reset()
        model = nn.Sequential(nn.Linear(4, 4), kind(4, 4, 3, dropout=0.5))
        replace(model)
        wrapped = made(lambda self, x: self.inner(x)[0] * 2, inner=model)
        compiled = torch.compile(wrapped, backend="aot_eager")
        for eager, own in zip(*self.both(wrapped, compiled, data()), strict=True):
            torch.testing.assert_close(own, eager)

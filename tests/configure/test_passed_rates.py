"""Modules whose calls are served: which rates compiled code gets as tensors, and which kernels stay what they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import torchdrop
from tests.seeding import seeded
from torchdrop.configure import unreached
from torchdrop.configure.drawing import passed_rates

ALL_ATTENTION_FUNCTIONS: dict[str, Any] = {}


class Passing(nn.Module):
    """It passes an attribute and the rate of a layer to random functions, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout_rate, self.inner = 0.25, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, p=self.dropout_rate, training=self.training)
        return torch.dropout(x, 0.0 if not self.training else self.inner.p, self.training)


class Comparing(Passing):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_rate, self.training) if self.dropout_rate > 0.0 else x


class Interfaced(nn.Module):
    def __init__(self, chosen: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=chosen)

    def forward(self, x: Tensor) -> Tensor:
        return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](x)


class TestPassedRates:
    def test_are_those_with_no_other_use(self) -> None:
        assert {"dropout_rate", "inner"} <= passed_rates(Passing)
        assert "dropout_rate" not in passed_rates(Comparing)

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (Passing, "dropout_rate"),
            (Passing, "inner"),
            (lambda: nn.MultiheadAttention(4, 2, 0.5), ""),
        ],
    )
    def test_one_compilation_for_all_rates_and_masks_as_in_eager_mode(self, make: Any, name: str) -> None:
        model = make()
        torchdrop.replace(model)
        x = torch.randn(6, 5, 4)
        args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
        model(*args)  # its calls have names now, under which their rates are set as well
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        outputs = []
        for keep_prob in (0.875, 0.75, 0.5, 1.0, 0.25):
            torchdrop.set_keep_prob(model, {name or "*": keep_prob})
            outputs.append(seeded(3, compiled, *args)[0])
            drawn = torch.rand(())
            assert torch.equal(outputs[-1], seeded(3, model, *args)[0])
            assert torch.equal(drawn, torch.rand(()))  # keys are drawn at rate 0, too
        assert not torch.equal(outputs[0], outputs[1])
        assert counter.frame_count == 1

    def test_others_stay_numbers(self) -> None:
        model = Comparing()
        torchdrop.replace(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        x = torch.randn(6, 4)
        for keep_prob in (0.5, 1.0):
            torchdrop.set_keep_prob(model, {"dropout_rate": keep_prob})
            assert torch.equal(seeded(3, compiled, x), seeded(3, model, x))

    def test_attributes_are_as_before_in_eager_mode_and_after_undo(self) -> None:
        model = Passing()
        swap = torchdrop.replace(model)
        model.dropout_rate = 0.125
        assert (model.dropout_rate, vars(model)["dropout_rate"], model.inner.p) == (0.125, 0.125, 0.5)
        swap.undo()
        assert (type(model), model.dropout_rate) == (Passing, 0.125)
        assert "is_passed" not in vars(model.inner)


class TestOtherKernels:
    def test_attention_of_other_packages_is_listed(self) -> None:
        swap = torchdrop.replace(Interfaced("flash_attention_2"))
        assert "computes attention with flash_attention_2; the masks are that kernel's" in str(swap)
        assert torchdrop.replace(Interfaced("sdpa")).unreached == []

    def test_attention_on_cuda_is_listed(self) -> None:
        model = nn.MultiheadAttention(4, 2, 0.5)
        assert torchdrop.replace(model).unreached == []
        with mock.patch.object(unreached, "_is_on_cuda", return_value=True):
            assert "computes attention by PyTorch's kernels on CUDA" in str(unreached.unreached(model)[0])

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
    def test_nested_tensors_are_left_to_pytorch(self) -> None:
        class Attention(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                x = x.unflatten(-1, (2, 4)).transpose(1, 2)
                return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

        model = Attention()
        rows = [torch.randn(3, 8), torch.randn(5, 8)]
        x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
        expected = seeded(3, model, x)
        torchdrop.replace(model)
        assert torch.equal(seeded(3, model, x).values(), expected.values())

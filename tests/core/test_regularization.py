"""`regularization`: every layer's term once, and clear words where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchdrop.core.regularization import regularization


class Term(nn.Module):
    """A module whose regularizer is a parameter."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=dtype))
        self.calls = 0

    def regularizer(self) -> Tensor:
        self.calls += 1
        return 3.0 * self.value

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_terms_of_all_depths_are_added_and_differentiable() -> None:
    model = nn.Sequential(Term(1.0), nn.ModuleDict({"a": nn.Sequential(Term(2.0))}), nn.Linear(2, 2), Term(4.0))
    total = regularization(model)
    assert total.shape == ()
    assert total.item() == 21.0
    total.backward()
    assert [p.grad.item() for m in model.modules() if isinstance(m, Term) for p in m.parameters()] == [3.0] * 3
    assert model[2].weight.grad is None
    assert regularization(model[0]).item() == 3.0, "the model itself takes part"


def test_a_shared_module_counts_once() -> None:
    shared = Term(2.0)
    assert regularization(nn.Sequential(shared, nn.Sequential(shared), shared)).item() == 6.0
    assert shared.calls == 1


def test_the_training_flag_plays_no_part() -> None:
    assert regularization(nn.Sequential(Term(2.0)).eval()).item() == 6.0


def test_a_layer_may_contain_others() -> None:
    class Outer(Term):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.inner = Term(5.0)

    assert regularization(Outer()).item() == 18.0


def test_each_call_computes_anew() -> None:
    term = Term(1.0)
    first = regularization(term)
    with torch.no_grad():
        term.value.fill_(10.0)
    assert (first.item(), regularization(term).item()) == (3.0, 30.0)


def test_element_types_promote() -> None:
    total = regularization(nn.Sequential(Term(1.0), Term(2.0, torch.float64)))
    assert total.dtype == torch.float64
    assert total.item() == 9.0


def test_terms_on_other_devices_are_brought_to_the_firsts() -> None:
    model = nn.Sequential(Term(1.0).to("meta"), Term(2.0))
    assert regularization(model).device.type == "meta"


def test_wrapped_models_are_seen_through() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    assert regularization(Wrapper(nn.Sequential(Term(1.0)))).item() == 3.0


@pytest.mark.slow
def test_compiled_models_are_seen_through_and_the_sum_compiles() -> None:
    model = nn.Sequential(Term(1.0), Term(2.0))
    assert regularization(torch.compile(model, backend="eager")).item() == 9.0
    loss = torch.compile(lambda x: model(x).sum() + regularization(model), backend="eager", fullgraph=True)
    assert loss(torch.ones(2)).item() == 11.0


def test_an_attribute_of_that_name_is_no_method() -> None:
    class RateSite(nn.Module):
        def __init__(self, regularizer: Any) -> None:
            super().__init__()
            self.regularizer = regularizer

    for other in (None, 0.1, nn.Linear(1, 1), lambda: torch.ones(())):
        assert regularization(nn.Sequential(RateSite(other), Term(1.0))).item() == 3.0


def test_a_model_without_any_is_an_error_that_says_what_to_do() -> None:
    message = (
        r"^no layer of the Sequential has a regularizer: use layers that have one, such as ConcreteLayer, or "
        r"give a module of yours a method regularizer\(\) that returns a scalar tensor$"
    )
    with pytest.raises(ValueError, match=message):
        regularization(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(("returned", "got"), [(torch.ones(1), r"shape \(1,\)"), (0.5, "float")])
def test_a_term_that_is_no_scalar_tensor_is_refused(returned: Any, got: str) -> None:
    class Wrong(nn.Module):
        def regularizer(self) -> Any:
            return returned

    with pytest.raises(
        TypeError, match=rf"^regularizer\(\) must return a tensor of shape \(\), got {got} from Wrong '1'"
    ):
        regularization(nn.Sequential(Term(1.0), Wrong()))


def test_something_else_than_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got list$"):
        regularization([Term(1.0)])  # type: ignore[arg-type]

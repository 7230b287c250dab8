"""The report of zeros: which layers it lists, what it counts, how it prints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchdrop.layers.variational.sparse import SparseVariationalConv1d
from torchdrop.layers.variational.sparsity import Sparsity, sparsity
from torchdrop.layers.weights.targeted import apply_targeted_dropout


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), SparseVariationalConv1d(4, 5, 3), nn.Linear(10, 2))
    with torch.no_grad():
        layers[0].weight.fill_(1.0)[:10] = 0.0
        layers[2].weight.fill_(1.0)
        layers[2].log_sigma2[1:3] = 4.0
        layers[3].weight.fill_(1.0)
    apply_targeted_dropout(layers[3], p=1.0, target_fraction=0.3, pruned=True)
    return layers


def test_zeros_are_those_of_eval_mode_whatever_the_mode() -> None:
    layers = model()
    for mode in (True, False):
        layers.train(mode)
        state = torch.get_rng_state()
        found = sparsity(layers)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training == mode for module in layers.modules())
        assert dict(found) == {"0": 0.2, "2": 0.4, "3": 0.3}
        assert (found.weights, found.zeros) == (2000 + 60 + 20, 400 + 24 + 6)
        assert found.share == found.zeros / found.weights
        assert found.rows[1] == {
            "name": "2", "kind": "SparseVariationalConv1d", "weights": 60, "zeros": 24, "share": 0.4
        }  # fmt: skip


def test_the_report_prints_as_a_table() -> None:
    assert repr(sparsity(model())).splitlines() == [
        "layer  kind                     weights  zero  share",
        "0      Linear                     2,000   400  20.0 %",
        "2      SparseVariationalConv1d       60    24  40.0 %",
        "3      Linear                        20     6  30.0 %",
        "total                             2,080   430  20.7 %",
    ]
    assert repr(sparsity(nn.Linear(2, 3))).splitlines()[1] == "(model)  Linear        6     0  0.0 %"
    assert repr(sparsity(nn.ReLU())) == "no layer has weights"


def test_the_report_is_a_mapping() -> None:
    shared = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 3)
    found = sparsity(nn.Sequential(shared, shared, nn.ConvTranspose2d(1, 1, 2), empty))
    assert list(found) == ["0", "2", "3"]
    assert (len(found), found["3"], found.weights) == (3, 0.0, 10)
    with pytest.raises(KeyError):
        found["1"]
    assert Sparsity([]).share == 0.0


def test_a_compiled_model_has_the_names_of_its_original() -> None:
    assert list(sparsity(torch.compile(nn.Sequential(nn.Linear(3, 2)), backend="eager"))) == ["0"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.LazyLinear(3), r"^1 has no weights yet, it is lazy: run the model once first$"),
        (lambda: nn.Linear(2, 3, device="meta"), r"^1 has weights without values, on the meta device: load them$"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_weights_that_are_not_there_yet_are_named(layer: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsity(nn.Sequential(nn.Linear(2, 2), layer()))


def test_only_modules_have_weights() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        sparsity(torch.ones(3))  # type: ignore[arg-type]

"""`audit`: each finding on a small model and its absence on the corrected one; real models; nothing is left behind."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.mc_models import Of, unchanged
from tests.statistical import FALSE_ALARM
from torchdrop.aids.flow import Call

pytestmark = pytest.mark.usefixtures("one_thread")

os.environ["HF_HUB_OFFLINE"] = "1"


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def between(*layers: nn.Module, width: int = 8) -> nn.Sequential:
    """Layers "1", "2", ... of a network."""
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(width, 2))


def found(model: nn.Module, example: Any) -> list[tuple[str, str]]:
    """The findings, after a check that the model is as it was."""
    with unchanged(model):
        result = torchdrop.audit(model, example)
    assert all(finding.message and finding.code in str(result) for finding in result.findings)
    assert ("Nothing found" in str(result)) == (not result.findings)
    return [(finding.code, finding.module) for finding in result.findings]


X, S = rows(3, 4), rows(3, 4, 8)


class AlwaysOn(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, training=True)


class Swapped(nn.Dropout):
    """Takes p for keep_prob."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, 1 - self.p, self.training)


class SwappedOurs(torchdrop.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return torchdrop.functional.dropout(input, self.keep_prob, self.training)


class Forgetful(nn.Dropout):
    """Never drops from every second channel."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return torch.where(torch.arange(input.shape[1]) % 2 == 0, input, out) if self.training else out


class ByHand(nn.Dropout):
    """Its comparison is the wrong way round: it keeps with probability p."""

    def forward(self, input: Tensor) -> Tensor:
        return input * (torch.rand_like(input) < self.p) / (1 - self.p) if self.training else input


class Idle(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return input


def left_on(model: nn.Module, name: str) -> nn.Module:
    model.eval().get_submodule(name).train()
    return model


def before(*layers: nn.Module, width: int = 8) -> nn.Sequential:
    return between(nn.Dropout(0.5), *layers, width=width)


def mask_by_hand(self: nn.Module, x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) < 0.5)


def thirty_steps(self: nn.Module, x: Tensor) -> Tensor:
    for _ in range(30):
        x = torch.tanh(F.dropout(x, 0.3))
    return x


NORM = ("before batch norm", "2")

FOUND: dict[str, tuple[Callable[[], nn.Module], Any, list[tuple[str, str]]]] = {
    "on in eval": (lambda: between(AlwaysOn(0.5)), X, [("ignores training", "1")]),
    "on in eval, functional": (lambda: Of(lambda m, x: F.dropout(x).sum(-1)), X,
        [("ignores training", ""), ("rate captured elsewhere", "")]),
    "on in eval, once for thirty calls": (lambda: Of(thirty_steps), X,
        [("ignores training", ""), ("rate captured elsewhere", "")]),
    "attention ignores training": (
        lambda: Of(lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=m.drop).mean(1), drop=0.5),
        S, [("ignores training", "")]),
    "on in eval, by hand": (lambda: between(Of(mask_by_hand)), X, [("active in eval mode", "1")]),
    "left in train mode": (lambda: left_on(between(nn.Dropout(0.5)), "1"), X, [("active in eval mode", "1")]),
    "attention left in train mode": (
        lambda: left_on(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "self_attn"),
        S, [("active in eval mode", "self_attn")]),
    "norm": (lambda: before(nn.BatchNorm1d(8)), X, [NORM]),
    "norm of ours": (lambda: between(torchdrop.Dropout(), nn.BatchNorm1d(8)), X, [NORM]),
    "norm after gaussian": (lambda: between(torchdrop.GaussianDropout(0.2), nn.BatchNorm1d(8)), X, [NORM]),
    "norm in place": (lambda: between(nn.Dropout(0.5, inplace=True), nn.BatchNorm1d(8)), X, [NORM]),
    "norm of one row": (lambda: before(nn.BatchNorm1d(8)), rows(1, 4), [NORM]),
    "norm and identity": (lambda: before(nn.Identity(), nn.BatchNorm1d(8)), X, [("before batch norm", "3")]),
    "norm by way of linear": (lambda: before(nn.Linear(8, 8), nn.BatchNorm1d(8)), X, [("before batch norm", "3")]),
    "norm after views": (lambda: before(nn.Unflatten(1, (4, 2)), nn.Flatten(), nn.BatchNorm1d(8)), X,
        [("before batch norm", "4")]),
    "norm after more views": (lambda: before(Of(lambda m, x: x.clone().T.swapaxes(0, 1)[:, :].view_as(x)),
        nn.BatchNorm1d(8)), X, [("before batch norm", "3")]),
    "norm 2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(), nn.BatchNorm2d(4), nn.Flatten(1)),
        rows(2, 3, 5, 5), [NORM]),
    "norm 3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.Dropout3d(), nn.BatchNorm3d(4), nn.Flatten(1)),
        rows(2, 3, 5, 5, 5), [NORM]),
    "norm as a function": (
        lambda: Of(lambda m, x: F.batch_norm(running_mean=torch.zeros(4), running_var=torch.ones(4), input=m.d(x)),
        d=nn.Dropout()), X, [("before batch norm", "")]),
    "output": (lambda: nn.Sequential(nn.Linear(4, 2), nn.Dropout()), X, [("on the output", "1")]),
    "model is a layer": (lambda: torchdrop.Dropout(), X, [("on the output", "")]),
    "two": (lambda: before(torchdrop.Dropout(0.2)), X, [("two in a row", "2")]),
    "two, reshaped": (lambda: before(nn.Unflatten(1, (4, 2)), nn.Dropout1d(0.2), nn.Flatten()), X,
        [("two in a row", "3")]),
    "one, twice": (lambda: Of(lambda m, x: m.d(m.d(x)).sum(-1), d=nn.Dropout()), X, [("two in a row", "d")]),
    "rate 0": (lambda: between(nn.Dropout(0.0)), X, [("rate 0", "1")]),
    "rate 1": (lambda: between(torchdrop.Dropout(keep_prob=0.0)), X, [("rate 1", "1")]),
    "rate 0, tensor": (lambda: between(torchdrop.Dropout(keep_prob=torch.ones(()))), X, [("rate 0", "1")]),
    "rate 1, tensor": (lambda: between(torchdrop.Dropout(keep_prob=torch.zeros(8))), X, [("rate 1", "1")]),
    "rate 1, LSTM": (lambda: nn.LSTM(4, 5, 2, dropout=1.0), rows(3, 2, 4), [("rate 1", "")]),
    "constant": (lambda: Of(lambda m, x: F.dropout(x, 0.3, m.training).sum(-1)), X, [("rate captured elsewhere", "")]),
    "rate in a list": (lambda: Of(lambda m, x: F.dropout(x, m.rates[0], m.training).sum(-1), rates=[0.3]), X,
        [("rate captured elsewhere", "")]),
    "left over": (lambda: Of(lambda m, x: x, d=nn.Dropout()), X, [("never called", "d")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_finding(name: str) -> None:
    make, example, expected = FOUND[name]
    model = make()
    assert found(model, example) == expected
    if model.training:
        assert found(model.eval(), example) == expected


def residual(self: nn.Module, x: Tensor) -> Tensor:
    out = self.d(self.a(x))
    out += x
    return self.norm(out)


def scaled_rate(self: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x, self.drop_rate / 2, self.training).sum(-1)


def fused(self: nn.Module, x: Tensor) -> Tensor:
    """As attention has it in timm: the layer holds the rate and is not called."""
    return F.scaled_dot_product_attention(x, x, x, dropout_p=self.drop.p if self.training else 0.0).mean(1)


def vae(self: nn.Module, x: Tensor) -> Tensor:
    """It samples in eval mode too: that is its business, and no dropout."""
    mean, log = self.encoder(x).chunk(2, -1)
    return self.decoder(mean + torch.randn_like(mean) * log.exp())


def unused_draw(self: nn.Module, x: Tensor) -> Tensor:
    """As LayerDrop has it in transformers."""
    skip = torch.rand([])
    return x if self.training and skip < 0.3 else self.layer(x)


def graph(self: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
    x = F.dropout(x, self.dropout, training=self.training)
    return self.out(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))


def gated(self: nn.Module, x: Tensor, y: Tensor, scale: float, *, mask: Any = None) -> Tensor:
    return self.out(self.d(x) * y * scale)


def slope(self: nn.Module, x: Tensor) -> Tensor:
    """As in energy models, whose output is a force."""
    x = x.requires_grad_()
    return torch.autograd.grad(self.out(self.d(x)).sum(), x)[0]


def resnet_block() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.fc(self.drop(torch.flatten(self.relu(out), 1)))

    conv1, conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    bn1, bn2, relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
    return Of(forward, conv1=conv1, bn1=bn1, relu=relu, conv2=conv2, bn2=bn2, drop=nn.Dropout(), fc=nn.Linear(75, 2))


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 2),
    )  # fmt: skip


CLEAN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "one layer": (lambda: between(nn.Dropout()), X),
    "empty images": (lambda: nn.Sequential(nn.Dropout2d(), nn.ReLU()), rows(2, 3, 0, 4)),
    "function that follows training": (lambda: Of(scaled_rate, drop_rate=0.4), X),
    "rate in an unused layer": (lambda: Of(fused, drop=nn.Dropout(0.1)), S),
    "norm first": (lambda: between(nn.BatchNorm1d(8), nn.Dropout()), X),
    "norm of one row": (lambda: between(nn.BatchNorm1d(8), nn.Dropout()), rows(1, 4)),
    "norm after relu": (lambda: before(nn.ReLU(), nn.BatchNorm1d(8)), X),
    "norm after relu in place": (lambda: before(nn.ReLU(inplace=True), nn.BatchNorm1d(8)), X),
    "norm after a residual": (lambda: Of(lambda m, x: m.norm(m.d(m.a(x)) + x), d=nn.Dropout(), a=nn.Linear(4, 4),
        norm=nn.BatchNorm1d(4)), X),
    "norm after a residual in place": (lambda: Of(residual, d=nn.Dropout(), a=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)),
        X),
    "norm without running statistics": (lambda: before(nn.BatchNorm1d(8, track_running_stats=False)), X),
    "layer norm": (lambda: before(nn.LayerNorm(8)), X),
    "group norm": (lambda: before(nn.GroupNorm(2, 8)), X),
    "norm after two linear maps": (lambda: before(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)), X),
    "random leaky relu, norm": (lambda: between(nn.RReLU(), nn.BatchNorm1d(8)), X),
    "random leaky relu, dropout": (lambda: between(nn.RReLU(), nn.Dropout()), X),
    "random leaky relu on the output": (lambda: nn.Sequential(nn.Linear(4, 2), nn.RReLU()), X),
    "attention on the output": (
        lambda: Of(lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=m.drop * m.training), drop=0.5), S),
    "attention, then dropout": (
        lambda: Of(lambda m, x: m.out(m.d(F.scaled_dot_product_attention(x, x, x, dropout_p=m.drop * m.training))),
        drop=0.5, d=nn.Dropout(), out=nn.Linear(8, 2)), S),
    "two with a relu between": (lambda: before(nn.ReLU(), nn.Dropout()), X),
    "two with a relu in place between": (lambda: before(nn.ReLU(inplace=True), nn.Dropout()), X),
    "an attribute that is no rate": (
        lambda: Of(lambda m, x: m.out(m.d(x) * m.drop_scale), d=nn.Dropout(), out=nn.Linear(4, 2), drop_scale=1.0), X),
    "tiny keep_prob": (lambda: between(torchdrop.Dropout(keep_prob=1e-6)), X),
    "tiny rate": (lambda: between(torchdrop.Dropout(1e-9)), X),
    "tensor": (lambda: between(torchdrop.Dropout(keep_prob=torch.linspace(0.1, 1, 8))), X),
    "shared axes": (lambda: between(torchdrop.Dropout(0.3, shared_axes=(0,))), rows(30, 4)),
    "not inverted": (lambda: between(torchdrop.Dropout(0.3, inverted=False)), rows(30, 4)),
    "vgg": (vgg, rows(2, 3, 4, 4)),
    "resnet": (resnet_block, rows(2, 3, 5, 5)),
    "lstm": (lambda: nn.LSTM(4, 5, 2, dropout=0.3), rows(3, 2, 4)),
    "gru": (lambda: nn.GRU(4, 5, 2, dropout=0.3), (rows(3, 2, 4), rows(2, 2, 5))),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (S, S)),
    "encoder, mapping": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        {"src": rows(2, 5, 8)}),
    "vae": (lambda: Of(vae, encoder=nn.Linear(8, 4), decoder=nn.Linear(2, 8)), rows(3, 8)),
    "draw without an effect in eval mode": (lambda: Of(unused_draw, layer=nn.Linear(4, 2)), X),
    "graph": (lambda: Of(graph, out=nn.Linear(4, 2), dropout=0.3), (rows(5, 4), torch.tensor([[0, 1, 2], [3, 4, 0]]))),
    "several inputs": (lambda: Of(gated, d=nn.Dropout(), out=nn.Linear(4, 2)), (X, X, 0.5)),
    "model that differentiates itself": (lambda: Of(slope, d=nn.Dropout(), out=nn.Linear(4, 2)), X),
    "no tensors": (lambda: Of(lambda m, n: m.out(m.d(torch.ones(n, 4))), d=nn.Dropout(), out=nn.Linear(4, 2)), (3,)),
    "no inputs": (lambda: Of(lambda m: m.out(m.d(torch.ones(3, 4))), d=nn.Dropout(), out=nn.Linear(4, 2)), ()),
    "no dropout": (lambda: nn.Linear(4, 2), X),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_no_false_alarm(name: str) -> None:
    make, example = CLEAN[name]
    torch.manual_seed(0)
    assert found(make(), example) == []


Pair = namedtuple("Pair", "first second")


@dataclass
class Record:
    logits: Tensor


@pytest.mark.parametrize("wrap", [
    lambda y: (y,), lambda y: {"a": [y]}, lambda y: Pair(y.sum(), y), lambda y: y.unsqueeze(0), lambda y: Record(y),
], ids=["tuple", "dict", "namedtuple", "view", "dataclass"])  # fmt: skip
def test_output_within_a_structure(wrap: Callable[[Tensor], Any]) -> None:
    model = Of(lambda m, x: wrap(m.d(x)), d=nn.Dropout())
    assert found(model, X) == [("on the output", "d")]
    assert found(Of(lambda m, x: wrap(m.d(x) * 2), d=nn.Dropout()), X) == []


def test_layer_that_eval_does_not_turn_off() -> None:
    """It is found before anyone has called eval() too: a model is in train mode when it is built."""

    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> Stubborn:
            return super().train(True)

    assert found(between(Stubborn()).eval(), X) == [("active in eval mode", "1")]
    assert found(between(Stubborn()), X) == [("active in eval mode", "1")]


@pytest.mark.parametrize("broken", [Swapped, SwappedOurs, Forgetful, ByHand, Idle])
def test_layer_that_keeps_another_share(broken: Callable[..., nn.Module]) -> None:
    model = between(broken(0.2))
    assert ("realized rate", "1") in found(model, rows(16, 4))
    assert found(between(broken.__mro__[1](0.2)), rows(16, 4)) == []  # type: ignore[attr-defined]


def test_a_swapped_rate_has_a_name() -> None:
    """It follows the layer's rate, if in the wrong direction: set_keep_prob does change it."""
    assert "rate captured elsewhere" not in dict(found(between(Swapped(0.2)), rows(16, 4)))


KINDS = [("Dropout", 2), ("Dropout1d", 3), ("Dropout2d", 4), ("Dropout3d", 5), ("AlphaDropout", 2),
         ("FeatureAlphaDropout", 3)]  # fmt: skip

LAYERS: dict[str, tuple[Callable[[float], nn.Module], tuple[int, ...]]] = {
    **{f"nn.{name}": (getattr(nn, name), (2, 3, 4, 5, 6)[:dims]) for name, dims in KINDS},
    **{f"torchdrop.{name}": (getattr(torchdrop, name), (2, 3, 4, 5, 6)[:dims]) for name, dims in KINDS},
    "unbatched": (nn.Dropout2d, (3, 4, 5)),
    "in place": (lambda p: nn.Dropout(p, inplace=True), (1, 1)),
    "shared": (lambda p: torchdrop.Dropout(p, shared_axes=(0, 1)), (4, 4)),
    "torch's": (lambda p: Of(lambda m, x: torch.feature_dropout(x, m.drop, m.training), drop=p), (2, 3, 4)),
    "keyword": (lambda p: Of(lambda m, x: F.dropout(p=m.drop, input=x, training=m.training), drop=p), (3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:dropout2d")
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.slow
def test_right_layers_are_measured_and_raise_no_alarm(name: str, p: float) -> None:
    make, shape = LAYERS[name]
    model = Of(lambda m, x: m.layer(x.clone()).sum(-1), layer=make(p))
    for seed in range(4):
        torch.manual_seed(seed)
        result = torchdrop.audit(model, rows(*shape))
        assert {finding.code for finding in result.findings} <= ({"rate 1"} if p == 1 else set())
        (call,) = result.calls
        assert call.rate == pytest.approx(p, abs=1e-8)
        assert call.draws >= 100
        assert call.realized == pytest.approx(1 - p, abs=6 * math.sqrt(0.25 / call.draws))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (30, 4)])
def test_noise_is_not_measured(shape: tuple[int, ...]) -> None:
    model = Of(lambda m, x: m.layer(x).sum(-1), layer=torchdrop.GaussianDropout(0.5))
    result = torchdrop.audit(model, rows(*shape))
    assert [call.realized for call in result.calls] == [None]
    assert result.findings == []
    assert "not measured" in str(result)


@pytest.mark.parametrize(("n", "k"), [(20, 0.5), (50, 0.9), (400, 0.02), (7, 0.0), (7, 1.0)])
def test_unlikely_counts_are_rare_and_exact_ones_are_never(n: int, k: float) -> None:
    """The probability of an alarm, summed over all counts that raise one, is below the promise."""
    alarm = 0.0
    for kept in range(n + 1):
        call = Call("", "dropout", True, 1 - k, True, False, None, kept / n, n)
        weight = math.comb(n, kept) * k**kept * (1 - k) ** (n - kept)
        alarm += weight * call.unlikely
        assert not (call.unlikely and weight > FALSE_ALARM)
    assert alarm <= FALSE_ALARM
    assert Call("", "dropout", True, 1 - k, True, False, None, 1 - k if k in (0, 1) else k**2, 20_000).unlikely


def test_plain_data_and_table() -> None:
    model = between(nn.Dropout(0.25), nn.ReLU(), torchdrop.Dropout(keep_prob=0.9))
    result = torchdrop.audit(model, rows(16, 4))
    assert [(c.module, c.kind, c.on) for c in result.calls] == [("1", "dropout", True), ("3", "torchdrop", True)]
    head, first, second, end = str(result).splitlines()
    assert head.split() == ["layer", "call", "keep_prob", "realized", "draws"]
    assert first.split()[:3] == ["1", "dropout", "0.75"]
    assert second.split()[:3] == ["3", "torchdrop", "0.9"]
    assert int(first.split()[-1]) == result.calls[0].draws >= 20_000
    assert end == "Nothing found."
    two = torchdrop.audit(before(nn.Dropout()), X)
    assert two.of("two in a row") == ["2"]
    assert two.of("rate 0") == []
    assert "(model)" in str(torchdrop.audit(nn.Dropout(), X))
    assert "No dropout" in str(torchdrop.audit(nn.Linear(4, 2), X))


def test_a_layer_in_a_loop_has_one_row() -> None:
    model = Of(lambda m, x: torch.stack([m.d(x) * i for i in range(30)]).sum(0), d=nn.Dropout())
    assert str(torchdrop.audit(model, X)).count("\nd ") == 1


class Busy(nn.Module):
    """Changes whatever a forward can change, and can fail."""

    def __init__(self, fail: bool, when: bool | None = None) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor([0.0, math.nan]))
        self.fail, self.when, self.calls, self.log = fail, when, 0, []
        self.drop, self.own = nn.Dropout(0.3), torchdrop.Dropout(0.2)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        self.log.append(random.random() + np.random.rand())
        x.mul_(2)
        out = self.linear(self.own(self.linear(self.drop(self.norm(x)))))
        if self.fail and self.when in (None, self.training):
            raise RuntimeError("planted")
        return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("fail", "when"), [(False, None), (True, None), (True, False)])
def test_everything_is_put_back(training: bool, fail: bool, when: bool | None) -> None:
    model = Busy(fail, when).train(training)
    model.norm.eval()
    model.linear.weight.grad = grad = torch.ones(4, 4)
    handle = model.drop.register_forward_hook(lambda *_: None)
    x = X
    values, rates = x.clone(), dict(torchdrop.keep_probs(model))
    with unchanged(model):
        if fail:
            with pytest.raises(RuntimeError, match="planted"):
                torchdrop.audit(model, x)
        else:
            torchdrop.audit(model, x)
    assert torch.equal(x, values)
    assert model.log == []
    assert model.linear.weight.grad is grad
    assert torch.equal(grad, torch.ones(4, 4))
    assert dict(torchdrop.keep_probs(model)) == rates
    assert model.own.p == 0.2
    assert list(model.drop._forward_hooks) == [handle.id]
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_layers_own_generator_is_put_back() -> None:
    generator = torch.Generator().manual_seed(0)
    before_audit = generator.get_state()
    assert found(between(torchdrop.Dropout(generator=generator)), X) == []
    assert torch.equal(generator.get_state(), before_audit)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        torchdrop.audit(3, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model.*compiled"):
        torchdrop.audit(torch.compile(between(nn.Dropout())), X)
    inner = nn.Dropout()
    inner.compile()
    with pytest.raises(TypeError, match=r"'1' is compiled"):
        torchdrop.audit(between(inner), X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 2))
    with pytest.raises(TypeError, match="TorchScript"):
        torchdrop.audit(nn.Sequential(scripted), X)


def test_a_model_with_parameters_to_come_is_refused() -> None:
    """A forward would give it a shape, by the class and the parameters, and half of that could be undone."""
    model = nn.Sequential(nn.LazyLinear(8), nn.Dropout(), nn.Linear(8, 2))
    with pytest.raises((TypeError, ValueError), match=r"'0'|initiali[sz]ed"):
        torchdrop.audit(model, X)
    assert isinstance(model[0], nn.LazyLinear)


def test_the_models_own_error_comes_through() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torchdrop.audit(between(), rows(3, 5))


TRANSFORMERS = {
    "bert-sdpa": [], "bert-eager": [], "gpt2-sdpa": [], "gpt2-eager": [], "swin": [],
    "t5": [("on the output", "encoder.dropout")], "wav2vec2-sdpa": [("rate 0", "feature_projection.dropout")],
    "sew-d": [("rate 0", "feature_dropout")],
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    """BERT and GPT-2 hand the rate of a layer to a function, without a call of the layer."""
    pytest.importorskip("transformers")
    from tests.monte_carlo import test_models as models

    assert found(*models.built(name)) == TRANSFORMERS[name]


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_vit_and_its_zero_rates(rate: float) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, hidden_dropout_prob=rate))
    codes = {code for code, _ in found(model, {"pixel_values": rows(2, 3, 16, 16)})}
    assert codes == (set() if rate else {"rate 0"})

"""LSTM and GRU layers with noise under Monte Carlo inference, vmap and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchdrop
from tests import TORCH
from tests.layers.recurrent.test_noise import LAYERS, B, F, H, T, every
from tests.seeding import seeded


class Classifier(nn.Module):
    """A bidirectional layer of noise over sequences, batch first."""

    def __init__(self, rnn: Any, pack: bool) -> None:
        super().__init__()
        self.rnn, self.head, self.pack = rnn, nn.Linear(2 * H, 2), pack

    def forward(self, x: Tensor) -> Tensor:
        if not self.pack:
            return self.head(self.rnn(x)[0].mean(1))
        lengths = torch.tensor([2 if n == 1 else 5 for n in range(len(x))])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1))


@every
@pytest.mark.parametrize("pack", [False, True])
def test_monte_carlo_fires_with_masks_that_belong_to_rows(name: str, pack: bool) -> None:
    model = Classifier(LAYERS[name](F, H, batch_first=True, bidirectional=True), pack).eval()
    x = torch.randn(6, 5, F)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first = model(x)
        assert len(report.sources) == (4 if name == "ZoneoutLSTM" else 2)
        assert all(source.replayable for source in report.sources)
        assert not torch.equal(model(x), first)
    with torchdrop.mc_dropout(model, seed=1):
        torch.testing.assert_close(model(x[:3]), first[:3])
    assert not torch.equal(model(x), first)


def test_monte_carlo_prediction_is_the_same_by_every_strategy() -> None:
    model = Classifier(LAYERS["ZoneoutLSTM"](F, H, batch_first=True, bidirectional=True), pack=False).eval()
    x = torch.randn(3, 2, F)
    loop, auto = (
        torchdrop.mc_predict(model, x, samples=4, seed=3, strategy=strategy, task="regression")
        for strategy in ("loop", "auto")
    )
    assert loop.variance.min() > 0
    torch.testing.assert_close(auto.mean, loop.mean)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap(randomness: str) -> None:
    for make in LAYERS.values():
        layer = make(F, H, 2, bidirectional=True)
        x = torch.randn(T, B, F).expand(3, T, B, F)
        y = torch.func.vmap(lambda x, layer=layer: layer(x)[0], randomness=randomness)(x)
        assert torch.allclose(y[0], y[1]) == (randomness == "same")
        plain = torch.func.vmap(lambda x, layer=layer: layer(x)[0])
        torchdrop.set_keep_prob(layer, {"*": 1.0})
        torch.testing.assert_close(plain(x)[0], layer(x[0])[0])


@pytest.mark.slow
@every
def test_compiled_code_has_eager_masks_and_is_not_compiled_again_for_another_rate(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer, x = LAYERS[name](F, H, 2, dropout=0.5), torch.randn(2, B, F)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for frames, training in enumerate((True, False), 1):
        layer.train(training)
        for k in (0.5, 0.8, 0.3):
            torchdrop.set_keep_prob(layer, {"*": k})
            torch.testing.assert_close(seeded(1, compiled, x)[0], seeded(1, layer, x)[0])
        assert counter.frame_count == frames
    seeded(1, compiled.train(), x)[0].sum().backward()
    compiled_grad = layer.weight_hh_l0.grad.clone()
    layer.zero_grad()
    seeded(1, layer, x)[0].sum().backward()
    torch.testing.assert_close(compiled_grad, layer.weight_hh_l0.grad)


@pytest.mark.slow
def test_compiled_code_takes_packed_sequences_with_a_graph_break() -> None:
    layer = LAYERS["ZoneoutLSTM"](F, H)
    seq = pack_padded_sequence(torch.randn(T, B, F), torch.tensor([2, 5, 1, 3]), enforce_sorted=False)
    found, expected = (seeded(1, call, seq)[0] for call in (torch.compile(layer, backend="aot_eager"), layer))
    assert type(found) is type(seq)
    torch.testing.assert_close(found.data, expected.data)


@pytest.mark.skipif(TORCH < (2, 7), reason="PyTorch 2.6 does not export subclasses of nn.LSTM")
@pytest.mark.slow
@every
def test_exported_for_batches_of_any_size(name: str) -> None:
    layer = LAYERS[name](F, H, 2, batch_first=True, bidirectional=True, dropout=0.3).eval()
    x = torch.randn(6, T, F)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for rows in (6, 3):
        torch.testing.assert_close(exported(x[:rows])[0], layer(x[:rows])[0])

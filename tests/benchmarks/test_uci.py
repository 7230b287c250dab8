"""The UCI benchmark: stacked training against other ways to the same weights, its statistics, and its program."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import uci
import uci_networks
from torch import Tensor, nn

import torchdrop

SPLITS, ROWS, TRAIN, FEATURES = 3, 170, 150, 4
P = [0.0, 0.2, 0.5]


def arrays() -> dict[str, np.ndarray]:
    """A regression with a constant feature, and splits of it."""
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (ROWS, FEATURES))
    x[:, 2] = 7.0
    y = 10.0 + 5.0 * np.sin(x[:, 0]) + x[:, 1]
    order = np.stack([rng.permutation(ROWS) for _ in range(SPLITS)])
    test = np.zeros((SPLITS, ROWS), dtype=bool)
    np.put_along_axis(test, order[:, TRAIN:], True, axis=1)
    return {"X": x, "y": y, "train_index": order[:, :TRAIN], "test_mask": test}


def made(p: list[float] = P) -> uci_networks.Splits:
    a = arrays()
    tau = [0.1 * (s + 1) for s in range(SPLITS)]
    splits = uci_networks.stack(a["X"], a["y"], a["train_index"], a["test_mask"], p, tau)
    return dataclasses.replace(splits, x=splits.x.double(), y=splits.y.double(), x_test=splits.x_test.double())


class OneOfStack(nn.Module):
    """For split `split` on its own, the masks that it has among all of them."""

    def __init__(self, split: int, drop: torchdrop.Dropout) -> None:
        super().__init__()
        self.split, self.drop = split, drop

    def forward(self, x: Tensor) -> Tensor:
        factors = self.drop(torch.ones(SPLITS, *x.shape[1:], dtype=x.dtype))
        return x * factors[self.split : self.split + 1]


def trained(splits: uci_networks.Splits, networks: uci_networks.Networks) -> dict[str, Tensor]:
    torch.manual_seed(5)
    networks.double()
    uci_networks.train(networks, splits, range(3), seed=1)
    return dict(networks.named_parameters())


def test_stacked_training_is_training_one_after_another() -> None:
    splits = made()
    stacked = trained(splits, uci_networks.Networks(splits, seed=1))
    for s in range(SPLITS):
        alone = uci_networks.Networks(splits.only(s), seed=1)
        stack = uci_networks.Networks(splits, seed=1)
        alone.drop_input = OneOfStack(s, stack.drop_input)
        alone.drop_hidden = OneOfStack(s, stack.drop_hidden)
        for name, values in trained(splits.only(s), alone).items():
            torch.testing.assert_close(values[0], stacked[name][s], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("s", range(SPLITS))
def test_training_is_that_of_plain_modules_with_weight_decay(s: int) -> None:
    splits = made(p=[0.0] * SPLITS).only(s)
    networks = uci_networks.Networks(splits, seed=1).double()
    plain = uci.plain_network(FEATURES, 0.0).double()
    with torch.no_grad():
        for layer, w, b in ((plain[1], networks.w1, networks.b1), (plain[4], networks.w2, networks.b2)):
            layer.weight.copy_(w[0].T)
            layer.bias.copy_(b.flatten())
    before = networks.w1.detach().clone()
    uci_networks.train(networks, splits, range(3), seed=1)
    uci.train_plain(plain, splits, range(3), seed=1)
    assert not torch.equal(networks.w1, before)
    torch.testing.assert_close(plain[1].weight, networks.w1[0].T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(plain[4].bias, networks.b2.flatten(), rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_the_penalised_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uci_networks, "LENGTH_SCALE", 3.0)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    splits = made(p=[0.0] * SPLITS)
    networks = uci_networks.Networks(splits, seed=1).double()
    uci_networks.train(networks, splits, range(1), seed=1)
    *_, (x, y) = uci_networks.batches(splits, 1, range(1))
    assert x.shape[1] == TRAIN - uci_networks.BATCH
    squares = networks.w1.square().sum((1, 2)) + networks.w2.square().sum((1, 2))
    loss = (networks(x) - y).square().mean(1) + uci_networks.penalty(splits) * squares
    wanted = torch.autograd.grad(loss.sum(), [networks.w1, networks.b1])
    torch.testing.assert_close(networks.w1.grad, wanted[0])
    torch.testing.assert_close(networks.b1.grad, wanted[1])


def test_penalty_by_hand() -> None:
    wanted = [1e-4 * (1 - p) / (2 * TRAIN * 0.1 * (s + 1)) for s, p in enumerate(P)]
    assert uci_networks.penalty(made()).tolist() == pytest.approx(wanted)


def test_batches_of_an_epoch_are_all_rows_once_and_each_split_has_its_order() -> None:
    splits = made()
    seen = list(uci_networks.batches(splits, 1, range(2)))
    assert [x.shape[1] for x, _ in seen] == [128, 22] * 2
    epochs = [torch.cat([x for x, _ in seen[i : i + 2]], 1) for i in (0, 2)]
    for epoch in epochs:
        for s in range(SPLITS):
            assert sorted(epoch[s].tolist()) == sorted(splits.x[s].tolist())
    assert not torch.equal(*epochs)
    targets = torch.cat([y for _, y in seen[:2]], 1)
    known = {tuple(x): y for x, y in zip(splits.x[1].tolist(), splits.y[1].tolist(), strict=True)}
    assert [known[tuple(x)] for x in epochs[0][1].tolist()] == targets[1].tolist()


def test_splits_are_standardized_with_their_training_rows() -> None:
    splits, a = made(), arrays()
    torch.testing.assert_close(splits.y.mean(1), torch.zeros(SPLITS, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(splits.x[:, :, 0].std(1, correction=0), torch.ones(SPLITS, dtype=torch.float64))
    assert torch.equal(splits.x[:, :, 2], torch.zeros(SPLITS, TRAIN, dtype=torch.float64))
    for s in range(SPLITS):
        assert splits.y_test[s].tolist() == a["y"][a["test_mask"][s]].tolist()
        back = splits.y[s] * splits.y_std[s] + splits.y_mean[s]
        np.testing.assert_allclose(back, a["y"][a["train_index"][s]], rtol=1e-6)


def test_splits_that_do_not_stack_are_refused() -> None:
    a = arrays()
    x, y, train, test = a["X"], a["y"], a["train_index"], a["test_mask"]
    with pytest.raises(ValueError, match="3 rates and 2 precisions"):
        uci_networks.stack(x, y, train, test, P, [1.0] * 2)
    both = test.copy()
    np.put_along_axis(both, train[:, :1], True, axis=1)
    with pytest.raises(ValueError, match="in the training set and in the test set"):
        uci_networks.stack(x, y, train, both, P, [1.0] * 3)
    both[0] = test[0]
    with pytest.raises(ValueError, match=r"as many test rows, got \[20, 21\]"):
        uci_networks.stack(x, y, train, both, P, [1.0] * 3)


def test_monte_carlo_draws_each_sample_and_row_its_own_masks() -> None:
    splits = made()
    networks = uci_networks.Networks(splits, seed=1).double()
    samples = uci_networks.monte_carlo(networks, splits, 7, seed=0)
    assert samples.shape == (7, 20, SPLITS)
    for a, b in itertools.combinations(range(7), 2):
        assert torch.equal(samples[a, :, 0], samples[b, :, 0])
        assert (samples[a, :, 1:] != samples[b, :, 1:]).float().mean() > 0.9
    networks.eval()
    plain = networks(splits.x_test)[0] * splits.y_std[0] + splits.y_mean[0]
    torch.testing.assert_close(samples[0, :, 0], plain)


def test_evaluation_by_its_definition() -> None:
    splits = made()
    samples = torch.randn(50, 20, SPLITS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = uci_networks.evaluate(splits, samples)
    for s in range(SPLITS):
        f = samples[..., s].numpy()
        y, tau = splits.y_test[s].numpy(), splits.tau[s].item()
        density = np.exp(-0.5 * tau * (y - f) ** 2) * math.sqrt(tau / (2 * math.pi))
        assert found["rmse"][s] == pytest.approx(math.sqrt(np.mean((f.mean(0) - y) ** 2)))
        assert found["log_likelihood"][s] == pytest.approx(np.log(density.mean(0)).mean())


def test_paired_difference_and_its_standard_error() -> None:
    found = uci.difference([1.0, 2.0, 6.0], [1.0, 1.0, 1.0], lower_is_better=True)
    assert found["difference"] == 2.0
    assert found["standard_error"] == pytest.approx(math.sqrt(7.0 / 3.0))
    assert not found["reached"]
    assert uci.difference([1.0, 2.0, 6.0], [1.0, 1.0, 1.0], lower_is_better=False)["reached"]
    assert uci.difference([1.0, 1.2, 0.9], [1.0, 1.0, 1.0], lower_is_better=True)["reached"]
    assert not uci.difference([1.0, 0.8, 0.8], [1.0, 1.0, 1.0], lower_is_better=False)["reached"]


def test_pairs_are_of_means_over_seeds() -> None:
    found = uci.paired([[1.0, 4.0], [3.0, 6.0]], [1.0, 4.0], lower_is_better=True)
    assert found["ours"] == [2.0, 5.0]
    assert (found["difference"], found["standard_error"], found["reached"]) == (1.0, 0.0, False)
    assert found["seeds_that_reach"] == 1


def test_program_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "tiny.npz", **arrays())
    entries = [{"split": s, "dropout": P[s], "tau": 0.5, "test_mc_rmse": 100.0, "test_ll": 100.0} for s in (2, 0, 1)]
    (tmp_path / "tiny.published.json").write_text(json.dumps(entries))
    output, threads = tmp_path / "out" / "uci.json", torch.get_num_threads()
    brief = ["--epochs", "2", "--samples", "20", "--speed-epochs", "1", "--seeds", "0", "1", "--threads", "1"]
    try:
        uci.main(["--data", str(tmp_path), "--data-sets", "tiny", *brief, "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert report["data_sets"][0]["p"] == P
    assert [len(values) for values in report["data_sets"][0]["rmse"]["ours_by_seed"]] == [SPLITS] * 2
    uci.main(["--render", str(output)])
    rendered = capsys.readouterr().out
    assert rendered.strip() in printed
    row = next(line for line in rendered.splitlines() if line.startswith("| tiny | 3 |"))
    assert row.endswith("| 2, 0 of 2 | short: log-likelihood |")

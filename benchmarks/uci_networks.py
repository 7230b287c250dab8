"""Gal and Ghahramani's regression networks, those of all splits of a data set stacked and trained at once."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo import predictive_log_likelihood

HIDDEN, BATCH, LENGTH_SCALE = 50, 128, 0.01
LEARNING_RATE, EPSILON = 1e-3, 1e-7  # Keras' Adam


@dataclass(frozen=True)
class Splits:
    """The splits of one data set, stacked: S splits of N training and M test rows with D features.

    Inputs and training targets are standardized with their own split's training rows; test targets are in the data's
    own unit, and `y_mean` and `y_std` lead back to it.
    """

    number: Tensor  # (S,), which of the data set's splits: what randomness of its own a split has follows from it
    x: Tensor  # (S, N, D)
    y: Tensor  # (S, N)
    x_test: Tensor  # (S, M, D)
    y_test: Tensor  # (S, M), float64
    y_mean: Tensor  # (S,), float64
    y_std: Tensor  # (S,), float64
    p: Tensor  # (S,), float64, the probability of dropping
    tau: Tensor  # (S,), float64, the precision of the observations

    def __len__(self) -> int:
        return len(self.number)

    def only(self, split: int) -> Splits:
        """One of them, as a stack of one."""
        return Splits(**{field.name: getattr(self, field.name)[split : split + 1] for field in fields(self)})

    def generators(self, seed: int, purpose: str) -> list[torch.Generator]:
        """One for each split, that does not depend on which splits are stacked together."""
        seeds = [random.Random(f"{seed} {purpose} {number}").getrandbits(63) for number in self.number.tolist()]
        return [torch.Generator().manual_seed(own) for own in seeds]


def stack(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, p: Sequence[float], tau: Sequence[float]
) -> Splits:
    """The splits with training rows `train` (S, N) and test rows `test` (S, rows), a mask.

    Raises:
        ValueError: test sets of different sizes, which do not stack; a row that is both trained on and tested;
            another number of rates than of splits.
    """
    sizes = set(test.sum(1).tolist())
    if len(sizes) != 1:
        raise ValueError(f"all splits must have as many test rows, got {sorted(sizes)}")
    if not len(train) == len(test) == len(p) == len(tau):
        raise ValueError(f"{len(train)} training and {len(test)} test sets, {len(p)} rates and {len(tau)} precisions")
    if np.take_along_axis(test, train, 1).any():
        raise ValueError("a row is in the training set and in the test set of one split")
    x_train, y_train = x[train], y[train]
    mean, std = x_train.mean(1, keepdims=True), x_train.std(1, keepdims=True)
    std[std == 0] = 1.0
    y_mean, y_std = y_train.mean(1), y_train.std(1)
    x_test = np.stack([x[mask] for mask in test])

    def single(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(torch.float32)

    return Splits(
        number=torch.arange(len(train)),
        x=single((x_train - mean) / std),
        y=single((y_train - y_mean[:, None]) / y_std[:, None]),
        x_test=single((x_test - mean) / std),
        y_test=torch.from_numpy(np.stack([y[mask] for mask in test])),
        y_mean=torch.from_numpy(y_mean),
        y_std=torch.from_numpy(y_std),
        p=torch.tensor(p, dtype=torch.float64),
        tau=torch.tensor(tau, dtype=torch.float64),
    )


class Networks(nn.Module):
    """One network with one hidden layer for each split, dropout before both linear layers.

    Every parameter has the splits in its first dimension, and no operation mixes them, so that the gradient of the
    sum of their losses is each one's own gradient, and an optimizer that works by elements trains each as if alone.
    """

    def __init__(self, splits: Splits, seed: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        count, inputs, generators = len(splits), splits.x.shape[-1], splits.generators(seed, "weights")
        self.w1 = nn.Parameter(torch.stack([glorot(inputs, hidden, g) for g in generators]))
        self.w2 = nn.Parameter(torch.stack([glorot(hidden, 1, g) for g in generators]))
        self.b1 = nn.Parameter(torch.zeros(count, 1, hidden))
        self.b2 = nn.Parameter(torch.zeros(count, 1, 1))
        keep_prob = 1.0 - splits.p.view(count, 1, 1)
        self.drop_input = torchdrop.Dropout(keep_prob=keep_prob)
        self.drop_hidden = torchdrop.Dropout(keep_prob=keep_prob)

    def forward(self, x: Tensor) -> Tensor:
        """(S, rows, D) to (S, rows)."""
        h = torch.baddbmm(self.b1, self.drop_input(x), self.w1).relu_()
        return torch.baddbmm(self.b2, self.drop_hidden(h), self.w2).squeeze(-1)


def glorot(inputs: int, outputs: int, generator: torch.Generator) -> Tensor:
    """Uniform weights as Keras draws them (Glorot and Bengio, 2010)."""
    limit = math.sqrt(6.0 / (inputs + outputs))
    return torch.empty(inputs, outputs).uniform_(-limit, limit, generator=generator)


def penalty(splits: Splits) -> Tensor:
    """(S,): what each weight's square costs, l^2 (1 - p) / (2 N tau): the prior of length scale l (Gal's thesis)."""
    return LENGTH_SCALE**2 * (1.0 - splits.p) / (2.0 * splits.x.shape[1] * splits.tau)


def batches(splits: Splits, seed: int, epochs: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (S, B, D) and targets (S, B), every split in an order of its own that is new in each epoch.

    As in Keras, the last batch of an epoch is what is left. The rows are picked out of the stack flattened, which is
    faster than indexing two dimensions.
    """
    count, n, features = splits.x.shape
    x, y = splits.x.reshape(count * n, features), splits.y.reshape(count * n)
    generators, first = splits.generators(seed, "order"), n * torch.arange(count)[:, None]
    for _ in epochs:
        order = torch.stack([torch.randperm(n, generator=g) for g in generators]) + first
        for rows in order.split(BATCH, dim=1):
            flat = rows.flatten()
            yield x.index_select(0, flat).view(count, -1, features), y.index_select(0, flat).view(count, -1)


def train(networks: Networks, splits: Splits, epochs: Iterable[int], seed: int) -> None:
    """Adam on each network's mean squared error plus its penalty.

    The penalty's gradient, 2 penalty w, is added by hand: through autograd it would cost as much as the layers.
    """
    networks.train()
    optimizer = torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE, eps=EPSILON, fused=True)
    decay = (2.0 * penalty(splits)).view(-1, 1, 1).to(networks.w1.dtype)
    weights = (networks.w1, networks.w2)
    for x, y in batches(splits, seed, epochs):
        optimizer.zero_grad()
        loss = (networks(x) - y).square().sum() / y.shape[1]
        loss.backward()
        with torch.no_grad():
            for w in weights:
                w.grad.addcmul_(w, decay)
        optimizer.step()


@torch.no_grad()
def monte_carlo(networks: Networks, splits: Splits, samples: int, seed: int) -> Tensor:
    """Samples (T, M, S) of the test rows in the data's own unit, each row with masks of its own."""
    result = torchdrop.mc_predict(
        networks,
        splits.x_test,
        samples,
        seed=seed,
        batch_dim=1,
        select_output=lambda f: f.double() * splits.y_std[:, None] + splits.y_mean[:, None],
        keep_samples=True,
    )
    assert result.samples is not None
    return result.samples


def evaluate(splits: Splits, samples: Tensor) -> dict[str, list[float]]:
    """Of each split, the RMSE of the mean of all samples, and the mean log-likelihood of the test rows."""
    rmse = (samples.mean(0).T - splits.y_test).square().mean(1).sqrt()
    rows = [
        predictive_log_likelihood(samples[..., s], splits.y_test[s], tau=splits.tau[s].item()).mean().item()
        for s in range(len(splits))
    ]
    return {"rmse": rmse.tolist(), "log_likelihood": rows}

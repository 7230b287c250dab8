"""`seeded`: what it starts from, what it puts back, and what follows it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
import torchdrop.functional as F
from tests.seeding import Segment, agree, reentrant_or_not, row_masks
from tests.statistical import check_rate, draws_for
from torchdrop import seeding

"""What PyTorch itself does at the first use of forward mode and of the compiler."""


def mask(seed: int, rank: int | None = None, size: int = 256, device: torch.device | None = None) -> Tensor:
    x = torch.ones(size, device=device)
    with torchdrop.seeded(seed, rank):
        return F.dropout(x) != 0


class TestStates:
    def test_the_same_numbers_replay_and_others_do_not(self, device: torch.device) -> None:
        numbers = [(seed, rank) for seed in (-1, 0, 1, 10, 11, 101) for rank in (0, 1, 11, 101)]
        masks = [mask(*pair, device=device) for pair in numbers]
        torch.manual_seed(5)
        assert all(torch.equal(mask(*pair, device=device), m) for pair, m in zip(numbers, masks, strict=True))
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))

    @pytest.mark.parametrize("other", [(7, 1), (8, 0), (0, 7), (7 + 2**32, 0), (-7, 0)])
    def test_neighbors_are_unrelated(self, other: tuple[int, int]) -> None:
        n = draws_for(0.5, 0.005)
        check_rate(int((mask(7, 0, n) == mask(*other, n)).sum()), n, 0.5, 0.005)

    @pytest.mark.parametrize(
        ("first", "second"),
        [((74669, 0), (77819, 0)), ((84, 707), (0, 923)), ((96040, 0), (149389, 0))],
        ids=["a hash of 32 bits", "two ranks, too", "the low half of the hash"],
    )
    def test_no_32_bits_decide(
        self, first: tuple[int, int], second: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert not torch.equal(mask(*first), mask(*second))
        assert seeding._words_are_known()
        monkeypatch.setattr(seeding, "_words_are_known", lambda: False)  # a generator that is laid out in another way
        assert torch.equal(mask(*first), mask(*first))

    def test_the_whole_state_follows_from_the_hash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        words = torch.arange(1, 625)
        monkeypatch.setattr(seeding, "_hash", lambda seed, name: (2**64 - 5, seeding._WORDS.pack(*words.tolist())))
        with torchdrop.seeded(1, rank=0):
            state = torch.get_rng_state()
            assert torch.initial_seed() == 2**64 - 5
            drawn = torch.rand(3000)
        assert torch.equal(state[24 : 24 + 8 * 624].view(torch.int64), words)
        twister = np.random.MT19937()
        twister.state = {"bit_generator": "MT19937", "state": {"key": words.numpy().astype(np.uint32), "pos": 624}}
        raw = torch.from_numpy(twister.random_raw(3000).astype(np.int64))
        assert torch.equal(drawn, (raw % 2**24) / 2**24)

    @pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**40])
    def test_any_integer_is_a_seed(self, seed: int) -> None:
        assert torch.equal(mask(seed), mask(seed))
        assert not torch.equal(mask(seed), mask(seed + 1))

    def test_what_was_before_is_put_back(self, device: torch.device) -> None:
        state = torch.get_rng_state if device.type == "cpu" else torch.cuda.get_rng_state
        torch.randn(3, device=device)  # the CPU's generator holds the other half of a pair of normal variates
        before = state()
        mask(1, device=device)
        assert torch.equal(state(), before)
        with pytest.raises(IndexError), torchdrop.seeded(1):
            [][int(F.dropout(torch.ones(7, device=device)).sum())]
        assert torch.equal(state(), before)

    def test_everything_that_draws_from_the_default_generator_is_governed(self) -> None:
        results = []
        for _ in range(2):
            with torchdrop.seeded(3, rank=2):
                results.append(
                    (nn.Dropout()(torch.ones(64)), torch.randn(5), nn.Linear(3, 3).weight, torch.randperm(9))
                )
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_layers_with_a_generator_follow_that(self) -> None:
        layer, x = torchdrop.Dropout(generator=torch.Generator().manual_seed(5)), torch.ones(64)
        with torchdrop.seeded(1):
            y, z = layer(x), layer(x)
        assert not torch.equal(y, z)
        assert layer.generator is not None
        layer.generator.manual_seed(5)
        assert torch.equal(layer(x), y)

    def test_contexts_nest(self) -> None:
        x = torch.ones(64)
        with torchdrop.seeded(1):
            alone = [F.dropout(x), F.dropout(x)]
        with torchdrop.seeded(1):
            first = F.dropout(x)
            with torchdrop.seeded(1):
                assert torch.equal(F.dropout(x), first)
            with torchdrop.seeded(2, rank=1):
                assert not torch.equal(F.dropout(x), alone[1])
            second = F.dropout(x)
        assert torch.equal(torch.stack(alone), torch.stack([first, second]))

    def test_as_a_decorator(self) -> None:
        @torchdrop.seeded(4, rank=1)
        def draw(p: float) -> Tensor:
            return F.dropout(torch.ones(64), p)

        assert torch.equal(draw(0.5), draw(0.5))
        assert torch.equal(draw(0.5) != 0, mask(4, 1, 64))

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_under_transforms(self, randomness: str) -> None:
        def inner(x: Tensor) -> Tensor:
            with torchdrop.seeded(4):
                return F.dropout(x).sum()

        x = torch.randn(3, 64)
        state = torch.get_rng_state()
        slopes = vmap(grad(inner), randomness=randomness)(x)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        assert torch.equal(vmap(grad(inner), randomness=randomness)(x), slopes)
        assert len(row_masks(slopes)) == (1 if randomness == "same" else 3)
        assert torch.equal(grad(inner)(x[0]) != 0, mask(4, 0, 64))


class TestRank:
    def test_is_0_without_a_process_group(self) -> None:
        assert torch.equal(mask(7), mask(7, 0))

    def test_is_that_of_the_default_group_on_entering(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draw = torchdrop.seeded(7)(lambda: F.dropout(torch.ones(256)) != 0)
        alone = draw()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
        assert torch.equal(alone, mask(7, 0))
        assert torch.equal(draw(), mask(7, 3))
        assert torch.equal(mask(7), mask(7, 3))

    def test_is_0_in_a_torch_without_torch_distributed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
        monkeypatch.delattr(torch.distributed, "is_initialized")
        assert torch.equal(mask(7), mask(7, 0))


class TestCuda:
    """Its part of the work on a machine without one."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state"])
        monkeypatch.setattr(torch.cuda, "manual_seed_all", calls.append)
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", calls.append)
        return calls

    def test_all_devices_are_seeded_and_put_back(self, calls: list[Any]) -> None:
        with torchdrop.seeded(1, rank=2):
            (number,) = calls
            assert number == torch.initial_seed()
        assert calls == [number, ["state"]]
        with torchdrop.seeded(1, rank=3):
            pass
        assert calls[2] not in calls[:2]

    def test_an_initialization_inside_is_reported(self, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        with pytest.warns(UserWarning, match="^seeded: CUDA was initialized inside") as caught, torchdrop.seeded(1):
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        assert [warning.filename for warning in caught] == [__file__]
        assert calls == []


class TestTogether:
    @reentrant_or_not
    def test_checkpointing_finds_its_masks_when_backward_runs_outside(
        self, use_reentrant: bool, device: torch.device
    ) -> None:
        segment, x = Segment((64,)).to(device), torch.randn(64, dtype=torch.float64, device=device)

        def run(how: Any) -> tuple[Tensor, ...]:
            leaf, segment.weight.grad = x.clone().requires_grad_(), None
            with torchdrop.seeded(7, rank=1):
                y = how(how(leaf))
            torch.rand(11, device=device)
            y.square().sum().backward()
            assert leaf.grad is not None
            assert segment.weight.grad is not None
            return y.detach(), leaf.grad, segment.weight.grad.clone()

        plain = run(segment)
        segment.runs = 0
        assert agree(run(lambda x: checkpoint(segment, x, use_reentrant=use_reentrant)), plain)
        assert segment.runs == 4

    @reentrant_or_not
    def test_backward_of_a_checkpoint_leaves_the_generator_alone(self, use_reentrant: bool) -> None:
        segment, x = Segment((64,)), torch.randn(64, dtype=torch.float64, requires_grad=True)
        with torchdrop.seeded(7):
            y = checkpoint(segment, x, use_reentrant=use_reentrant)
        before = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)

    def test_frozen_masks_inside_and_around(self) -> None:
        model, x = nn.Sequential(torchdrop.Dropout(), torchdrop.Dropout()), torch.ones(256)
        with torchdrop.frozen_masks(model, seed=1):
            frozen = model(x)
            with torchdrop.seeded(5):
                assert torch.equal(model(x), frozen)
        with torchdrop.seeded(5):
            alone = F.dropout(x)
        with torchdrop.seeded(5):
            with torchdrop.frozen_masks(model, seed=1):
                assert torch.equal(model(x), frozen)
            assert torch.equal(F.dropout(x), alone)

    def test_a_context_within_a_frozen_forward(self) -> None:
        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with torchdrop.seeded(5):
                    y = F.dropout(x)
                return torch.stack([y, F.dropout(x)])

        model, x = Model(), torch.ones(256)
        with torchdrop.frozen_masks(model, seed=1):
            first, again = model(x), model(x)
        assert torch.equal(first, again)
        assert torch.equal(first[0] != 0, mask(5))

    def test_monte_carlo_without_a_seed_follows_it(self) -> None:
        model, x = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)), torch.randn(3, 4)
        means = []
        for seed in (1, 1, 2):
            with torchdrop.seeded(seed):
                means.append(torchdrop.mc_predict(model, x, samples=5, task="regression").mean)
        assert torch.equal(means[0], means[1])
        assert not torch.equal(means[0], means[2])

    def test_layer_drop_leaves_out_the_same_layers(self) -> None:
        layers = torchdrop.LayerDrop([nn.Linear(1, 1) for _ in range(40)], 0.5)
        with torchdrop.seeded(2, rank=0):
            first = list(layers)
        with torchdrop.seeded(2, rank=0):
            assert list(layers) == first
        with torchdrop.seeded(2, rank=1):
            assert list(layers) != first

    @pytest.mark.slow
    def test_compiled_masks_are_those_of_eager(self) -> None:
        torch.compiler.reset()
        model = nn.Sequential(nn.Linear(64, 64), torchdrop.Dropout(), nn.Tanh(), torchdrop.Dropout())
        compiled, x = torch.compile(model, fullgraph=True), torch.randn(9, 64)
        for seed, rank in itertools.product((1, 2), (0, 1)):
            with torchdrop.seeded(seed, rank):
                eager = model(x)
            with torchdrop.seeded(seed, rank):
                ours = compiled(x)
            assert torch.equal(ours == 0, eager == 0)
            torch.testing.assert_close(ours, eager)


class TestRefusals:
    @pytest.mark.parametrize("wrong", [None, 1.0, "1", True, torch.tensor(1)])
    def test_seed(self, wrong: Any) -> None:
        with (
            pytest.raises(TypeError, match=f"^seed must be an integer, got {type(wrong).__name__}$"),
            torchdrop.seeded(wrong),
        ):
            pass

    @pytest.mark.parametrize("wrong", [1.0, "1", False, torch.tensor(1)])
    def test_rank(self, wrong: Any) -> None:
        before = torch.get_rng_state()
        message = f"^rank must be an integer or None, got {type(wrong).__name__}$"
        with pytest.raises(TypeError, match=message), torchdrop.seeded(1, rank=wrong):
            pass
        with pytest.raises(ValueError, match=r"^rank must not be negative, got -1$"), torchdrop.seeded(1, rank=-1):
            pass
        assert torch.equal(torch.get_rng_state(), before)

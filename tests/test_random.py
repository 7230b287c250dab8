"""Seeds: manual_seed, generators, copies, activation checkpointing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
import torchdrop.functional as F
from tests.seeding import (
    FAMILY,
    Segment,
    agree,
    every_layer,
    gradients,
    in_threads,
    multiplier,
    reentrant_or_not,
    seeded,
    shape_of,
    small_and_large,
)
from torchdrop.kernels import native

"""What PyTorch itself does at the first use of forward mode and of the compiler."""


class TestManualSeed:
    @every_layer
    @small_and_large
    def test_replays(self, name: str, large: bool) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name, large))
        torch.manual_seed(7)
        first, second = layer(x), layer(x)
        torch.manual_seed(7)
        assert torch.equal(layer(x), first)
        assert torch.equal(layer(x), second)
        assert not torch.equal(first, second)
        assert not torch.equal(seeded(8, layer, x), first)

    @every_layer
    @small_and_large
    def test_module_and_function_draw_alike(self, name: str, large: bool) -> None:
        module, function, *_ = FAMILY[name]
        x = torch.randn(shape_of(name, large))
        y = seeded(7, module(0.3), x)
        state = torch.get_rng_state()
        assert torch.equal(seeded(7, function, x, 0.3, True), y)
        assert torch.equal(torch.get_rng_state(), state)

    @small_and_large
    @pytest.mark.parametrize("path", ["_DropoutBackward", "RecordedBackward"])
    def test_backward_replays_the_mask_on_both_paths(self, path: str, large: bool) -> None:
        """The path is fast for contiguous inputs whose mask is not shared."""
        if path == "_DropoutBackward" and native.library is None:
            pytest.skip("no native kernels")
        x = torch.randn(shape_of("dropout", large), dtype=torch.float64, requires_grad=True)
        y = seeded(7, torchdrop.Dropout(shared_axes=None if path == "_DropoutBackward" else ()), x)
        assert type(y.grad_fn).__name__ == path
        y.backward(torch.full_like(y, 3.0))
        m = multiplier(7, tuple(x.shape))
        assert torch.equal(y, x * m)
        assert x.grad is not None
        assert torch.equal(x.grad, 3.0 * m)

    @every_layer
    def test_number_of_draws_does_not_depend_on_the_rate(self, name: str) -> None:
        module, function, *_ = FAMILY[name]
        x = torch.randn(shape_of(name))
        states = []
        for p in (0.0, 0.3) if name == "gaussian_dropout" else (0.0, 0.3, 1.0):
            seeded(7, module(p), x)
            states.append(torch.get_rng_state())
            seeded(7, function, x, p, True)
            states.append(torch.get_rng_state())
            seeded(7, function, x, torch.tensor(p), True)
            states.append(torch.get_rng_state())
        torch.manual_seed(7)
        assert not torch.equal(states[0], torch.get_rng_state())
        assert all(torch.equal(state, states[0]) for state in states)

    @every_layer
    def test_eval_draws_nothing(self, name: str) -> None:
        module, function, *_ = FAMILY[name]
        x = torch.randn(shape_of(name))
        before = torch.get_rng_state()
        assert module().eval()(x) is x
        assert function(x, 0.5, False) is x
        assert torch.equal(torch.get_rng_state(), before)

    @small_and_large
    def test_mask_does_not_depend_on_the_number_of_threads(self, large: bool) -> None:
        x = torch.ones(shape_of("dropout", large))
        two = seeded(7, F.dropout, x)
        torch.set_num_threads(1)
        assert torch.equal(seeded(7, F.dropout, x), two)

    @every_layer
    def test_fork_rng(self, name: str) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name))
        before = torch.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            inside = layer(x)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(layer(x), inside)
        assert not torch.equal(layer(x), inside)

    @every_layer
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_grad_modes_do_not_change_the_mask(self, name: str, mode: Callable[[], Any]) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name), requires_grad=True)
        y = seeded(7, layer, x)
        with mode():
            silent = seeded(7, layer, x)
            in_place = seeded(7, FAMILY[name][1], x.clone(), 0.5, True, True)
        assert y.requires_grad
        assert not silent.requires_grad
        assert silent.is_inference() == (mode is torch.inference_mode)
        assert torch.equal(silent, y)
        assert torch.equal(in_place, y)

    @pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
    def test_what_was_made_under_inference_mode_serves_training(self, rate: Any) -> None:
        """In a new thread, where the buffer for keys is made under inference mode, too."""

        def work(_: int) -> list[Tensor | None]:
            with torch.inference_mode():
                layer = torchdrop.Dropout(keep_prob=rate if isinstance(rate, float) else rate.clone())
                layer(torch.ones(8))
                assert not torchdrop.kernels.MaskParams(1, 1.0).tensor().is_inference()
            inputs = [torch.ones(2, 64, requires_grad=True) for _ in range(2)]
            layer(inputs[0]).sum().backward()
            vmap(layer, randomness="different")(inputs[1]).sum().backward()
            return [x.grad for x in inputs]

        (slopes,) = in_threads(work, 1)
        assert all(slope is not None and set(slope.unique().tolist()) == {0.0, 2.0} for slope in slopes)


class TestGenerator:
    @every_layer
    @small_and_large
    def test_governs_alone(self, name: str, large: bool) -> None:
        module, function, *_ = FAMILY[name]
        x = torch.randn(shape_of(name, large))
        generator = torch.Generator().manual_seed(5)
        layer = module(generator=generator)
        before = torch.get_rng_state()
        first, second = layer(x), layer(x)
        assert not torch.equal(first, second)
        generator.manual_seed(5)
        assert torch.equal(function(x, 0.5, True, generator=generator), first)
        assert torch.equal(function(x, 0.5, True, generator=generator), second)
        assert torch.equal(torch.get_rng_state(), before)

    def test_draws_what_the_default_generator_would(self) -> None:
        x = torch.ones(64)
        explicit = F.dropout(x, generator=torch.Generator().manual_seed(5))
        assert torch.equal(seeded(5, F.dropout, x), explicit)

    @every_layer
    def test_eval_leaves_it_alone(self, name: str) -> None:
        generator = torch.Generator().manual_seed(5)
        before = generator.get_state()
        FAMILY[name][0](generator=generator).eval()(torch.ones(shape_of(name)))
        assert torch.equal(generator.get_state(), before)

    @pytest.mark.parametrize("wrong", [5, "cpu", torch.random])
    @every_layer
    def test_wrong_type(self, name: str, wrong: Any) -> None:
        module, function, *_ = FAMILY[name]
        message = f"^generator must be a torch.Generator or None, got {type(wrong).__name__}$"
        before = torch.get_rng_state()
        with pytest.raises(TypeError, match=message):
            module(generator=wrong)
        with pytest.raises(TypeError, match=message):
            function(torch.ones(shape_of(name)), 0.5, True, generator=wrong)
        assert torch.equal(torch.get_rng_state(), before)

    def test_of_another_device(self) -> None:
        generator = torch.Generator()
        before = generator.get_state()
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole text is compared below)
            F.dropout(torch.ones(3, device="meta"), generator=generator)
        assert str(caught.value) == (
            "generator must be on the input's device, got a generator on cpu for an input on meta: "
            "create it with torch.Generator(device='meta')"
        )
        assert torch.equal(generator.get_state(), before)


class TestCopies:
    COPIES = pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
    )

    @COPIES
    @every_layer
    def test_layer(self, name: str, duplicate: Callable[[Any], Any]) -> None:
        layer, x = FAMILY[name][0](keep_prob=0.3), torch.randn(shape_of(name))
        twin = duplicate(layer)
        assert type(twin) is type(layer)
        assert twin.keep_prob == 0.3
        assert torch.equal(seeded(7, twin, x), seeded(7, layer, x))
        twin.keep_prob = 0.9
        assert layer.keep_prob == 0.3

    @COPIES
    @every_layer
    def test_generator_is_copied_in_its_state(self, name: str, duplicate: Callable[[Any], Any]) -> None:
        generator = torch.Generator().manual_seed(5)
        layer, x = FAMILY[name][0](generator=generator), torch.randn(shape_of(name))
        layer(x)
        twin = duplicate(layer)
        assert twin.generator is not generator
        before = generator.get_state()
        first = twin(x)
        assert torch.equal(generator.get_state(), before)
        assert torch.equal(layer(x), first)

    @COPIES
    def test_tensor_rates_and_shared_axes(self, duplicate: Callable[[Any], Any]) -> None:
        layer = torchdrop.Dropout(keep_prob=torch.tensor([0.2, 0.9]), shared_axes=0, inverted=False, inplace=True)
        twin = duplicate(layer)
        assert torch.equal(twin.keep_prob, layer.keep_prob)
        assert twin.keep_prob is not layer.keep_prob
        assert (twin.shared_axes, twin.inverted, twin.inplace) == (0, False, True)
        assert torch.equal(seeded(7, twin, torch.ones(8, 2)), seeded(7, layer, torch.ones(8, 2)))


class TestCheckpoint:
    @reentrant_or_not
    @small_and_large
    @every_layer
    def test_gradient_is_that_of_the_plain_run(self, name: str, large: bool, use_reentrant: bool) -> None:
        shape = shape_of(name, large)
        segment, x = Segment(shape, FAMILY[name][0]), torch.randn(shape, dtype=torch.float64)
        plain = seeded(7, gradients, segment, segment.weight, x)
        segment.runs = 0
        run = lambda x: checkpoint(segment, x, use_reentrant=use_reentrant)  # noqa: E731
        assert agree(seeded(7, gradients, run, segment.weight, x), plain)
        assert segment.runs == 2

    @reentrant_or_not
    def test_the_check_above_would_see_another_mask(self, use_reentrant: bool) -> None:
        segment, x = Segment((64,)), torch.randn(64, dtype=torch.float64)
        plain = seeded(7, gradients, segment, segment.weight, x)
        run = lambda x: checkpoint(segment, x, use_reentrant=use_reentrant, preserve_rng_state=False)  # noqa: E731
        other = seeded(7, gradients, run, segment.weight, x)
        assert torch.equal(other[0], plain[0])
        assert not torch.equal(other[1], plain[1])

    @reentrant_or_not
    def test_two_segments_one_layer(self, use_reentrant: bool) -> None:
        segment, x = Segment((64,)), torch.randn(64, dtype=torch.float64)
        run = lambda x: checkpoint(segment, x, use_reentrant=use_reentrant)  # noqa: E731
        plain = seeded(7, gradients, lambda x: segment(segment(x)), segment.weight, x)
        assert agree(seeded(7, gradients, lambda x: run(run(x)), segment.weight, x), plain)

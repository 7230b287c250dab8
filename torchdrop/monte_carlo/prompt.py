"""Prompts of models that generate: the calls that generate and score, and the places of words in a model's tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..handlers.positions import PlacelessError, Positions, Shapes, Span
from ..seeding import start
from .context import Context
from .inputs import Inputs

SOURCE, TARGET = "input_ids", "decoder_input_ids"


class Prompt:
    """The prompts of a model, and its calls that generate from them and score what was generated."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.model, self.inputs, self._options = model, dict(inputs), dict(options)
        self.ids: Tensor = inputs[SOURCE]
        self.translates: bool = bool(getattr(model.config, "is_encoder_decoder", False))
        config = options.get("generation_config") or model.generation_config
        ends = options.get("eos_token_id", config.eos_token_id)
        ends = ends.flatten().tolist() if isinstance(ends, Tensor) else ends
        self._ends: list[int] = [] if ends is None else list(ends) if isinstance(ends, Iterable) else [ends]
        pad = options.get("pad_token_id", config.pad_token_id)
        self._pad: int = int(pad) if pad is not None else (self._ends or [0])[0]
        self._named = inspect.signature(model.forward).parameters
        if "attention_mask" in self._named and inputs.get("attention_mask") is None:
            padded = pad is not None and pad not in self._ends  # as `generate` takes it
            self.inputs["attention_mask"] = (self.ids != pad).long() if padded else torch.ones_like(self.ids)
        self._start: Tensor | None = None

    @property
    def length(self) -> int:
        """The number of tokens that stand before the generated ones in what `generate` returns."""
        return 1 if self.translates else self.ids.shape[1]

    def generated(self, number: int, seed: int) -> Tensor:
        """Returns the tokens that this sample generates, (B, L)."""
        start(seed, f"generate {number}", torch.manual_seed)
        whole = self.model.generate(**self.inputs, **self._options)
        self._start = whole[:, : self.length]
        return whole[:, self.length :]

    def scores(self, tokens: Tensor) -> Tensor:
        """Returns the scores of all words at the places of these tokens, (B, L, V), from one pass."""
        if self.translates:
            assert self._start is not None
            whole = torch.cat([self._start, tokens], 1)[:, :-1]
            return self.model(**self.inputs, decoder_input_ids=whole, use_cache=False, return_dict=True).logits
        arguments = {**self.inputs, SOURCE: torch.cat([self.ids, tokens], 1)[:, :-1]}
        if "attention_mask" in arguments:
            mask: Tensor = arguments["attention_mask"]
            mask = arguments["attention_mask"] = torch.cat([mask, mask.new_ones(tokens.shape)], 1)[:, :-1]
            if "position_ids" in self._named:
                arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return self.model(**arguments, use_cache=False, return_dict=True).logits[:, self.length - 1 :]

    def valid(self, tokens: Tensor) -> Tensor:
        """Returns which tokens (..., L) belong to a sequence: those up to the first that ends it, and that one."""
        ends = torch.isin(tokens, torch.tensor(self._ends, device=tokens.device, dtype=tokens.dtype))
        return ends.cumsum(-1) - ends.long() == 0

    def stacked(self, sequences: Sequence[Tensor]) -> Tensor:
        """Returns sequences (B, L) of several lengths as one tensor, with padding at their ends."""
        length = max(one.shape[1] for one in sequences)
        padded = [nn.functional.pad(one, (0, length - one.shape[1]), value=self._pad) for one in sequences]
        return torch.stack(padded)

    def check(self, reference: Any) -> Tensor:
        integers = isinstance(reference, Tensor) and not reference.is_floating_point() and reference.dtype != torch.bool
        if not integers or reference.dim() != 2 or len(reference) != len(self.ids) or not reference.shape[1]:
            got = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
            raise ValueError(f"reference must be tokens (B, L) for the {len(self.ids)} prompts, got {got}")
        return reference.to(self.ids.device, torch.int64)

    def probe(self, rows: int, source: int, target: int) -> dict[str, Any]:
        """Returns the arguments of a pass over sequences of these sizes."""
        ids = self.ids[:1, -1:]
        words = ids.expand(rows, source if self.translates else target).contiguous()
        arguments = {SOURCE: words, "use_cache": False}
        if "attention_mask" in self._named:
            arguments["attention_mask"] = torch.ones_like(words)
        return arguments | ({TARGET: ids.expand(rows, target).contiguous()} if self.translates else {})


def find_positions(context: Context, prompt: Prompt) -> None:
    """Finds out where words are in the tensors of the model, from forwards over sequences of several lengths.

    From then on masks belong to places within the context.
    """
    positions = Positions(0 if prompt.translates else prompt.length)
    report, model = context.activation.report, prompt.model
    sizes = {"rows": 2, "source": 4, "target": 3} if prompt.translates else {"rows": 2, "target": 3}

    def shapes(longer: str) -> Shapes:
        now = {kind: size + (kind == longer) for kind, size in sizes.items()}
        with report.sample(0), positions.recorded() as found:
            model(**prompt.probe(now["rows"], now.get("source", 0), now["target"]))
        return found

    with report.sample(0):  # a survey, before places matter
        arguments = prompt.probe(2, 4, 3)
        model(**arguments)
        if prompt.translates:
            model.get_encoder()(**{name: arguments[name] for name in arguments if name in (SOURCE, "attention_mask")})
    context.activation.server.positions = positions
    positions.learn(sizes, shapes(""), {kind: shapes(kind) for kind in sizes})
    context.watch = lambda inputs: setattr(positions, "span", _span(inputs))


def _span(inputs: Inputs) -> Span:
    """Returns the words that a call computes."""
    words = inputs.kwargs.get(TARGET, inputs.kwargs.get(SOURCE))
    held = next((value for value in inputs.kwargs.values() if hasattr(value, "get_seq_length")), None)
    try:
        past = 0 if held is None else int(held.get_seq_length())
    except ValueError as error:
        raise PlacelessError(
            "the model's cache does not say how many words it holds: give generate_kwargs={'use_cache': False}"
        ) from error
    return Span(1) if words is None else Span(len(words), past, words.shape[1])

"""`mc_generate`: sequences that a model generates under masks, each under one for all of its steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_integer
from .activate import ADVICE, Activation, check_model, check_seed, check_sources, new_seed
from .context import Context
from .prompt import SOURCE, TARGET, Prompt, find_positions
from .report import Report
from .sequences import (
    SequenceUncertainty,
    Similarity,
    TokenUncertainty,
    exact_agreement,
    mean_similarity,
    medoid,
    sequence_uncertainty,
    similarities,
)

_REFUSED = ("return_dict_in_generate", "num_return_sequences", "streamer", "assistant_model", "inputs", SOURCE, TARGET)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class GeneratedPrediction:
    """Sequences that were generated in T samples, and the uncertainty of one sequence that all samples have scored.

    Args:
        sequences: the tokens that follow the prompt, of shape (T, B, L). After the end of a sequence is padding.
        lengths: their numbers of tokens, up to the one that ends a sequence and with it, of shape (T, B).
        reference: the sequence that was scored, (B, L').
        valid: which of its places have tokens, (B, L').
        log_probs: the log-probability of its tokens in each sample, given the tokens before, (T, B, L').
        predictive_entropy: ``H[E p]`` of the next word at each place, all of the uncertainty, (B, L').
        expected_entropy: ``E H[p]``, which remains when the model is known.
        mutual_information: their difference, the part that more data could remove.
        num_samples: T.
        seed: the seed that the samples follow from.
        report: the sources of randomness in the model.

    All but the sequences are NaN at places that are not valid.
    """

    sequences: Tensor
    lengths: Tensor
    reference: Tensor
    valid: Tensor
    log_probs: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    num_samples: int
    seed: int
    report: object = None

    @property
    def uncertainty(self) -> SequenceUncertainty:
        """The uncertainty of the scored sequences as wholes: see `sequence_uncertainty`."""
        return sequence_uncertainty(self.log_probs, self.valid)

    @property
    def agreement(self) -> Tensor:
        """The share of pairs of samples that have generated the same, of shape (B,)."""
        return exact_agreement(self.sequences, self.lengths)

    @property
    def matches(self) -> Tensor:
        """The share of samples that have generated the reference, of shape (B,)."""
        own, length = self.reference, self.valid.sum(1)
        shared = min(own.shape[1], self.sequences.shape[2])
        inside = torch.arange(shared, device=own.device) < length.unsqueeze(1)
        same = ((self.sequences[..., :shared] == own[:, :shared]) | ~inside).all(2) & (self.lengths == length)
        return same.to(self.predictive_entropy.dtype).mean(0)

    def similarity(self, function: Similarity | None = None) -> Tensor:
        """Returns the mean similarity of two samples, of shape (B,): see `similarities`."""
        return mean_similarity(similarities(self.sequences, self.lengths, function))

    def consensus(self, function: Similarity | None = None) -> Tensor:
        """Returns the number of the sample that is most similar to all, of shape (B,): see `medoid`."""
        return medoid(similarities(self.sequences, self.lengths, function))

    def __len__(self) -> int:
        return len(self.reference)

    def __repr__(self) -> str:
        lines = [f"GeneratedPrediction of {len(self)} sequences from {self.num_samples} samples, seed {self.seed}"]
        lines.append(
            f"{'':>5}{'tokens':>8}{'total':>10}{'knowledge':>11}{'matches':>9}{'agreement':>11}{'similarity':>12}"
        )
        found, similar, agreement, matches = self.uncertainty, self.similarity(), self.agreement, self.matches
        for row in range(len(self)):
            values = f"{int(self.valid[row].sum()):>8}{found.total[row]:>10.4g}{found.knowledge[row]:>11.4g}"
            lines.append(f"{row:>5}{values}{matches[row]:>9.2f}{agreement[row]:>11.2f}{similar[row]:>12.2f}")
        return "\n".join(lines + ([str(self.report)] if self.report is not None else []))


def mc_generate(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    samples: int = 20,
    *,
    generate_kwargs: Mapping[str, Any] | None = None,
    reference: Tensor | None = None,
    seed: int | None = None,
    sources: str | Sequence[str] | None = None,
) -> GeneratedPrediction:
    """Generates sequences under the masks of T samples, and scores one sequence under the masks of all.

    In a sample every step has the masks of one function: those of a word follow from (seed, source, sample) and its
    place, and those of an attention weight from the places of both words. Different places have different masks, as in
    train mode. So it does not matter if a cache holds the words before, or if the whole sequence is computed in one
    pass, and beams may be reordered. Masks are shared by all rows, and places count from the end of the prompt, so the
    result of a prompt does not depend on the batch that it is in.

    The reference is scored in one pass a sample (teacher forcing), which gives the entropies of each token; see
    `GeneratedPrediction`. This makes T calls of ``model.generate`` and T passes more, and a few to find out where
    words are in the model's tensors.

    Args:
        model: a model of transformers that generates, decoder-only or encoder-decoder, in train or eval mode.
        inputs: `input_ids` (B, P), or a mapping with them and other arguments, such as `attention_mask`. Prompts of
            decoder-only models are padded on the left, as `generate` wants it.
        samples: T.
        generate_kwargs: arguments of ``model.generate``, such as `max_new_tokens`, `num_beams` or `do_sample`. Words
            that are drawn follow from the seed and the sample.
        reference: the tokens (B, L) that are scored, without the prompt; by default those that the model generates with
            nothing random in it.
        seed: the seed of all masks; drawn from PyTorch's default generator if None.
        sources: glob patterns of names of modules whose randomness is wanted; everything if None.

    Returns:
        The sequences of all samples, and the uncertainty of each token of the reference and of the whole.

    Raises:
        TypeError: a model that has no method `generate`, or inputs of another kind.
        ValueError: inputs without `input_ids`, arguments that change what `generate` returns, a reference of another
            number of rows, or a model with nothing random in it.
        PlacelessError: a random source whose tensors do not say where the words are.

    Warns:
        UserWarning: something that is random in train mode and could not be turned on, or whose draws differ between
            the steps of a sample.

    References:
        Malinin and Gales, "Uncertainty Estimation in Autoregressive Structured Prediction", ICLR 2021.

    Example:
        >>> import transformers
        >>> config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)
        >>> model = transformers.GPT2LMHeadModel(config).eval()
        >>> prompt = torch.randint(2, 50, (2, 4))
        >>> how = {"max_new_tokens": 5, "pad_token_id": 0}
        >>> result = mc_generate(model, prompt, samples=3, seed=0, generate_kwargs=how)
        >>> result.sequences.shape[:2], result.mutual_information.shape == result.reference.shape
        (torch.Size([3, 2]), True)
    """
    original, named, options = _checked(model, inputs, generate_kwargs)
    check_integer("samples", samples, least=1)
    seed = new_seed() if seed is None else check_seed(seed)
    patterns = check_sources(original, sources)
    prompt = Prompt(original, named, options)
    with torch.no_grad(), torch.random.fork_rng(_devices(prompt.ids)):
        if reference is None:
            with _entered(Context(Activation(original, (), 0), model, seed, True)):
                reference = prompt.generated(0, seed)
        else:
            reference = prompt.check(reference)
        scored, drawn = TokenUncertainty(reference), []
        with _entered(Context(Activation(original, patterns, 0), model, seed, True)) as context:
            report = context.activation.report
            find_positions(context, prompt)
            if not report.active:
                raise ValueError(f"nothing random is active in the model. {ADVICE}{report.noted()}")
            for number in range(samples):
                with report.sample(number):
                    drawn.append(prompt.generated(number, seed))
                    scored.add(prompt.scores(reference))
    for what in [*context.activation.omissions(), *_loose(report)]:
        warnings.warn(f"mc_generate: {what}", UserWarning, stacklevel=2)
    valid, dtype = prompt.valid(reference), _dtype(original)

    def at_tokens(values: Tensor) -> Tensor:
        return values.where(valid, torch.nan).to(dtype)

    return GeneratedPrediction(
        sequences=prompt.stacked(drawn),
        lengths=torch.stack([prompt.valid(one).sum(-1) for one in drawn]),
        reference=reference,
        valid=valid,
        log_probs=at_tokens(scored.log_probs),
        predictive_entropy=at_tokens(scored.predictive_entropy),
        expected_entropy=at_tokens(scored.expected_entropy),
        mutual_information=at_tokens(scored.mutual_information),
        num_samples=samples,
        seed=seed,
        report=report,
    )


@contextmanager
def _entered(context: Context) -> Iterator[Context]:
    """Enters a context in which PyTorch draws the words of `generate`: they are no source of the model."""
    with context:
        context.activation.server.elsewhere = None
        yield context


def _loose(report: Report) -> list[str]:
    """Lists the sources whose draws are not masks that belong to places."""
    loose = [f"{source.module or '(model)'}: {source.kind}" for source in report.active if not source.replayable]
    what = f"the draws of some sources do not follow from the places of words ({', '.join(loose)}), so steps differ"
    return [what] if loose else []


def _checked(model: Any, inputs: Any, options: Any) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    original = check_model(model)
    if not callable(getattr(original, "generate", None)):
        raise TypeError(
            f"model must have a method `generate`, as those of transformers do, got {type(original).__name__}"
        )
    named = {SOURCE: inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(named, Mapping):
        raise TypeError(f"inputs must be a tensor of input_ids or a mapping with them, got {type(inputs).__name__}")
    if not isinstance(named.get(SOURCE), Tensor) or named[SOURCE].dim() != 2 or not named[SOURCE].numel():
        raise ValueError(f"inputs must hold input_ids of shape (B, P), both at least 1, got {list(named)}")
    if TARGET in named:
        raise ValueError("inputs must not hold decoder_input_ids: generation begins with the model's first token")
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise TypeError(f"generate_kwargs must be a mapping of arguments of generate, got {type(options).__name__}")
    wrong = [name for name in options if name in _REFUSED]
    if wrong:
        raise ValueError(
            f"generate_kwargs must not hold {wrong[0]!r}: a sample is one sequence of tokens for each prompt"
        )
    return original, dict(named), dict(options)


def _devices(ids: Tensor) -> list[int]:
    return [ids.device.index or 0] if ids.is_cuda else []


def _dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of statistics: that of the model, or float32 for half types."""
    found = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    return torch.promote_types(found, torch.float32)

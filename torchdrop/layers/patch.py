"""PatchDropout: a vision transformer trained on a random subset of its tokens.

Each sample keeps exactly n = max(1, floor(L k)) of its L patch tokens, with k the keep probability and a subset of its
own; prefix tokens (class, registers) are always kept. Nothing is scaled: attention and means over tokens do not add up
over the tokens, so there is no sum to compensate (Liu et al., WACV 2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import sites
from ..core.checks import check_integer
from ..core.choices import subset
from ..core.exported import warn_stays_on
from ..core.inputs import check_input
from ..core.rate import DEFAULT_P, Probability, Rate, Rated, as_rate, check_count
from ..core.symbolic import leaf, recorded


def _check_prefix(num_prefix_tokens: Any) -> None:
    check_integer("num_prefix_tokens", num_prefix_tokens, least=0)


def _check_tokens(input: Any, num_prefix_tokens: int) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"patch_dropout(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    if input.dim() < 3:
        raise ValueError(f"input must be (B, N, D), got the shape {tuple(input.shape)}")
    if num_prefix_tokens > input.shape[1]:
        raise ValueError(
            f"num_prefix_tokens must be at most the number of tokens, got {num_prefix_tokens} for an input of "
            f"{tuple(input.shape)}"
        )


def _number_kept(tokens: int, keep_prob: float) -> int:
    """Returns floor(tokens * keep_prob), for which 100 * (1 - 0.9) is 10, but at least 1 if there is a token."""
    return min(tokens, max(1, math.floor(tokens * keep_prob + 1e-6)))


def _check_rate(keep_prob: Probability) -> None:
    check_count(keep_prob, "patch dropout")


def _kept_tokens(input: Tensor, num_prefix_tokens: int, rate: Rate, generator: torch.Generator | None) -> Tensor | None:
    """Returns the kept tokens' numbers, (B, num_prefix_tokens + n), in order; None if all are kept."""
    samples, patches = input.shape[0], input.shape[1] - num_prefix_tokens
    count = _number_kept(patches, rate.keep_prob)  # type: ignore[arg-type]
    warn_stays_on()
    chosen = subset(sites.random_bits(input, (samples, patches), generator), count)
    if count == patches:
        return None
    prefix = torch.arange(num_prefix_tokens, device=input.device).expand(samples, -1)
    return torch.cat([prefix, chosen + num_prefix_tokens], 1)


def _take_tokens(input: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return input
    samples, tokens = input.shape[:2]
    flat = kept + tokens * torch.arange(samples, device=input.device).unsqueeze(1)
    return input.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, kept.shape)


def patch_dropout_indices(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    num_prefix_tokens: int = 1,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the numbers of the tokens that `patch_dropout` keeps under the same seed, for further uses of them.

    Args:
        input: (B, N, ...), of any dtype; only its shape and device count. The other arguments are `patch_dropout`'s.

    Returns:
        int64 of shape (B, num_prefix_tokens + n), increasing in each row: indices into the tokens of the input, prefix
        tokens first. These are all N in eval mode and with k = 1.

    Raises:
        ValueError, TypeError: as `patch_dropout`.

    Example:
        The same tokens and positions are dropped:

        >>> import torch, torchdrop
        >>> tokens, positions = torch.randn(2, 9, 4), torch.randn(2, 9, 3)
        >>> kept = torchdrop.functional.patch_dropout_indices(tokens, 0.75)
        >>> kept.shape, kept[:, 0].tolist()
        (torch.Size([2, 3]), [0, 0])
        >>> [t.gather(1, kept.unsqueeze(-1).expand(-1, -1, t.shape[-1])).shape for t in (tokens, positions)]
        [torch.Size([2, 3, 4]), torch.Size([2, 3, 3])]
    """
    if isinstance(input, Proxy):
        return recorded(patch_dropout_indices, locals())
    rate = as_rate(p, keep_prob, check=_check_rate)
    _check_prefix(num_prefix_tokens)
    _check_tokens(input, num_prefix_tokens)
    kept = _kept_tokens(input, num_prefix_tokens, rate, generator) if sites.is_on(training) else None
    if kept is None:
        return torch.arange(input.shape[1], device=input.device).expand(input.shape[0], -1)
    return kept


def patch_dropout(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    num_prefix_tokens: int = 1,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keeps exactly n tokens of each sample, and the prefix tokens; the order stays, and nothing is scaled.

    n = floor(L k) of the L = N - num_prefix_tokens patch tokens, but at least 1 (a millionth is added to L k, so
    that 100 tokens at p = 0.9 leave 10); all subsets are equally likely, and each sample has its own. The count is
    static: it does not depend on what is drawn. With k = 1 and in eval mode the input itself is returned; k = 0 is
    refused. Gradients go to the tokens that are kept.

    In compiled code a new n is a new shape, which compiles anew.

    Args:
        input: (B, N, D), or with more dimensions after the tokens: float16, bfloat16, float32 or float64.
        p: probability of dropping, in [0, 1), with k = 1 - p. Default: 0.5.
        training: whether anything is dropped.
        num_prefix_tokens: the number of tokens at the beginning that are always kept. Default: 1, the class token.
        keep_prob: k, in place of `p`: a number.
        generator: the source of the subsets' key; PyTorch's default generator of the device if None.

    Returns:
        (B, num_prefix_tokens + n, D); the input itself in eval mode and if all tokens are kept.

    Raises:
        ValueError: a rate outside [0, 1], k = 0, a wrong rank, or more prefix tokens than tokens.
        TypeError: a rate that is no number, both names of the rate, or neither.
        RuntimeError: an integer tensor.

    References:
        Liu et al., PatchDropout: economizing vision transformers using patch dropout, WACV 2023 (arXiv:2208.07220).

    Example:
        >>> import torch, torchdrop
        >>> tokens = torch.arange(10.0).reshape(1, 10, 1)
        >>> y = torchdrop.functional.patch_dropout(tokens, 0.5)
        >>> y.shape, y[0, 0].item(), bool((y.diff(dim=1) > 0).all())
        (torch.Size([1, 5, 1]), 0.0, True)
    """
    if isinstance(input, Proxy):
        return recorded(patch_dropout, locals())
    rate = as_rate(p, keep_prob, check=_check_rate)
    _check_prefix(num_prefix_tokens)
    _check_tokens(input, num_prefix_tokens)
    if not sites.is_on(training):
        return input
    check_input(input, "patch_dropout")
    return _take_tokens(input, _kept_tokens(input, num_prefix_tokens, rate, generator))


class PatchDropout(Rated):
    """Module of `patch_dropout`: exactly n tokens of each sample in training, the input itself in eval mode.

    The first two arguments are those of timm's PatchDropout, whose name for the rate is `prob`. Its `ordered` has no
    counterpart, because the order always stays, and `patch_dropout_indices` replaces its `return_indices`, or
    PatchDropoutWithIndices.

    Args:
        p: probability of dropping, in [0, 1), with k = 1 - p. Default: 0.5.
        num_prefix_tokens: the number of tokens at the beginning that are always kept. Default: 1, the class token.
        keep_prob: k, in place of `p`: a number.
        generator: the source of the subsets' keys; PyTorch's default generator of the device if None.

    Shape:
        Input: (B, N, D). Output: (B, num_prefix_tokens + n, D). No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1], k = 0, or a negative number of prefix tokens.
        TypeError: a rate that is no number, or both names of the rate.

    References:
        Liu et al., PatchDropout: economizing vision transformers using patch dropout, WACV 2023 (arXiv:2208.07220).

    Example:
        >>> import torch, torchdrop
        >>> layer, tokens = torchdrop.PatchDropout(0.25), torch.randn(8, 197, 16)
        >>> layer(tokens).shape, layer.eval()(tokens) is tokens
        (torch.Size([8, 148, 16]), True)
    """

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        num_prefix_tokens: int = 1,
        *,
        keep_prob: Probability | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        _check_prefix(num_prefix_tokens)
        self.num_prefix_tokens = num_prefix_tokens

    def _check_rate(self, keep_prob: Probability) -> None:
        _check_rate(keep_prob)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return patch_dropout(
            input, self.rate, self.training, num_prefix_tokens=self.num_prefix_tokens, generator=self.generator
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, num_prefix_tokens={self.num_prefix_tokens}"

"""Multi-sample dropout: the head of a network trained under K dropout masks at once.

With k the keep probability, h the head and m_1 ... m_K independent masks,

    L = (1/K) sum_j loss(h(x m_j / k))   in training
    L = loss(h(x))                       in eval mode

The expectation of L and of its gradient is that of a single mask, and the masks' contribution to the gradient's
variance falls as 1/K (Inoue, 2019). The K masks are one draw, and the head sees K B rows in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..core.checks import check_integer, check_module
from ..core.inputs import check_input
from ..core.portable import refuse_script
from ..core.rate import DEFAULT_P, Probability, RateOfChild, as_rate
from ..core.symbolic import leaf, recorded
from .dropout import Dropout, dropout

SAMPLES = 8

Head = Callable[[Tensor], Tensor]


def _check_samples(samples: Any) -> None:
    check_integer("samples", samples, least=1)


def _outputs(input: Tensor, head: Head, samples: int, training: bool, drop: Head) -> Tensor:
    """Returns the head's outputs under each mask, (samples, B, ...), from one call of it.

    In eval mode, where `drop` returns its input, they are (1, B, ...), and under Monte Carlo inference as well: one
    mask is one sample. The first dimension is kept, so that the rows are in the same dimension as in training.
    """
    if not callable(head):
        raise TypeError(f"head must be a module or function, got {type(head).__name__}")
    if training or not isinstance(input, Tensor):
        check_input(input, "multi_sample_dropout")
    if input.dim() == 0:
        raise ValueError("input must have its samples in the first dimension, (B, ...), got a 0-d tensor")
    if not training:
        return _checked(head(drop(input.unsqueeze(0)).squeeze(0)), input.shape[0]).unsqueeze(0)
    rows = input.shape[0]
    output = head(drop(input.expand(samples, *input.shape)).flatten(0, 1))
    return _checked(output, samples * rows).unflatten(0, (samples, rows))


def _checked(output: Any, rows: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"head must return a tensor, got {type(output).__name__}")
    if output.shape[:1] != (rows,):
        raise ValueError(f"head must give a row for each of {rows} rows, got {tuple(output.shape)}")
    return output


def _mean_loss(outputs: Tensor, loss: Head) -> Tensor:
    losses = [loss(output) for output in outputs.unbind(0)]
    if not isinstance(losses[0], Tensor):
        raise TypeError(f"loss must return a tensor, got {type(losses[0]).__name__}")
    return torch.stack(losses).mean(0)


def multi_sample_dropout(
    input: Tensor,
    head: Head,
    p: Probability = DEFAULT_P,
    training: bool = True,
    samples: int = SAMPLES,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the mean of a head's outputs under K dropout masks, from one call of the head on K B rows.

    ``y = (1/K) sum_j h(x m_j / k)``. Each term is `dropout` of x under a mask of its own, then the head. For a linear
    head E[y] = h(x). The loss of this mean is not the published loss: that is the mean of the losses,
    `multi_sample_loss`, which is larger for a convex loss. In eval mode it is h(x); under Monte Carlo inference one
    mask is one sample. A head that looks at the batch as a whole, such as one with batch normalization, sees K B rows.

    Args:
        input: x, (B, ...): float16, bfloat16, float32 or float64.
        head: h, from (R, ...) to a tensor with R rows for any number R: a module or function.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        samples: K, at least 1. Default: 8.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against (K, *x.shape).
        generator: the source of the masks' key; PyTorch's default generator of the device if None.

    Returns:
        An output of the head's shape for x, (B, ...).

    Raises:
        ValueError: a rate outside [0, 1], `samples` below 1, an input without dimensions, or a head that does not keep
            the rows.
        TypeError, RuntimeError: as `dropout`; a head that cannot be called, or that does not return a tensor.

    References:
        Inoue, Multi-sample dropout for accelerated training and better generalization, 2019 (arXiv:1905.09788).

    Example:
        >>> import torch, torchdrop
        >>> head = torch.nn.Linear(16, 3)
        >>> torchdrop.functional.multi_sample_dropout(torch.randn(5, 16), head, 0.3, samples=4).shape
        torch.Size([5, 3])
    """
    if isinstance(input, Proxy):
        return recorded(multi_sample_dropout, locals())
    return _under_masks(input, head, p, training, samples, keep_prob, generator).mean(0)


def multi_sample_loss(
    input: Tensor,
    head: Head,
    loss: Callable[[Tensor], Tensor],
    p: Probability = DEFAULT_P,
    training: bool = True,
    samples: int = SAMPLES,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the mean of a loss under K dropout masks before the head: multi-sample dropout as published.

    ``L = (1/K) sum_j loss(h(x m_j / k))``. The head is called once, on K B rows; the loss, which costs little, is
    called once for each mask, so that it may use any reduction. E[L] and E[grad L] are those of one mask, and the
    masks' contribution to the gradient's variance is 1/K of that of one mask. With K = 1 it is dropout before the head,
    with the same mask under the same seed. In eval mode it is loss(h(x)).

    Args:
        input, head: as `multi_sample_dropout` takes them.
        loss: a function from the head's output for B rows to a tensor of any shape, the same each time.
        p, training, samples, keep_prob, generator: as `multi_sample_dropout` takes them.

    Returns:
        The mean of the results of `loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `multi_sample_dropout`.

    References:
        Inoue, Multi-sample dropout for accelerated training and better generalization, 2019 (arXiv:1905.09788).

    Example:
        >>> import torch, torchdrop
        >>> import torch.nn.functional as F
        >>> head, x, target = torch.nn.Linear(16, 3), torch.randn(5, 16), torch.tensor([0, 1, 2, 0, 1])
        >>> loss = torchdrop.functional.multi_sample_loss(x, head, lambda y: F.cross_entropy(y, target), 0.3)
        >>> loss.backward()
        >>> loss.shape, head.weight.grad.shape
        (torch.Size([]), torch.Size([3, 16]))
    """
    if isinstance(input, Proxy):
        return recorded(multi_sample_loss, locals())
    return _mean_loss(_under_masks(input, head, p, training, samples, keep_prob, generator), loss)


def _under_masks(
    input: Tensor,
    head: Head,
    p: Any,
    training: bool,
    samples: int,
    keep_prob: Any,
    generator: torch.Generator | None,
) -> Tensor:
    rate: Any = as_rate(p, keep_prob)
    _check_samples(samples)
    return _outputs(input, head, samples, training, lambda x: dropout(x, rate, training, generator=generator))


class MultiSampleDropout(RateOfChild, nn.Module):
    """Module of `multi_sample_dropout` and `multi_sample_loss`: a head, and the dropout before it.

    A call with the features returns the mean of the head's outputs, and replaces ``head(dropout(x))``; `loss` returns
    the mean of the losses, which is the method as published. In eval mode it is the head.

    Args:
        head: the module that is trained under K masks, from (R, ...) to a tensor with R rows.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        samples: K, at least 1. Default: 8.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against (K, *x.shape).
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Attributes:
        head: the head; its parameters are the module's.
        dropout: the `Dropout` that holds the rate, under whose name `keep_probs` lists it.

    Raises:
        ValueError: a rate outside [0, 1], or `samples` below 1.
        TypeError: both names of the rate, something that is no number, or a head that is no module.

    References:
        Inoue, Multi-sample dropout for accelerated training and better generalization, 2019 (arXiv:1905.09788).

    Example:
        >>> import torch, torchdrop
        >>> import torch.nn.functional as F
        >>> classifier = torchdrop.MultiSampleDropout(torch.nn.Linear(16, 3), 0.3, samples=4)
        >>> x, target = torch.randn(5, 16), torch.tensor([0, 1, 2, 0, 1])
        >>> loss = classifier.loss(x, lambda y: F.cross_entropy(y, target))
        >>> logits = classifier.eval()(x)
        >>> loss.shape, torch.equal(logits, classifier.head(x)), list(classifier.state_dict())
        (torch.Size([]), True, ['head.weight', 'head.bias'])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        head: nn.Module,
        p: Probability = DEFAULT_P,
        samples: int = SAMPLES,
        *,
        keep_prob: Probability | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_module("head", head)
        _check_samples(samples)
        self.dropout: Dropout = Dropout(p, keep_prob=keep_prob, generator=generator)
        self.head = head
        self.samples = samples

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return _outputs(input, self.head, self.samples, self.training, self.dropout).mean(0)

    def loss(self, input: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the mean of a loss of the head's outputs under K masks; in eval mode the loss of ``head(input)``.

        Args:
            input: the features, (B, ...).
            loss: a function from the head's output for B rows to a tensor.
        """
        return _mean_loss(_outputs(input, self.head, self.samples, self.training, self.dropout), loss)

    def extra_repr(self) -> str:
        return f"samples={self.samples}"

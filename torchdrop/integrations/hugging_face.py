"""Keep-probability schedules under the Hugging Face Trainer, and attention with exact dropout in transformers' models
(``pip install 'torchdrop[hugging-face]'``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import unwrapped
from ..layers.attention import scaled_dot_product_attention
from ..scheduler import KeepProbScheduler
from ..schedules import Scaled, ScheduleLike
from .every import check_every, state_key

try:
    from transformers import TrainerCallback
except ImportError as _error:
    raise ImportError("this needs transformers: pip install 'torchdrop[hugging-face]'") from _error


class KeepProbCallback(TrainerCallback):
    """Lets keep probabilities follow schedules while the Hugging Face Trainer trains.

    The step is the Trainer's own (`global_step`, of the optimizer, or whole epochs), which its checkpoints hold, so
    that training resumed from one goes on with the right rates.

    Args:
        rates: as `torchdrop.KeepProbScheduler` takes them; names are those in the model given to the Trainer.
        every: "step" or "epoch": the unit of a schedule's step.

    Raises:
        ValueError: another value of `every`. When training starts, `KeepProbScheduler` may raise its own errors.

    Example:
        >>> import torchdrop
        >>> from torchdrop.integrations.hugging_face import KeepProbCallback
        >>> callback = KeepProbCallback({"*dropout*": torchdrop.schedules.curriculum(0.9, 1000)})
        >>> # transformers.Trainer(model, callbacks=[callback], ...).train()
    """

    def __init__(self, rates: Mapping[str, ScheduleLike | Scaled], *, every: str = "step") -> None:
        self.rates = rates
        self.every: str = check_every(every)
        self.scheduler: KeepProbScheduler | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.scheduler is None or self.scheduler.model is not unwrapped(model):
            self.scheduler = KeepProbScheduler(model, self.rates)
        saved = getattr(state, "stateful_callbacks", {}).get(state_key(self.rates, self.every))
        if saved is not None:
            self.scheduler.load_state_dict(saved)
        self._follow(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.scheduler is not None and hasattr(state, "stateful_callbacks"):
            state.stateful_callbacks[state_key(self.rates, self.every)] = self.scheduler.state_dict()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._follow(state)

    def _follow(self, state: Any) -> None:
        now = state.global_step if self.every == "step" else int(state.epoch or 0)
        if self.scheduler is not None and self.scheduler.last_step != now:
            self.scheduler.seek(now)


def register_attention(name: str = "torchdrop") -> None:
    """Lets transformers' models compute attention by `torchdrop.functional.scaled_dot_product_attention`.

    A model takes it by ``attn_implementation=name``. Its masks are those of "sdpa". Models with a soft cap or attention
    sinks, and calls that ask for the attention weights, are refused.

    Args:
        name: the name under which transformers will know it.

    Raises:
        ImportError: this version of transformers has no registry of attention functions.

    Example:
        >>> from torchdrop.integrations import hugging_face
        >>> hugging_face.register_attention()
        >>> # transformers.AutoModel.from_pretrained("...", attn_implementation="torchdrop")
    """
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise ImportError("register_attention needs a transformers with AttentionInterface: 4.51 or newer") from error
    AttentionInterface.register(name, attention_forward)
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    except ImportError:  # before 4.53 models make their masks without asking
        return
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register_attention` registers. Arguments and results are those of transformers'
    function for "sdpa"; positions of the batch's rows come first, then heads.

    Raises:
        ValueError: the model asks for something that scaled_dot_product_attention has not.

    Example:
        >>> import torch
        >>> from torchdrop.integrations.hugging_face import attention_forward
        >>> q, k, v = torch.randn(3, 2, 4, 7, 8).unbind()
        >>> attention_forward(torch.nn.Module(), q, k, v, None, dropout=0.1)[0].shape
        torch.Size([2, 7, 4, 8])
    """
    for asked in ("softcap", "s_aux", "output_attentions"):
        if kwargs.get(asked) not in (None, False):
            raise ValueError(f"torchdrop's attention does not support {asked}: use attn_implementation='eager'")
    queries = query.shape[2]
    wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(queries > 1 and attention_mask is None and wanted)
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias)
    out = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Returns a mask to be added to the scores, with a bias for positions."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask

"""Keep-probability schedules under the Hugging Face Trainer (``pip install 'torchdrop[hugging-face]'``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.checks import unwrapped
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

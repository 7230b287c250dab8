"""Keep-probability schedules under Lightning's Trainer (``pip install 'torchdrop[lightning]'``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.checks import unwrapped
from ..scheduler import KeepProbScheduler
from ..schedules import Scaled, ScheduleLike
from .every import check_every, state_key

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    try:
        import lightning.pytorch as pl
    except ImportError:
        try:
            import pytorch_lightning as pl
        except ImportError as _error:
            raise ImportError("this needs lightning: pip install 'torchdrop[lightning]'") from _error


class KeepProbCallback(pl.Callback):
    """Lets keep probabilities follow schedules while Lightning trains.

    The step is the Trainer's own (`global_step`, of the optimizer, or `current_epoch`), which its checkpoints hold,
    so that training resumed from one goes on with the right rates. Rates are logged as ``keep_prob/NAME`` if `log` is
    set.

    Args:
        rates: as `torchdrop.KeepProbScheduler` takes them; names are those in the LightningModule.
        every: "step" or "epoch": the unit of a schedule's step.
        log: whether the rates are logged.

    Raises:
        ValueError: another value of `every`. When training starts, `KeepProbScheduler` may raise its own errors.

    Example:
        >>> import torchdrop
        >>> from torchdrop.integrations.lightning import KeepProbCallback
        >>> callback = KeepProbCallback({"*": torchdrop.schedules.linear(1.0, 0.5, 1000)})
        >>> # lightning.Trainer(callbacks=[callback]).fit(module)
    """

    def __init__(self, rates: Mapping[str, ScheduleLike | Scaled], *, every: str = "step", log: bool = False) -> None:
        super().__init__()
        self.rates = rates
        self.every: str = check_every(every)
        self.log = log
        self.scheduler: KeepProbScheduler | None = None
        self._loaded: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        return state_key(self.rates, self.every)

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() if self.scheduler is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict  # before there is a scheduler

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.scheduler is None or self.scheduler.model is not unwrapped(pl_module):
            self.scheduler = KeepProbScheduler(pl_module, self.rates)
        if self._loaded:
            self.scheduler.load_state_dict(self._loaded)
            self._loaded = {}
        self._follow(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._follow(trainer)
        if self.log and self.scheduler is not None:
            rates = {f"keep_prob/{name}": float(k) for name, k in self.scheduler.get_last_keep_prob().items()}
            pl_module.log_dict(rates)

    def _follow(self, trainer: pl.Trainer) -> None:
        now = trainer.global_step if self.every == "step" else trainer.current_epoch
        if self.scheduler is not None and self.scheduler.last_step != now:
            self.scheduler.seek(now)

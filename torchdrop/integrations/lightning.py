"""Keep-probability schedules under Lightning's Trainer (``pip install 'torchdrop[lightning]'``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configure.holders import unwrapped
from ..scheduler import KeepProbScheduler
from .every import check_every

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError("this needs lightning: pip install 'torchdrop[lightning]'") from error


class KeepProbCallback(pl.Callback):
    """Lets keep probabilities follow schedules while Lightning trains.

    The step is the Trainer's own (`global_step`, of the optimiser, or `current_epoch`), which its checkpoints hold,
    so that training resumed from one goes on with the right rates. Rates are logged as ``keep_prob/NAME`` if `log` is
    set.

    Args:
        rates: as `torchdrop.KeepProbScheduler` takes them; names are those in the LightningModule.
        every: "step" or "epoch": what a schedule's step is.
        log: whether the rates are logged.

    Raises:
        ValueError: another value of `every`; when training starts, what `KeepProbScheduler` raises.

    Example:
        >>> import torchdrop
        >>> from torchdrop.integrations.lightning import KeepProbCallback
        >>> callback = KeepProbCallback({"*": torchdrop.schedules.linear(1.0, 0.5, 1000)})
        >>> # lightning.Trainer(callbacks=[callback]).fit(module)
    """

    def __init__(self, rates: Mapping[str, Any], *, every: str = "step", log: bool = False) -> None:
        super().__init__()
        self.rates, self.every, self.log = rates, check_every(every), log
        self.scheduler: KeepProbScheduler | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.scheduler = KeepProbScheduler(unwrapped(pl_module), self.rates)
        self._follow(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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

"""Keep-probability schedules, and generators' states in checkpoints, under Lightning's Trainer.

It needs ``pip install 'torchdrop[lightning]'``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.checks import unwrapped
from ..scheduler import KeepProbScheduler
from ..schedules import Scaled, ScheduleLike
from .every import check_every, state_key
from .generators import generator_states, of_all_processes, of_this_process, set_generator_states

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

_GENERATORS = "generators"


class KeepProbCallback(pl.Callback):
    """Lets keep probabilities follow schedules while Lightning trains.

    The step is the Trainer's own (`global_step`, of the optimizer, or `current_epoch`), which its checkpoints hold,
    so that training resumed from one goes on with the right rates. Rates are logged as ``keep_prob/NAME`` if `log` is
    set.

    With `generators`, checkpoints also hold the states of the generators: Python's, numpy's, PyTorch's on the CPU and
    on the current CUDA device, and those that layers hold. A resumed run then draws the masks that the uninterrupted
    one draws, and is equal to it bit for bit if its batches are: after the checkpoint of an epoch, also with a loader
    that shuffles, and within an epoch with a loader that has a `state_dict`, since any other begins again with its
    first batch. Let ModelCheckpoint save an epoch after its validation, as it does by default.

    Args:
        rates: as `torchdrop.KeepProbScheduler` takes them; names are those in the LightningModule.
        every: "step" or "epoch": the unit of a schedule's step.
        log: whether the rates are logged.
        generators: whether checkpoints hold the states of the generators, and a resumed run goes on from them.

    Raises:
        ValueError: another value of `every`. When training starts, `KeepProbScheduler` may raise its own errors, and
            the generators' states may be those of another number of processes.

    Example:
        >>> import torchdrop
        >>> from torchdrop.integrations.lightning import KeepProbCallback
        >>> callback = KeepProbCallback({"*": torchdrop.schedules.linear(1.0, 0.5, 1000)})
        >>> # lightning.Trainer(callbacks=[callback]).fit(module)
    """

    def __init__(
        self,
        rates: Mapping[str, ScheduleLike | Scaled],
        *,
        every: str = "step",
        log: bool = False,
        generators: bool = False,
    ) -> None:
        super().__init__()
        self.rates = rates
        self.every: str = check_every(every)
        self.log = log
        self.generators = generators
        self.scheduler: KeepProbScheduler | None = None
        self._loaded: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self._within_epoch = False

    @property
    def state_key(self) -> str:
        return state_key(self.rates, self.every)

    def state_dict(self) -> dict[str, Any]:
        if self.scheduler is None:
            return {}
        state: dict[str, Any] = dict(self.scheduler.state_dict())
        if self.generators:
            states = of_all_processes(generator_states(self.scheduler.model))
            state[_GENERATORS] = {"states": states, "within_epoch": self._within_epoch}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)  # before there is a scheduler
        resumed = self._loaded.pop(_GENERATORS, None)
        self._resumed = resumed if self.generators else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._resumed is not None and not self._resumed["within_epoch"]:
            self._set_generators(pl_module)  # the loader draws its order next, as it does after an epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.scheduler is None or self.scheduler.model is not unwrapped(pl_module):
            self.scheduler = KeepProbScheduler(pl_module, self.rates)
        if self._loaded:
            self.scheduler.load_state_dict(self._loaded)
            self._loaded = {}
        if self._resumed is not None:
            self._set_generators(pl_module)  # after the loader has drawn what it drew before the checkpoint
        self._follow(trainer)

    def _set_generators(self, pl_module: pl.LightningModule) -> None:
        assert self._resumed is not None
        set_generator_states(unwrapped(pl_module), of_this_process(self._resumed["states"]))
        self._resumed = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._follow(trainer)
        if self.log and self.scheduler is not None:
            rates = {f"keep_prob/{name}": float(k) for name, k in self.scheduler.get_last_keep_prob().items()}
            pl_module.log_dict(rates)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._within_epoch = not trainer.is_last_batch

    def _follow(self, trainer: pl.Trainer) -> None:
        now = trainer.global_step if self.every == "step" else trainer.current_epoch
        if self.scheduler is not None and self.scheduler.last_step != now:
            self.scheduler.seek(now)

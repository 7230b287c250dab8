"""`MCPredictor`: Monte Carlo predictions of one model, for requests that come one after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import optional
from ..core.checks import check_integer
from .activate import Activation, check_masks, check_model, check_seed, check_sources, new_seed
from .attributes import Snapshot
from .batches import Reader
from .classes import class_numbers
from .heads import Predictions, read_tasks
from .inputs import Inputs
from .job import Job
from .joining import check_mode, check_shapes
from .memory import MemoryPlan
from .outputs import Picker
from .plain import Task
from .plan import SamplePlan, agreed_seed
from .prediction import Prediction
from .sample import STRATEGIES, Sampler
from .standard_errors import Errors, check_errors
from .strategy import Choice
from .turns import Turns


class MCPredictor:
    """Predicts with one model again and again: `mc_predict`, whose first part is done once.

    The first call finds out what is random in the model, which strategy is the fastest, and how the outputs are to be
    read. Further calls, of any number of rows, only run samples. The masks of row b of a call follow from (seed,
    source, sample, b), so that equal inputs get equal answers, whoever asks and when.

    Before each call the model is looked at. If modules, attributes, rates, training flags, devices or hooks are others
    than before, the first part is done again. Weights may change at will. Calls from several threads run one at a time,
    in the order in which they come.

    Args:
        model: the model, in train or eval mode. It is never changed.
        samples: T.
        example: inputs to do the first part with, so that the first request need not wait. Default: the first call's.
        compile: whether samples, and their statistics where all fit into one chunk, are run by `torch.compile`. It
            takes seconds for each power of two of rows, and calls that follow are several times faster where a pass
            takes little time. Outputs equal the others up to rounding, under the same masks. Where the model cannot be
            compiled, a warning and the report say why, and samples run as they do without.
        seed: the seed of all masks, of all calls; drawn from PyTorch's default generator here if None.
        task, scores, class_dim, valid, tau, noise, masks, sampling, tolerance, sources, strategy, chunk, memory,
            batch_dim, method, select, select_output, batches, standard_errors, keep_samples, weight_scaling, group:
            as in `mc_predict`.

    Raises:
        TypeError, ValueError, RuntimeError: as `mc_predict`, here or in a call.

    Warns:
        UserWarning: as `mc_predict`, when the first part is done.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> predictor = torchdrop.MCPredictor(model, samples=30, task="classification", seed=0)
        >>> x = torch.randn(5, 4)
        >>> whole, one = predictor(x), predictor(x[:1])
        >>> torch.allclose(whole.mean[:1], one.mean, atol=1e-6), one.num_samples
        (True, 30)
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int = 100,
        *,
        example: Any = None,
        compile: bool = False,
        task: str | Mapping[str, str | None] | None = None,
        scores: str = "auto",
        class_dim: int | str = "auto",
        valid: str | Tensor | None = None,
        tau: float | None = None,
        noise: str | None = None,
        seed: int | None = None,
        masks: str = "independent",
        sampling: str = "iid",
        tolerance: float | None = None,
        sources: str | Sequence[str] | None = None,
        strategy: str = "auto",
        chunk: int | None = None,
        memory: int | None = None,
        batch_dim: int | None = 0,
        method: str | None = None,
        select: Callable[[Any], Any] | None = None,
        select_output: Callable[[Any], Any] | None = None,
        batches: str = "joined",
        standard_errors: Errors = "auto",
        keep_samples: bool = False,
        weight_scaling: bool = False,
        group: Any = None,
    ) -> None:
        self._model = check_model(model)
        self._method = _method(self._model, method)
        self._plan = (_positive("samples", samples), _tolerance(tolerance), _sampling(sampling) == "latin", group)
        if strategy not in ("auto", *STRATEGIES):
            raise ValueError(f"strategy must be 'auto', {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
        self._tasks = _tasks(task, self._model, scores, class_dim, tau, noise)
        self._padded = check_mode(batches)
        check_errors(standard_errors, self._tasks.values() if isinstance(self._tasks, dict) else [self._tasks])
        self._shared, self._patterns = check_masks(masks), check_sources(self._model, sources)
        self.seed: int = agreed_seed(new_seed() if seed is None else check_seed(seed), group)
        self._outputs = (select_output, noise == "log_variance", task)
        self._strategy, self._memory, self._errors = strategy, memory, standard_errors
        self._chunk = None if chunk is None else _positive("chunk", chunk)
        self._keep, self._valid, self._weight_scaling = keep_samples, valid, weight_scaling
        self._select, self._dim, self._compile = select, batch_dim, compile
        self._turns = Turns()
        self._job: tuple[Job, Reader] | None = None
        self._seen: Seen | None = None
        if example is not None:
            self._predict(example, False, "MCPredictor", 2)

    def __call__(self, inputs: Any, *, progress: bool = False) -> Prediction:
        """Returns the prediction for these inputs, as `mc_predict` does."""
        return self._predict(inputs, progress, "MCPredictor", 2)

    def _predict(self, inputs: Any, progress: bool, caller: str, stacklevel: int) -> Prediction:
        with self._turns:
            known = self._job is not None and self._seen is not None and self._seen.holds()
            job, reader = self._job if known and self._job is not None else self._new_job()
            job.restart()
            self._job = None  # an error may leave it in the middle of a batch
            prediction = self._run(job, reader, inputs, progress)
            said = [] if known else job.omissions()
            if not known:
                self._seen = Seen(self._model)
            self._job = job, reader
            for what in [*said, *job.remarks()]:
                warnings.warn(f"{caller}: {what}", UserWarning, stacklevel=stacklevel + 1)
            return prediction

    def _run(self, job: Job, reader: Reader, inputs: Any, progress: bool) -> Prediction:
        results: list[dict[str, Prediction]] = []
        with torch.no_grad(), job.activation.kept_states():
            for batch in _shown(reader.batches(inputs), progress):
                results.append(_in_one(job.run(batch, self._weight_scaling)))
                for name, prediction in results[-1].items():
                    check_shapes(results[0][name].mean.shape, prediction.mean.shape, len(results), self._padded)
        if not results:
            raise ValueError("inputs must hold at least one batch, got none")
        joined = {name: _joined([result[name] for result in results], self._padded) for name in results[0]}
        return Predictions(joined) if any(joined) else joined[""]  # type: ignore[return-value]  # see mc_predict

    def _new_job(self) -> tuple[Job, Reader]:
        effort = SamplePlan(*self._plan)
        pick = Picker(*self._outputs)
        activation = Activation(self._model, self._patterns, self._dim, self._method)
        sampler = Sampler(activation, pick, self.seed, self._shared, effort.hypercube)
        choice = Choice(activation, sampler, self._strategy, effort.samples)
        memory = MemoryPlan(self._memory, effort, self._errors)
        reader = Reader(self._model, self._method, self._select, self._dim)
        job = Job(
            activation,
            sampler,
            pick,
            self._tasks,
            effort,
            choice,
            self._chunk,
            memory,
            self._keep,
            self._valid,
            self._compile,
        )
        return job, reader


class Seen:
    """The modules of a model with their attributes, the places of its parameters, which may change in the same objects,
    and its hooks: all that must be as it was for the next call."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._parameters = list(model.parameters())
        self._attributes = Snapshot(self._modules)
        self._rest = self._present_rest()

    def holds(self) -> bool:
        return self._attributes.holds() and self._rest == self._present_rest()

    def _present_rest(self) -> list[Any]:
        places = [(parameter.device, parameter.dtype) for parameter in self._parameters]
        hooks = [(*module._forward_pre_hooks, *module._forward_hooks) for module in self._modules]
        return [*places, *hooks]


def _in_one(blocks: Sequence[dict[str, Prediction]]) -> dict[str, Prediction]:
    """Returns the predictions of a batch that was run in blocks of rows."""
    return {name: _joined([block[name] for block in blocks], False) for name in blocks[0]}


def _joined(predictions: Sequence[Prediction], padded: bool) -> Prediction:
    one = len(predictions) == 1 and not padded
    return predictions[0] if one else type(predictions[0]).concatenated(predictions, padded=padded)


def _method(model: nn.Module, method: Any) -> str:
    if method is None:
        return "__call__"
    if not isinstance(method, str):
        raise TypeError(f"method must be the name of a method or None, got {type(method).__name__}")
    if not callable(getattr(model, method, None)):
        raise ValueError(f"method must name a method of the model, but {type(model).__name__} has no {method!r}")
    return method


def _positive(name: str, value: Any) -> int:
    return check_integer(name, value, least=1)


def _tolerance(tolerance: Any) -> float | None:
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    return tolerance


def _sampling(sampling: str) -> str:
    if sampling not in ("iid", "latin"):
        raise ValueError(f"sampling must be 'iid' or 'latin', got {sampling!r}")
    return sampling


def _tasks(
    task: str | Mapping[str, str | None] | None,
    model: nn.Module,
    scores: str,
    class_dim: int | str,
    tau: float | None,
    noise: str | None,
) -> Task | dict[str, Task]:
    numbers = class_numbers(model)
    return read_tasks(task, scores=scores, class_dim=class_dim, class_numbers=numbers, tau=tau, noise=noise)


def _shown(batch: Iterable[Inputs], progress: bool) -> Iterable[Inputs]:
    return optional("tqdm.auto").tqdm(batch, unit="batch") if progress else batch

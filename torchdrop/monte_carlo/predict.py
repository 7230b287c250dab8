"""`mc_predict`: samples of a model's outputs, run in the fastest way that works, and statistics of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import optional
from ..core.checks import check_integer
from ..handlers.prefix import Prefix
from ..layers.compact.sequential import CompactSequential
from .activate import ADVICE, Activation, check_masks, check_model, check_seed, check_sources, new_seed
from .blocks import as_numbers
from .classes import class_numbers
from .inputs import Inputs, batches, picker
from .memory import GROUPS, MemoryPlan, rows_of, valid_places
from .plain import Task
from .plan import ROUND, SamplePlan, agreed_seed
from .prediction import Prediction
from .sample import STRATEGIES, Outputs, Sampler
from .standard_errors import Errors, error_names
from .statistics import Collector
from .task_predictions import predict_from
from .tasks import read_task

_FEW = 0.2
"""The least share of the calls before the first random one that is worth running once."""


def mc_predict(
    model: nn.Module,
    inputs: Any,
    samples: int = 100,
    *,
    task: str | None = None,
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
    standard_errors: Errors = "auto",
    keep_samples: bool = False,
    weight_scaling: bool = False,
    progress: bool = False,
    group: Any = None,
) -> Prediction:
    """Returns mean and uncertainty of a model's outputs over its own dropout: Monte Carlo dropout.

    ``mean = 1/T sum_t f(x, mask_t)`` over T = `samples` passes in which everything draws that would draw in train mode,
    and nothing else changes (see `mc_dropout`). The mask of each row of the data follows from (seed, source, sample,
    row) alone, so the result does not depend on batch sizes, chunks, strategy or processes, up to rounding. The calls
    before the first random one run once for each batch. Statistics are streamed: memory does not grow with T.

    Args:
        model: the model, in train or eval mode. It is never changed, so that several threads can predict with one
            model, or call it in other ways, at once.
        inputs: a tensor, a tuple (positional arguments), a mapping (named arguments), or an iterable of batches such
            as a DataLoader. A batch that is a pair is taken as (inputs, targets), and the targets are left out.
        samples: T, or the largest T if there is a tolerance.
        task: "classification" (outputs of shape (rows, classes, ...), of which one is true), "multilabel" (each element
            is a label that is present or not), "regression", or None for plain moments, also of boolean outputs.
        scores: the kind of outputs in classification and of labels: "logits", "probabilities", or "auto" for
            probabilities where all classes sum to 1, or all labels are in [0, 1], and logits otherwise.
        class_dim: for classification, the dimension of classes in `mean`, whose rows are dimension 0; it may be counted
            from the last by a negative number. "auto" takes the only dimension whose size is the number of classes, or
            of words, in the model's `config`, or over which probabilities sum to 1, and otherwise dimension 1, as
            torch.nn.CrossEntropyLoss does, with a warning where another could be meant.
        valid: the places that are reported, such as the tokens that are no padding: the name of an argument of the
            model, such as "attention_mask", or a tensor (rows, ...) for all rows. Where it is 0 or False, outputs may
            be anything, even NaN; the prediction is NaN there, and summary and metrics leave them out.
        tau: for regression, the precision of the noise.
        noise: for regression, "log_variance" if the model returns it: as the second of a pair of outputs, or in the
            second half of their last dimension.
        seed: the seed of all masks; drawn from PyTorch's default generator if None.
        masks: "independent": each row has its own masks. "shared": all rows of the data have those of row 0, so that
            each sample is one function.
        sampling: "iid", or "latin": over the samples, each unit's draws form a Latin hypercube, so that a unit with
            keep probability k is kept T k times. Each mask keeps its distribution; the mean's variance falls.
        tolerance: stop when no standard error of the mean exceeds this. It is checked every 20 samples, which then make
            up a hypercube under "latin".
        sources: glob patterns of names of modules whose randomness is wanted ("head" includes all modules in it);
            everything if None.
        strategy: "vectorized", "repeated" or "loop" (see `sample`), or "auto" for the first that works.
        chunk: the number of samples that are run at a time; as many as fit into `memory` if None.
        memory: a bound, in bytes, for what the samples of a chunk and the statistics have at once, estimated from two
            rows. Default: 32 MiB on the CPU, 1 GiB elsewhere. Where the statistics of a batch do not fit, or a single
            sample of it does not fit into a bound that was given, its rows are run in blocks, of one row at least,
            unless there is a tolerance or rows depend on each other. The result itself is not counted.
        batch_dim: the dimension of the inputs that counts rows; None if they are one whole, as a graph is.
        method: the name of the model's method that is called, such as "encode"; the model itself if None.
        select: takes the inputs from a batch of an iterable.
        select_output: takes the tensor from the model's output. By default a tensor is taken as it is, and from a
            mapping `logits` or `last_hidden_state`.
        standard_errors: the statistics that get a Monte Carlo standard error: True for all, False for none, a sequence
            of names such as ("mean", "mutual_information"), or "auto" for all where a row's output has at most 16384
            elements, and for the mean alone where it has more, as images of classes do. All but the mean's need the
            moments of ten groups of samples: ten times the time and memory of the statistics themselves.
        keep_samples: whether all samples are kept, for quantiles and the like.
        weight_scaling: whether the deterministic pass of eval mode is made as well, to compare with.
        progress: whether to show a progress bar (tqdm).
        group: a torch.distributed process group over whose processes the samples are split. All of them get the result.

    Returns:
        A `Prediction`, `ClassificationPrediction`, `MultiLabelPrediction` or `RegressionPrediction`, rows first, with
        `mean` and the standard errors that were chosen, by the statistics' names in `standard_errors`. Under "latin"
        without a tolerance these are upper bounds: a hypercube's variance is at most T / (T - 1) times that of
        independent samples (Owen, 1997).

    Raises:
        ValueError: an argument out of range, no random source, a NaN in a sample, outputs that change their shape or
            do not fit the task, inputs on another device than the model.
        TypeError: a model, input or output of a kind that is not served.
        RuntimeError: a forced strategy that does not work.

    Warns:
        UserWarning: identical samples; another dimension that could be meant by classes; a tolerance that was not met;
            something that is random in train mode and could not be turned on.

    References:
        Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016. McKay, Beckman and Conover, "A Comparison
        of Three Methods for Selecting Values of Input Variables", Technometrics 21, 1979. Owen, "Monte Carlo Variance
        of Scrambled Net Quadrature", SIAM Journal on Numerical Analysis 34, 1997.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> result = torchdrop.mc_predict(model, torch.randn(5, 4), samples=50, task="classification", seed=0)
        >>> result.mean.shape, result.mutual_information.shape, result.num_samples
        (torch.Size([5, 3]), torch.Size([5]), 50)
    """
    check_model(model)
    method = _method(model, method)
    effort = SamplePlan(_positive("samples", samples), _tolerance(tolerance), _sampling(sampling) == "latin", group)
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy must be 'auto', {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    kind = read_task(task, scores=scores, class_dim=class_dim, class_numbers=class_numbers(model), tau=tau, noise=noise)
    error_names(standard_errors, kind)
    shared, patterns = check_masks(masks), check_sources(model, sources)
    chosen_seed = agreed_seed(new_seed() if seed is None else check_seed(seed), group)
    chosen = picker(select_output, pair=noise == "log_variance")

    def pick(returned: Any) -> Outputs:
        return tuple(as_numbers(part, task) for part in chosen(returned))

    activation = Activation(model, patterns, batch_dim, method)
    sampler = Sampler(activation, pick, chosen_seed, shared, effort.hypercube)
    job = _Job(
        activation,
        sampler,
        pick,
        effort,
        strategy,
        None if chunk is None else _positive("chunk", chunk),
        MemoryPlan(memory, effort, standard_errors),
        keep_samples,
        valid,
    )
    results: list[Prediction] = []
    with torch.no_grad(), activation.kept_states():
        for batch in _shown(batches(inputs, select, batch_dim, model), progress):
            results += job.run(batch, kind, weight_scaling)
            kind = job.task or kind
    activation.list_sources()
    activation.warn_of_omissions("mc_predict", 2)
    if not results:
        raise ValueError("inputs must hold at least one batch, got none")
    if effort.samples > 1 and job.identical:
        warnings.warn(f"mc_predict: all samples are identical. {ADVICE}", UserWarning, stacklevel=2)
    doubt = getattr(job.task, "doubt", "")
    if doubt:
        warnings.warn(f"mc_predict: {doubt}", UserWarning, stacklevel=2)
    if job.reached is not None:
        warnings.warn(
            f"mc_predict: tolerance={tolerance} was not met after {samples} samples: the largest standard error of the "
            f"mean is {job.reached:.3g}. Raise samples or tolerance",
            UserWarning,
            stacklevel=2,
        )
    return type(results[0]).concatenated(results) if len(results) > 1 else results[0]


class _Job:
    """The batches of one prediction, one after another. The strategy is decided on the first."""

    def __init__(
        self,
        activation: Activation,
        sampler: Sampler,
        pick: Callable[[Any], Outputs],
        effort: SamplePlan,
        strategy: str,
        chunk: int | None,
        memory: MemoryPlan,
        keep_samples: bool,
        valid: str | Tensor | None,
    ) -> None:
        self._activation, self._sampler, self._pick, self._effort = activation, sampler, pick, effort
        self._strategy, self._chunk, self._memory, self._keep = strategy, chunk, memory, keep_samples
        self._prepared = False
        self._valid = valid
        self._compared = False
        self._rows_alone = True
        self._next_row = 0
        self.task: Task | None = None
        self.identical = True
        self.reached: float | None = None

    def run(self, inputs: Inputs, task: Task, weight_scaling: bool) -> list[Prediction]:
        """Returns the predictions for one batch: one, or one for each block of its rows."""
        if not self._prepared:
            self._memory.row_bytes, self._memory.row_elements = self._prepare(inputs)
            self._prepared = True
        predictions = []
        for block in self._blocks(inputs, task):
            predictions.append(self._run(block, self.task or task, weight_scaling))
        return predictions

    def _blocks(self, inputs: Inputs, task: Task) -> Iterator[Inputs]:
        """Yields the batch, or blocks of its rows if its statistics, or a sample of it, do not fit into memory."""
        height, rows = self._memory.rows(inputs, task), inputs.rows or 1
        if height is None:
            yield inputs
            return
        if not self._compared:
            few = rows_of(inputs, 0, min(max(height, 3), rows))
            self._activation.server.prefix = None
            self._compare(few, (0,), self._sampler.run("loop", few, (0,), self._next_row))
        if not self._rows_alone:
            yield inputs
            return
        for first in range(0, rows, height):
            yield rows_of(inputs, first, min(height, rows - first))

    def _run(self, inputs: Inputs, task: Task, weight_scaling: bool) -> Prediction:
        """Returns the prediction for a block of rows, or for a whole batch."""
        server, effort = self._activation.server, self._effort
        server.prefix = None if self._strategy == "repeated" or self._sampler.writes else Prefix()
        size = self._chunk or (1 if self._strategy == "loop" else self._memory.samples(inputs, task))
        self._activation.report.chunk = size
        groups = max(GROUPS, effort.processes)
        valid = valid_places(self._valid, inputs, self._next_row)
        collector = total = self._collector(task, groups, valid)
        done = False
        for step in effort.steps():
            for samples in effort.chunks(effort.mine(step, groups), size):
                outputs = self._sampler.run(self._strategy, inputs, samples, self._next_row)
                self._compare(inputs, samples, outputs)
                collector.add(self._rows_first(outputs), samples)
            total = self._merged(collector, task, inputs.device)
            done = self._close_enough(total)
            if done:
                break
        server.prefix = None
        if effort.tolerance is not None and not done:
            self.reached = max(self.reached or 0.0, float(_mean_error(total).max()))
        self.task, self.identical = total.task, self.identical and total.identical
        self._next_row += inputs.rows or 0
        return predict_from(
            total,
            weight_scaling=self._weight_scaling(inputs) if weight_scaling else None,
            seed=self._sampler.seed,
            strategy=self._strategy,
            report=self._activation.report,
        )

    def _prepare(self, inputs: Inputs) -> tuple[int, int]:
        """Surveys the model, decides on the strategy, and returns the bytes that one row of one sample needs, and the
        elements of its output."""
        activation, sampler, report = self._activation, self._sampler, self._activation.report
        if inputs.rows == 0:
            raise ValueError("inputs must hold at least one row, got none")
        three = activation.survey(inputs)
        if not report.active:
            off = "".join(f"\n  {s.module or '(model)'}: {s.kind}, {s.reason}" for s in report.inactive)
            raise ValueError(
                f"nothing random is active in the model, so all samples would be equal. {ADVICE}{off}{report.noted()}"
            )
        row_bytes, share = sampler.measure(inputs, three)
        sizes = zip(self._pick(three), sampler.row_dims, strict=True)
        elements = sum(part.numel() // (1 if dim is None else 3) for part, dim in sizes)
        order = [s for s in STRATEGIES if s != "repeated" or inputs.rows is not None]
        if not report.replayable:
            order = ["loop"]
        elif any(isinstance(module, CompactSequential) for module in activation.model.modules()):
            order.sort(key=["loop", "vectorized", "repeated"].index)  # one sample at a time can cut out its units
        elif share < _FEW:
            order.sort(key=["repeated", "vectorized", "loop"].index)
        for strategy in order if self._strategy == "auto" else [self._strategy]:
            reason = sampler.works(strategy)
            if not reason:
                self._strategy = strategy
                break
            if self._strategy != "auto":
                raise RuntimeError(f"strategy={strategy!r} does not work here: {reason}. Use strategy='auto'")
            report.notes.append(f"Not {strategy}: {reason}")
        report.strategy = self._strategy
        return row_bytes, elements

    def _compare(self, inputs: Inputs, samples: Sequence[int], outputs: Outputs) -> None:
        """Checks, once, if a row's outputs are the same in any batch."""
        if self._compared or samples[0] != 0 or (inputs.rows or 0) < 2:
            return
        self._compared = True
        self._rows_alone = self._sampler.rows_stand_alone(outputs)
        if not self._rows_alone:
            note = (
                "A row's outputs depend on the other rows of its batch. If that is not meant: is batch_dim="
                f"{inputs.dim} the dimension that counts rows?"
            )
            self._activation.report.notes.append(note)
            warnings.warn(f"mc_predict: {note}", UserWarning, stacklevel=4)

    def _collector(self, task: Task, groups: int, valid: Tensor | None) -> Collector:
        return Collector(
            task,
            groups,
            group_of=self._effort.group_of(groups),
            rounds=self._effort.rounds,
            keep_samples=self._keep,
            errors=self._memory.errors,
            valid=valid,
        )

    def _rows_first(self, outputs: Outputs) -> Any:
        """Returns the outputs with samples and then rows in front."""
        dims = self._sampler.row_dims
        moved = tuple(out if dim is None else out.movedim(dim + 1, 1) for out, dim in zip(outputs, dims, strict=True))
        return moved[0] if len(moved) == 1 else moved

    def _merged(self, collector: Collector, task: Task, device: torch.device) -> Collector:
        """Returns a collector of the samples of all processes."""
        if self._effort.processes == 1:
            return collector
        states: list[Any] = [None] * self._effort.processes
        torch.distributed.all_gather_object(states, collector.state(), group=self._effort.group)
        total = self._collector(task, collector.groups, collector.valid)
        total.load(states, device)
        return total

    def _close_enough(self, total: Collector) -> bool:
        tolerance, effort = self._effort.tolerance, self._effort
        if tolerance is None or total.count < (4 * ROUND if effort.rounds else ROUND):
            return False
        return bool(_mean_error(total).max() <= tolerance)

    def _weight_scaling(self, inputs: Inputs) -> Any:
        out = tuple(part.unsqueeze(0) for part in self._sampler.deterministic(inputs))
        moved = self._rows_first(out)
        return moved[0] if isinstance(moved, Tensor) else tuple(part[0] for part in moved)


def _mean_error(collector: Collector) -> Tensor:
    return collector.standard_error(collector.task.statistics()["mean"])


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


def _shown(batch: Iterable[Inputs], progress: bool) -> Iterable[Inputs]:
    return optional("tqdm.auto").tqdm(batch, unit="batch") if progress else batch

"""`mc_predict`: samples of a model's outputs, run in the fastest way that works, and statistics of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import optional
from ..core.checks import check_integer
from ..handlers.masks import Hypercube
from ..handlers.prefix import Prefix
from ..layers.compact.sequential import CompactSequential
from .activate import ADVICE, Activation, check_masks, check_model, check_seed, check_sources, new_seed
from .batches import read_batches
from .heads import Heads, Predictions, read_tasks
from .inputs import Inputs
from .joining import check_mode, check_shapes
from .outputs import Picker
from .plan import ROUND, SamplePlan
from .prediction import Prediction
from .sample import STRATEGIES, Outputs, Sampler
from .statistics import Collector, Mean, Task

GROUPS = 10
"""The number of groups of samples. Standard errors come from the spread between groups."""

_FEW = 0.2
"""The least share of the calls before the first random one that is worth running once."""


def mc_predict(
    model: nn.Module,
    inputs: Any,
    samples: int = 100,
    *,
    task: str | Mapping[str, str | None] | None = None,
    scores: str = "auto",
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
        inputs: a tensor, a tuple (positional arguments), a mapping (named arguments, or the one argument of a model
            that takes none of these names), or an iterable of batches such as a DataLoader. A batch that is a pair is
            taken as (inputs, targets), and the targets are left out; the inputs may be several, as in ((x1, x2), y).
            In the place of a tensor may be a numpy array, or a frame or series of pandas: floating-point values get
            the dtype and device of the model's first floating-point parameter, and integers stay integers. Tensors may
            be sparse or jagged, and lie in dataclasses, namedtuples, packed sequences or graphs of torch_geometric;
            the latter two are one whole, whatever `batch_dim` is.
        samples: T, or the largest T if there is a tolerance.
        task: "classification" (outputs of shape (rows, classes, ...)), "regression", or None for plain moments. A
            mapping of names to these, for several outputs: each is taken by its name from what the model returns.
        scores: the kind of outputs in classification: "logits", "probabilities" or "auto".
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
        memory: a bound, in bytes, for the tensors that the samples of a chunk have at once, estimated from two rows.
            Default: 32 MiB on the CPU, 1 GiB elsewhere. At least one sample is run.
        batch_dim: the dimension of the inputs that counts rows; None if they are one whole, as a graph is.
        method: the name of the model's method that is called, such as "encode"; the model itself if None.
        select: takes the inputs from a batch, such as ``tuple`` where a pair has two arguments.
        select_output: takes the tensor from the model's output, or several as a mapping of names to tensors. By default
            a tensor is taken as it is, and from a mapping `logits` or `last_hidden_state`.
        batches: "joined": the rows of all batches make up the result, one after another. "padded": outputs may differ
            in size between batches, as where each batch is padded to its longest row. The smaller are filled with NaN,
            and the result's `mask` says where. Either way `Prediction.batches` returns the result by batch.
        keep_samples: whether all samples are kept, for quantiles and the like.
        weight_scaling: whether the deterministic pass of eval mode is made as well, to compare with.
        progress: whether to show a progress bar (tqdm).
        group: a torch.distributed process group over whose processes the samples are split. All of them get the result.

    Returns:
        A `Prediction`, `ClassificationPrediction` or `RegressionPrediction`, or `Predictions` of several outputs by
        name. They have rows first, with `mean` and the standard
        error of all it reports. Under "latin" without a tolerance these are upper bounds: a hypercube's variance is at
        most T / (T - 1) times that of independent samples (Owen, 1997).

    Raises:
        ValueError: an argument out of range, no random source, a NaN in a sample, outputs that change their shape or
            do not fit the task, inputs on another device than the model.
        TypeError: a model, input or output of a kind that is not served.
        RuntimeError: a forced strategy that does not work.

    Warns:
        UserWarning: identical samples; a tolerance that was not met; something that is random in train mode and could
            not be turned on; targets that the model could take as an argument.

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
    model = check_model(model)
    method = _method(model, method)
    effort = SamplePlan(_positive("samples", samples), _tolerance(tolerance), _sampling(sampling) == "latin", group)
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy must be 'auto', {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    kinds, padded = read_tasks(task, scores=scores, tau=tau, noise=noise), check_mode(batches)
    shared, patterns = check_masks(masks), check_sources(model, sources)
    chosen_seed = _agreed_seed(new_seed() if seed is None else check_seed(seed), group)
    pick = Picker(select_output, noise == "log_variance", task if isinstance(task, Mapping) else None)
    activation = Activation(model, patterns, batch_dim, method)
    sampler = Sampler(activation, pick, chosen_seed, shared, effort.hypercube)
    job = _Job(
        activation,
        sampler,
        pick,
        kinds,
        effort,
        strategy,
        None if chunk is None else _positive("chunk", chunk),
        memory,
        keep_samples,
    )
    results: list[dict[str, Prediction]] = []
    with torch.no_grad(), activation.kept_states():
        for batch in _shown(read_batches(inputs, select, batch_dim, model, method), progress):
            results.append(job.run(batch, weight_scaling))
            for name, prediction in results[-1].items():
                check_shapes(results[0][name].mean.shape, prediction.mean.shape, len(results), padded)
    activation.list_sources()
    activation.warn_of_omissions("mc_predict", 2)
    if not results:
        raise ValueError("inputs must hold at least one batch, got none")
    if effort.samples > 1 and job.identical:
        warnings.warn(f"mc_predict: all samples are identical. {ADVICE}", UserWarning, stacklevel=2)
    if job.reached is not None:
        warnings.warn(
            f"mc_predict: tolerance={tolerance} was not met after {samples} samples: the largest standard error of the "
            f"mean is {job.reached:.3g}. Raise samples or tolerance",
            UserWarning,
            stacklevel=2,
        )
    joined = {name: _joined([result[name] for result in results], padded) for name in results[0]}
    return Predictions(joined) if any(joined) else joined[""]  # type: ignore[return-value]  # see Returns


class _Job:
    """The batches of one prediction, one after another. The strategy is decided on the first."""

    def __init__(
        self,
        activation: Activation,
        sampler: Sampler,
        pick: Picker,
        tasks: Task | dict[str, Task],
        effort: SamplePlan,
        strategy: str,
        chunk: int | None,
        memory: int | None,
        keep_samples: bool,
    ) -> None:
        self._activation, self._sampler, self._pick, self._effort = activation, sampler, pick, effort
        self._tasks = tasks
        self._strategy, self._chunk, self._memory, self._keep = strategy, chunk, memory, keep_samples
        self._row_bytes: int | None = None
        self._compared = False
        self._next_row = 0
        self.identical = True
        self.reached: float | None = None

    def run(self, inputs: Inputs, weight_scaling: bool) -> dict[str, Prediction]:
        """Returns the predictions for one batch, by the outputs' names."""
        if self._row_bytes is None:
            self._row_bytes = self._prepare(inputs)
        self._pick.row_dims = self._sampler.row_dims if inputs.rows == 1 else None
        server, effort = self._activation.server, self._effort
        server.prefix = None if self._strategy == "repeated" or self._sampler.writes else Prefix()
        size = self._chunk or self._fitting(inputs)
        self._activation.report.chunk = size
        groups = max(GROUPS, effort.processes)
        collector = total = self._heads(groups)
        done = False
        for step in effort.steps():
            for samples in effort.chunks(effort.mine(step, groups), size):
                outputs = self._sampler.run(self._strategy, inputs, samples, self._next_row)
                self._compare(inputs, samples, outputs)
                collector.add(self._rows_first(outputs), samples)
            total = self._merged(collector, groups, inputs.device)
            done = self._close_enough(total)
            if done:
                break
        server.prefix = None
        if effort.tolerance is not None and not done:
            self.reached = max(self.reached or 0.0, _largest_error(total))
        self._tasks, self.identical = total.tasks, self.identical and total.identical
        self._next_row += inputs.rows or 0
        return total.predictions(
            self._weight_scaling(inputs) if weight_scaling else None,
            seed=self._sampler.seed,
            strategy=self._strategy,
            report=self._activation.report,
        )

    def _prepare(self, inputs: Inputs) -> int:
        """Surveys the model, decides on the strategy, and returns the bytes that one row of one sample needs."""
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
        return row_bytes

    def _compare(self, inputs: Inputs, samples: Sequence[int], outputs: Outputs) -> None:
        """Checks, once, if a row's outputs are the same in any batch."""
        if self._compared or samples[0] != 0 or (inputs.rows or 0) < 2:
            return
        self._compared = True
        if not self._sampler.rows_stand_alone(outputs):
            note = (
                "A row's outputs depend on the other rows of its batch. If that is not meant: is batch_dim="
                f"{inputs.dim} the dimension that counts rows?"
            )
            self._activation.report.notes.append(note)
            warnings.warn(f"mc_predict: {note}", UserWarning, stacklevel=4)

    def _fitting(self, inputs: Inputs) -> int:
        memory = self._memory or (2**25 if inputs.device.type == "cpu" else 2**30)
        if self._strategy == "loop":
            return 1
        held = (self._row_bytes or 1) * (inputs.rows or 1)
        cube = self._effort.hypercube
        if cube is not None:
            held += 8 * Hypercube(cube).family
        return max(1, min(memory // held, self._effort.samples))

    def _heads(self, groups: int) -> Heads:
        names, tasks = self._pick.names, self._tasks
        by_name = tasks if isinstance(tasks, dict) else dict.fromkeys(names, tasks)
        return Heads({name: self._collector(by_name[name], groups) for name in names}, self._pick.sizes)

    def _collector(self, task: Task, groups: int) -> Collector:
        return Collector(
            task,
            groups,
            group_of=self._effort.group_of(groups),
            rounds=self._effort.rounds,
            keep_samples=self._keep,
        )

    def _rows_first(self, outputs: Outputs) -> Outputs:
        """Returns the outputs with samples and then rows in front."""
        dims = self._sampler.row_dims
        return tuple(out if dim is None else out.movedim(dim + 1, 1) for out, dim in zip(outputs, dims, strict=True))

    def _merged(self, collector: Heads, groups: int, device: torch.device) -> Heads:
        """Returns the statistics of the samples of all processes."""
        if self._effort.processes == 1:
            return collector
        states: list[Any] = [None] * self._effort.processes
        torch.distributed.all_gather_object(states, collector.state(), group=self._effort.group)
        total = self._heads(groups)
        total.load(states, device)
        return total

    def _close_enough(self, total: Heads) -> bool:
        tolerance, effort = self._effort.tolerance, self._effort
        if tolerance is None or total.count < (4 * ROUND if effort.rounds else ROUND):
            return False
        return _largest_error(total) <= tolerance

    def _weight_scaling(self, inputs: Inputs) -> Outputs:
        out = tuple(part.unsqueeze(0) for part in self._sampler.deterministic(inputs))
        return tuple(part[0] for part in self._rows_first(out))


def _joined(predictions: Sequence[Prediction], padded: bool) -> Prediction:
    one = len(predictions) == 1 and not padded
    return predictions[0] if one else type(predictions[0]).concatenated(predictions, padded=padded)


def _largest_error(heads: Heads) -> float:
    """Returns the largest standard error of the mean of any output."""
    return max(float(_mean_error(one).max()) for one in heads.collectors.values())


def _mean_error(collector: Collector) -> Tensor:
    mean = collector.task.statistics()["mean"]
    assert isinstance(mean, Mean)
    return collector.standard_error(mean)


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


def _agreed_seed(seed: int, group: Any) -> int:
    """Returns the seed of the group's first process."""
    if group is None:
        return seed
    seeds = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(seeds, seed, group=group)
    return int(seeds[0])  # type: ignore[call-overload]


def _shown(batch: Iterable[Inputs], progress: bool) -> Iterable[Inputs]:
    return optional("tqdm.auto").tqdm(batch, unit="batch") if progress else batch

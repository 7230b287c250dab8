"""Passes of a model as one function of tensors, for torch.export: the data, the keys of the masks, and a sample.

The passes are those of `mc_predict`, whose modes and shells serve the random calls. Only the masks are made in another
way (see `TracedPass`), and all samples and their statistics are one computation.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_state import as_eager
from ..handlers.masks import Pass
from ..handlers.traced import MaskNames, TracedPass
from .activate import Activation
from .blocks import Outputs as TaskOutputs
from .blocks import joined
from .inputs import Inputs
from .moments import Counts, Moments
from .outputs import Picker
from .plain import Task
from .sample import Outputs

KEYS, SAMPLE = "mask_keys", "sample"
"""The names of the arguments beside the model's own."""


class TracedPasses:
    """Passes of an activated model under keys that are a tensor.

    Args:
        activation: the activation of the model, surveyed.
        pick: takes the outputs of interest.
        strategy: how several samples are run: see `sample`.
        shared: whether all rows share a mask.
        row_dims: the dimension of rows in each tensor of the outputs.

    Attributes:
        names: the names of the masks, known after a pass.
    """

    def __init__(
        self, activation: Activation, pick: Picker, strategy: str, shared: bool, row_dims: Sequence[int | None]
    ) -> None:
        self._activation, self._pick, self.strategy = activation, pick, strategy
        self._shared, self._row_dims = shared, row_dims
        self.names = MaskNames()

    def _run(self, inputs: Inputs, run: Pass) -> Outputs:
        activation = self._activation
        with as_eager(), activation.serving():
            activation.server.begin(run)
            return self._pick(activation.call(inputs))

    def one(self, inputs: Inputs, keys: Tensor | int, sample: Tensor, every: Tensor | None = None) -> Outputs:
        """Returns the outputs of one sample. For the arguments see `TracedPass`."""
        return self._run(inputs, TracedPass(self.names, keys, sample, inputs.rows, shared=self._shared, every=every))

    def several(self, inputs: Inputs, keys: Tensor | int, count: int) -> Outputs:
        """Returns the outputs of the first samples, stacked in front, and then the rows."""
        numbers = torch.arange(count, device=inputs.device)
        if self.strategy == "vectorized":
            one = partial(self.one, inputs, keys, every=numbers)
            outputs = torch.func.vmap(one, randomness="different")(numbers)
        elif self.strategy == "repeated":
            run = TracedPass(self.names, keys, numbers, inputs.rows, shared=self._shared, folded=True)
            outputs = tuple(
                out.unflatten(dim or 0, (count, -1)).movedim(dim or 0, 0)
                for out, dim in zip(self._run(inputs.folded(count), run), self._row_dims, strict=True)
            )
        else:
            each = [self.one(inputs, keys, number) for number in numbers.unbind()]
            outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        return tuple(
            out if dim is None else out.movedim(dim + 1, 1) for out, dim in zip(outputs, self._row_dims, strict=True)
        )

    def by_name(self, outputs: Outputs) -> dict[str, TaskOutputs]:
        """Returns the tensors of each output by its name: one, or a pair."""
        rest = iter(outputs)
        pick = self._pick
        return {
            name: joined([next(rest) for _ in range(size)]) for name, size in zip(pick.names, pick.sizes, strict=True)
        }


class TracedModel(nn.Module):
    """A model whose arguments are its own, the keys of its masks, and the number of the sample.

    It returns the outputs of this sample, or the statistics of several: those of a single output without a name, or a
    mapping with all outputs by name.

    Args:
        model: the model, which holds the parameters.
        passes: its passes.
        dim: the dimension of the inputs that counts rows of data.
        positional: the names of the model's positional arguments.
        named: the names of its keyword arguments.
        samples: the number of samples; None for one whose number is an argument.
        tasks: the tasks of the outputs, by name, if there are several samples.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: TracedPasses,
        dim: int | None,
        positional: Sequence[str],
        named: Sequence[str],
        samples: int | None,
        tasks: Mapping[str, Task],
    ) -> None:
        super().__init__()
        self.model = model
        self.training = False  # its own flag only: the model keeps its flags
        self.passes, self._dim, self._samples, self._tasks = passes, dim, samples, dict(tasks)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(args, kwargs)

        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        own = [KEYS] if samples else [KEYS, SAMPLE]
        parameters = [inspect.Parameter(name, kinds[0]) for name in positional]
        parameters += [inspect.Parameter(name, kinds[1]) for name in (*named, *own)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # the program's names
        self.forward = forward

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        rest = dict(kwargs)
        keys, sample = rest.pop(KEYS), rest.pop(SAMPLE, None)
        inputs, passes = Inputs(args, rest, self._dim), self.passes
        if self._samples is None:
            found: dict[str, Any] = dict(passes.by_name(passes.one(inputs, keys, sample)))
        else:
            outputs = passes.by_name(passes.several(inputs, keys, self._samples))
            found = {name: summary(task, outputs[name]) for name, task in self._tasks.items()}
        return found.get("", found)


def summary(task: Task, outputs: TaskOutputs) -> dict[str, Tensor]:
    """Returns the statistics of a task over outputs (T, B, ...), as `mc_predict` does: in float64, and then in the
    outputs' dtype, or in float32 for half types.

    Example:
        >>> from torchdrop.monte_carlo.plain import Plain
        >>> summary(Plain(), torch.tensor([[[1.0]], [[3.0]]]))["variance"]
        tensor([[2.]])
    """
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    moments: dict[str, Moments | Counts] = {}
    for name, values in task.observe(task.arranged(outputs)).items():
        moments[name] = Counts() if values.dtype == torch.bool else Moments()
        moments[name].add(values)
    dtype = torch.promote_types(first.dtype, torch.float32)
    return {
        name: task.restored(statistic(moments), first.dim() - 1).to(dtype)
        for name, statistic in task.statistics().items()
    }

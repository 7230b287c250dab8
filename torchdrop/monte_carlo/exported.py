"""`export`: Monte Carlo passes as a program of torch.export, with the masks of `mc_predict`, for other runtimes."""

from __future__ import annotations

import inspect
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import optional
from ..core.checks import check_integer
from ..core.torch_state import VERSION, tree_flatten, tree_map
from ..handlers.traced import MaskNames
from .activate import Activation, check_masks, check_model, check_seed, check_sources, new_seed
from .batches import Reader
from .classes import class_numbers
from .heads import read_tasks
from .inputs import Inputs
from .job import Job
from .memory import MemoryPlan
from .outputs import Picker
from .plain import Task
from .plan import SamplePlan
from .report import Report
from .sample import STRATEGIES, Sampler, agree
from .strategy import Choice
from .traced import KEYS, SAMPLE, TracedModel, TracedPasses

_ROWS = 5
"""The number of rows in the example that is traced: neither 0 nor 1, which torch.export takes for fixed."""

_OLDEST = (2, 9)
"""The oldest version of PyTorch whose torch.export was seen to take these passes."""


@dataclass(frozen=True, eq=False)
class MCExport:
    """A program of Monte Carlo passes, and what its callers need to know.

    Args:
        program: the program. Its arguments are the model's own, by the same names and places, and then by name
            `mask_keys`, the keys of the masks, and `sample`, the number of the sample, unless all samples are computed.
        masks: the names of the masks, in the order of the keys.
        seed: the seed that was given, or drawn.
        samples: the number of samples, T; None for a program of one.
        outputs: the names of the tensors that the program returns, in their order.
        report: the sources of randomness in the model.
    """

    program: torch.export.ExportedProgram
    masks: MaskNames
    seed: int
    samples: int | None
    outputs: tuple[str, ...]
    report: Report

    def keys(self, seed: int | None = None) -> Tensor:
        """Returns the keys of all masks under a seed, int64 of shape (masks, 2): by default, that of the export.

        The key of a mask has the lower and the upper 32 bits of the first 8 bytes, in little-endian order, of
        ``hashlib.blake2b(f"{seed}/{module}/{kind}/{number}".encode(), digest_size=8)``.
        """
        return self.masks.keys(self.seed if seed is None else check_seed(seed))

    def described(self) -> dict[str, Any]:
        """Returns what `save` and `onnx` write beside the program: seed, keys, names of masks and outputs, samples."""
        return {
            "seed": self.seed,
            "keys": self.keys().tolist(),
            "masks": [list(name) for name in self.masks],
            "samples": self.samples,
            "outputs": list(self.outputs),
        }

    def save(self, path: str | Path) -> None:
        """Saves the program for `torch.export.load`, which needs no torchdrop, with `described` as its extra file
        "torchdrop.json"."""
        torch.export.save(self.program, path, extra_files={"torchdrop.json": json.dumps(self.described())})

    def onnx(self, path: str | Path | None = None, opset: int = 18) -> Any:
        """Returns the program as a `torch.onnx.ONNXProgram`, and saves it if a path is given.

        It is ``torch.onnx.export(program, dynamo=True)``, with the names of `outputs`, and with `described` as the
        entry "torchdrop" of the model's metadata.

        Raises:
            ValueError: an opset before 18, the first one that has the operators of the masks.
            ImportError: onnx or onnxscript is missing.
        """
        if check_integer("opset", opset) < 18:
            raise ValueError(f"opset must be at least 18, which has bitwise operators on integers, got {opset}")
        for package in ("onnx", "onnxscript"):
            optional(package, "onnx")
        buffer = io.BytesIO()  # a copy: the exporter leaves open sizes in a program, with which AOTInductor fails then
        torch.export.save(self.program, buffer)
        buffer.seek(0)
        program = torch.export.load(buffer)
        converted = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
        assert converted is not None
        _name_outputs(converted.model.graph, self.outputs)
        converted.model.metadata_props["torchdrop"] = json.dumps(self.described())
        if path is not None:
            converted.save(path)
        return converted


def _name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Gives names to the outputs of an ONNX graph. (The exporter's own `output_names` may be those of other values.)"""
    for node in graph:
        for value in node.outputs:
            if value.name in names:
                value.name = f"{value.name}_of_{node.name}"
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def export(
    model: nn.Module,
    example: Any,
    samples: int | None = None,
    *,
    task: str | Mapping[str, str | None] | None = None,
    scores: str = "auto",
    class_dim: int | str = "auto",
    tau: float | None = None,
    noise: str | None = None,
    seed: int | None = None,
    masks: str = "independent",
    sources: str | Sequence[str] | None = None,
    batch_dim: int | None = 0,
    method: str | None = None,
    select: Callable[[Any], Any] | None = None,
    select_output: Callable[[Any], Any] | None = None,
) -> MCExport:
    """Exports Monte Carlo passes of a model as a program of PyTorch's own operators, with the masks of `mc_predict`.

    The program is for `torch.onnx.export`, `torch._inductor.aoti_compile_and_package` and `torch.export.load`, and
    needs no torchdrop. Called with the keys of a seed, it returns what `mc_predict` with this seed returns, for any
    number of rows. The masks are equal bit for bit, everything else up to rounding.

    Args:
        model: the model, in train or eval mode. It is never changed. The program has its present weights.
        example: inputs of the model, as `mc_predict` takes them. If they are batches, the first one is taken.
        samples: T, for a program that computes all samples and their statistics at a time; None for one that computes
            one sample, whose number is an argument.
        seed: the seed of `MCExport.keys`; drawn from PyTorch's default generator if None.
        task, scores, class_dim, tau, noise, masks, sources, batch_dim, method, select, select_output: as in
            `mc_predict`. With ``batch_dim=None`` the shapes are those of the example.

    Returns:
        The program, and how to call it.

    Raises:
        TypeError, ValueError: as `mc_predict`; a model in which something random is not replayable, or whose passes
            cannot be repeated; arguments of the model that have the names of the program's own.
        RuntimeError: a model that torch.export does not take, a program that returns something else than the model, or
            a version of PyTorch that is too old.

    Warns:
        UserWarning: as `mc_predict`, if something that is random in train mode stays off.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.monte_carlo import export
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3))
        >>> x = torch.randn(5, 4)
        >>> exported = export(model, x, seed=0)
        >>> list(exported.masks), exported.keys().shape
        ([('1', 'dropout', 0)], torch.Size([1, 2]))
        >>> first = exported.program.module()(x, mask_keys=exported.keys(), sample=torch.tensor(0))
        >>> first.shape
        torch.Size([5, 3])
    """
    if VERSION < _OLDEST:
        raise RuntimeError(f"export needs PyTorch {'.'.join(map(str, _OLDEST))} or newer, this is {torch.__version__}")
    model = check_model(model)
    if samples is not None:
        check_integer("samples", samples, least=1)
    shared, patterns = check_masks(masks), check_sources(model, sources)
    seed = new_seed() if seed is None else check_seed(seed)
    numbers = class_numbers(model)
    tasks = read_tasks(task, scores=scores, class_dim=class_dim, class_numbers=numbers, tau=tau, noise=noise)
    name = method or "__call__"
    activation = Activation(model, patterns, batch_dim, name)
    with torch.no_grad(), activation.kept_states() as states:
        states.keep()
        inputs = next(Reader(model, name, select, batch_dim).batches(example))
        positional = _names(model, name, inputs)
        pick = Picker(select_output, noise == "log_variance", task)
        sampler = Sampler(activation, pick, seed, shared, None)
        settled = _surveyed(activation, sampler, pick, tasks, inputs, samples)
        few = inputs.first(_ROWS) if inputs.rows else inputs
        program, failed = None, list[Exception]()
        for passes in _passes(activation, sampler, pick, shared, few):
            traced = TracedModel(model, passes, batch_dim, positional, list(few.kwargs), samples, settled)
            try:
                program = _exported(traced, few)
            except RuntimeError as error:
                failed.append(error)
                if samples is None:  # all ways are the same for one sample
                    break
                continue
            _compare(program, traced, few)
            break
        if program is None:
            raise failed[-1]
    for what in activation.omissions():
        warnings.warn(f"export: {what}", UserWarning, stacklevel=2)
    return MCExport(program, passes.names, seed, samples, _output_names(program, samples), activation.report)


def _names(model: nn.Module, method: str, inputs: Inputs) -> list[str]:
    """Returns names for the positional arguments: those of the method's parameters."""
    parameters = inspect.signature(getattr(model, "forward" if method == "__call__" else method)).parameters.values()
    names = []
    for place in range(len(inputs.args)):
        one = list(parameters)[min(place, len(parameters) - 1)]
        several = one.kind is inspect.Parameter.VAR_POSITIONAL
        names.append(f"{one.name}_{place}" if several else one.name)
    for name in (*names, *inputs.kwargs):
        if name in (KEYS, SAMPLE):
            raise ValueError(f"the program has an argument {name!r} of its own: give that of the model another name")
    return names


def _surveyed(
    activation: Activation,
    sampler: Sampler,
    pick: Picker,
    tasks: Task | dict[str, Task],
    inputs: Inputs,
    samples: int | None,
) -> dict[str, Task]:
    """Surveys the model, and returns the tasks with all that the example decides.

    Raises:
        ValueError: nothing is random in the model, or something that is not replayable.
    """
    choice = Choice(activation, sampler, "auto", samples or 1)
    settled: dict[str, Task] = {}
    if samples is None:
        choice.survey(inputs)
    else:
        plan = SamplePlan(samples, None, False, None)
        memory = MemoryPlan(None, plan, False)
        job = Job(activation, sampler, pick, tasks, plan, choice, None, memory, False, None)
        job.run(inputs, False)
        settled = job.tasks
        for doubt in job.remarks():
            warnings.warn(f"export: {doubt}", UserWarning, stacklevel=3)
    loose = [source for source in activation.report.active if not source.replayable]
    if loose:
        listed = "; ".join(f"{one.module or '(model)'}: {one.kind}, {one.reason}" for one in loose)
        raise ValueError(
            f"the model has random calls that are not replayable, so that no program can have their masks ({listed}). "
            "Leave them out by sources=, or draw with torch.rand, torch.bernoulli or dropout, one number for each row"
        )
    if activation.differentiates:
        raise ValueError("the model differentiates in its forward, which torch.export does not take")
    pick.row_dims = None
    return settled


def _passes(
    activation: Activation, sampler: Sampler, pick: Picker, shared: bool, inputs: Inputs
) -> Iterator[TracedPasses]:
    """Yields passes that run several samples in ways that give the outputs of one after another.

    Raises:
        ValueError: no way does.
    """
    activation.server.prefix = None  # the results that it keeps are those of other inputs
    found, dims = sampler.run("loop", inputs, (0, 1)), sampler.row_dims
    reference = tuple(out if dim is None else out.movedim(dim + 1, 1) for out, dim in zip(found, dims, strict=True))
    for strategy in STRATEGIES:
        if strategy == "repeated" and (inputs.rows is None or None in dims):
            continue
        passes = TracedPasses(activation, pick, strategy, shared, dims)
        try:
            outputs = passes.several(inputs, sampler.seed, 2)
        except Exception:
            if strategy == STRATEGIES[-1]:
                raise
            continue
        if all(agree(a, b, b) for a, b in zip(outputs, reference, strict=True)):
            yield passes
        elif strategy == STRATEGIES[-1]:
            raise ValueError(
                "two passes of the model with the same masks differ, so no program can repeat them: are there random "
                "numbers of numpy or Python in the model's forward, or a state outside of its modules?"
            )


def _exported(traced: TracedModel, inputs: Inputs) -> torch.export.ExportedProgram:
    """Returns the program, with operators of ATen only.

    Raises:
        RuntimeError: torch.export does not take the model.
    """
    rows = torch.export.Dim("rows", min=1)

    def dynamic(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.dim() > 0 and inputs.dim is not None
        return {inputs.dim % leaf.dim(): rows} if has_rows and inputs.dim is not None else None

    arguments = _arguments(traced, inputs, 0)
    names = inspect.signature(traced.forward).parameters
    given = dict(zip(names, inputs.args, strict=False)) | inputs.kwargs
    shapes = {name: tree_map(dynamic, value) for name, value in given.items()}
    shapes |= dict.fromkeys(arguments.keys() - inputs.kwargs.keys())
    try:
        program = torch.export.export(traced, inputs.args, arguments, dynamic_shapes=shapes, strict=False)
        for node in list(program.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:  # it fails under vmap
                program.graph.erase_node(node)
        program = program.run_decompositions({})
    except Exception as error:
        reason = str(error).strip().split("\n\n")[0][:800]
        raise RuntimeError(
            f"torch.export does not take this model ({type(error).__name__}: {reason}). It needs a forward in which no "
            "decision depends on the values of tensors, such as a LayerDrop's on its draws, or on the number of rows. "
            "Change the forward, leave a source out by sources=, or give batch_dim=None for shapes that are fixed"
        ) from error
    foreign = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("torchdrop")}
    if foreign:
        raise RuntimeError(f"the program has operators of torchdrop in it: {', '.join(sorted(foreign))}")
    return program


def _arguments(traced: TracedModel, inputs: Inputs, sample: int) -> dict[str, Any]:
    """Returns the named arguments, with other keys for each sample."""
    named = inputs.kwargs | {KEYS: traced.passes.names.keys(sample).to(inputs.device)}
    if SAMPLE in inspect.signature(traced.forward).parameters:
        named[SAMPLE] = torch.tensor(sample, device=inputs.device)
    return named


def _compare(program: torch.export.ExportedProgram, traced: TracedModel, inputs: Inputs) -> None:
    """Raises RuntimeError unless a program returns what the passes do, under other keys than those of the trace."""
    named = _arguments(traced, inputs, 3)
    expected = tree_flatten(traced(*inputs.args, **named))[0]
    found = tree_flatten(program.module()(*inputs.args, **named))[0]
    for here, there in zip(found, expected, strict=True):
        if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise RuntimeError(
                "the program returns something else than the model: does its forward use numbers that torch.export "
                "cannot see, such as those of numpy, or change from call to call?"
            )


def _output_names(program: torch.export.ExportedProgram, samples: int | None) -> tuple[str, ...]:
    paths, _ = torch.utils._pytree.tree_flatten_with_path(
        torch.utils._pytree.tree_unflatten([0] * len(program.graph_signature.user_outputs), program.call_spec.out_spec)
    )
    names = (".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths)
    return tuple(name or "output" for name in names)

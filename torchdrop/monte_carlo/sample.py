"""Running samples: one after another, as more rows of one batch, or under vmap. The masks are the same in all three.

- "vectorized": `torch.func.vmap` over the samples' numbers. Tensors are the same for all samples up to the first random
  call, so the calls before it run once.
- "repeated": the rows of the data once for each sample, in one batch. It is for models that vmap does not take, for
  example nn.LSTM.
- "loop": one sample at a time. It is for models whose Python code depends on the draws, as LayerDrop's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..handlers.masks import Hypercube, Pass, find_layout
from ..handlers.prefix import Prefix
from .activate import Activation
from .inputs import Inputs
from .live_bytes import LiveBytes

Outputs = tuple[Tensor, ...]


class Chunk(NamedTuple):
    """Samples that are run together.

    Args:
        samples: their numbers.
        numbers: the same as a tensor.
        offsets: their strata in a Latin hypercube, if it is one.
    """

    samples: Sequence[int]
    numbers: Tensor
    offsets: Tensor | None


STRATEGIES = ("vectorized", "repeated", "loop")


class Sampler:
    """Runs samples of an activated model.

    Args:
        activation: the activation of the model, surveyed.
        pick: takes the tensor, or tuple of tensors, of interest from the model's output.
        seed: the seed of all masks.
        shared: whether all rows share a mask.
        hypercube: the number of samples in a Latin hypercube; None for independent samples.

    Attributes:
        writes: whether the model writes to its inputs, so that each pass needs its own copy of them.
        most_bytes, least_bytes: more and fewer bytes than a forward's tensors hold for a row after its first draw;
            known after `measure`.
        row_work: the bytes of all tensors that the calls of a forward return for a row, as a measure of its work.
        row_elements: the number of elements that a row has in each output, known after `measure`.
    """

    def __init__(
        self, activation: Activation, pick: Callable[[Any], Outputs], seed: int, shared: bool, hypercube: int | None
    ) -> None:
        self.seed = seed
        self.writes: bool = False
        self._activation, self._pick, self._shared, self._hypercube = activation, pick, shared, hypercube
        self.most_bytes: int = 1
        self.least_bytes: int = 1
        self.row_work: int = 1
        self.row_elements: tuple[int, ...] = ()
        self._few = Inputs((), {}, None)
        self._borrowed = False
        self._reference: Outputs = ()
        self._row_dims: tuple[int | None, ...] = ()

    def _begin(
        self,
        samples: Tensor,
        first: int,
        inputs: Inputs,
        first_row: int | Tensor,
        *,
        folded: bool = False,
        offsets: Tensor | None = None,
    ) -> None:
        self._activation.server.begin(
            Pass(
                self.seed,
                samples,
                inputs.rows,
                first_row=first_row,
                shared=self._shared,
                folded=folded,
                hypercube=self._cube(first),
                offsets=offsets,
            )
        )

    def begin(self, number: int, inputs: Inputs) -> None:
        """Begins a pass that is one sample."""
        self._begin(torch.tensor(number, device=inputs.device), number, inputs, 0)

    def _cube(self, first: int) -> Hypercube | None:
        """Returns the hypercube that this sample belongs to."""
        return None if self._hypercube is None else Hypercube(self._hypercube, first // self._hypercube)

    def _call(self, inputs: Inputs, again: bool = False) -> Outputs:
        return self._detached(self._activation.call(self._own(inputs), again))

    def _own(self, inputs: Inputs) -> Inputs:
        """Returns the inputs of a pass, in which whatever it writes to is a copy."""
        return inputs.copy() if self.writes or self._activation.differentiates else inputs.fresh()

    def _detached(self, returned: Any) -> Outputs:
        outputs = self._pick(returned)
        return tuple(out.detach() for out in outputs) if self._activation.differentiates else outputs

    def keep_prefix(self) -> None:
        """Makes the passes that follow, which are of one batch, run the calls before the first random one once."""
        activation = self._activation
        repeats = not (self.writes or activation.differentiates or activation.stateful)
        activation.server.prefix = Prefix() if repeats else None

    def chunk(self, samples: Sequence[int], device: torch.device) -> Chunk:
        """Returns samples of one hypercube."""
        numbers, cube = torch.tensor(samples, device=device), self._cube(samples[0])
        return Chunk(samples, numbers, None if cube is None else cube.offsets(numbers % cube.size))

    def run(
        self,
        strategy: str,
        inputs: Inputs,
        samples: Sequence[int],
        first_row: int | Tensor = 0,
        chunk: Chunk | None = None,
    ) -> Outputs:
        """Returns the outputs of these samples of one hypercube, stacked in front: (samples, ...).

        Args:
            strategy: one of `STRATEGIES`.
            inputs: the batch.
            samples: the numbers of the samples.
            first_row: the number of the batch's first row.
            chunk: what `chunk` returns for them, where this is recorded, or compared with a recording. Then nothing
                is kept from earlier chunks of the batch.
        """
        run = {"loop": self._loop, "vectorized": self._vectorized, "repeated": self._repeated}[strategy]
        if strategy == "repeated" or chunk is not None:
            self._activation.server.prefix = None
        prefix = self._activation.server.prefix
        chunk = self.chunk(samples, inputs.device) if chunk is None else chunk
        with self._activation.serving():
            try:
                return run(inputs, chunk, first_row)
            except Exception:
                if prefix is None or not prefix.length:
                    raise
                prefix.drop()  # something read a tensor that was not kept, or a pass made other calls
                return run(inputs, chunk, first_row)

    def _loop(self, inputs: Inputs, chunk: Chunk, first_row: int | Tensor) -> Outputs:
        outputs: list[Outputs] = []
        for place, number in enumerate(chunk.samples):
            offsets = None if chunk.offsets is None else chunk.offsets[place]
            self._begin(chunk.numbers[place], number, inputs, first_row, offsets=offsets)
            outputs.append(self._call(inputs, again=bool(outputs)))
        _check_shapes(outputs, chunk.samples)
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))

    def _vectorized(self, inputs: Inputs, chunk: Chunk, first_row: int | Tensor) -> Outputs:
        def one(sample: Tensor, offsets: Tensor | None) -> Outputs:
            self._begin(sample, chunk.samples[0], inputs, first_row, offsets=offsets)
            return self._call(inputs)

        in_dims = (0, None if chunk.offsets is None else 0)
        return torch.func.vmap(one, in_dims=in_dims, randomness="different")(chunk.numbers, chunk.offsets)

    def _repeated(self, inputs: Inputs, chunk: Chunk, first_row: int | Tensor) -> Outputs:
        if inputs.rows is None or None in self._row_dims:
            raise ValueError("the inputs and outputs have no rows that could be repeated")
        copies = len(chunk.samples)
        self._begin(chunk.numbers, chunk.samples[0], inputs, first_row, folded=True, offsets=chunk.offsets)
        outputs = self._call(inputs.folded(copies))
        return tuple(
            out.unflatten(dim, (copies, -1)).movedim(dim, 0) for out, dim in zip(outputs, self._row_dims, strict=True)
        )

    def not_recorded(self, strategy: str) -> str:
        """Returns why calls that are recorded once, and made again, would not be samples; "" if they are."""
        activation = self._activation
        reasons = {
            "they are run one after another": strategy == "loop",
            "the masks of a Latin hypercube are made outside of PyTorch": self._hypercube is not None,
            "the model draws numbers that cannot be repeated": activation.draws_foreign,
            "the model writes to its inputs, or to buffers or tensors of its own": self.writes
            or bool(activation.stateful),
            "the model differentiates in its forward": activation.differentiates,
            "the model has hooks of the user, which would not run again": activation.shells.has_foreign_hooks,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def note(self, what: str) -> None:
        """Adds a remark to the report."""
        self._activation.report.notes.append(what)

    def deterministic(self, inputs: Inputs) -> Outputs:
        """Returns the outputs of a pass in eval mode, with nothing random."""
        return self._detached(self._activation.deterministic(self._own(inputs)))

    def measure(self, inputs: Inputs, three: Any, borrow: bool) -> float:
        """Takes two samples of two rows, one after another, as the reference for other strategies. If the data has one
        row, that has to do, unless the model takes its dimension away.

        Args:
            inputs: a batch.
            three: the output of the model for three rows, as sample 0.
            borrow: whether rows of that may be sample 0. If outputs differ from it later, for example because rows
                depend on each other, the reference is taken again.

        Returns:
            The share of a forward that comes before its first draw and can run once: of its calls, or of the bytes that
            they return if that is more.
        """
        server, first = self._activation.server, self._detached(three)
        self._borrowed = borrow and inputs.rows != 1 and not self._activation.stateful
        for rows in (1, 2) if inputs.rows == 1 else (2,):
            self._take_reference((1,) if self._borrowed else (0, 1), inputs, rows)
            if all(two.dim() == more.dim() + 1 for two, more in zip(self._reference, first, strict=True)):
                break
        few = self._few.rows or 1
        self.row_work = (server.before + server.bytes) // few
        self.most_bytes, self.least_bytes = max(server.bytes // few, 1), max(server.largest // few, 1)
        layouts = [
            None if inputs.rows is None else find_layout((two.shape[1:], more.shape), (few, 3), more.shape)
            for two, more in zip(self._reference, first, strict=True)
        ]
        self._row_dims = tuple(layout.dim if layout else None for layout in layouts)
        self.row_elements = tuple(
            more.numel() // (1 if dim is None else 3) for more, dim in zip(first, self._row_dims, strict=True)
        )
        share = 0.0
        if server.prefix is not None:
            work = server.before + server.bytes
            share = max(server.prefix.tensors / max(server.calls, 1), server.before / max(work, 1))
        if self._borrowed:
            self._borrow(first)
        return share

    def _borrow(self, first: Outputs) -> None:
        """Puts rows of a pass that was sample 0 before sample 1 of two rows."""
        parts = zip(first, self._reference, self._row_dims, strict=True)
        rows = [more if dim is None else more.narrow(dim, 0, two.shape[dim + 1]) for more, two, dim in parts]
        pairs = list(zip(rows, self._reference, strict=True))
        if all(one.shape == two.shape[1:] for one, two in pairs):
            self._reference = tuple(torch.cat([one.unsqueeze(0), two]) for one, two in pairs)
        else:  # the outputs of another number of rows differ in shape, but not by rows
            self._take_own_reference()

    def _take_own_reference(self) -> None:
        self._borrowed = False
        with self._apart():
            self._reference = self.run("loop", self._few, (0, 1))

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Restores what belongs to the passes of a batch after passes of two rows."""
        server, report = self._activation.server, self._activation.report
        prefix = server.prefix
        self.keep_prefix()
        try:
            yield
        finally:
            server.draws, server.prefix = report.draws, prefix

    def _take_reference(self, samples: Sequence[int], inputs: Inputs, rows: int) -> None:
        server = self._activation.server
        for self.writes in (False, True):
            self._few = inputs.first(rows)
            before = self._few.versions
            self.keep_prefix()
            server.counts = True
            try:
                self._reference = self.run("loop", self._few, samples)
            finally:
                server.counts = False
            if self._few.versions == before:
                break

    def measured_bytes(self) -> int:
        """Returns the most bytes that tensors of a forward hold for a row after its first draw, as a pass shows."""
        server = self._activation.server
        self.keep_prefix()
        with LiveBytes(lambda: server.draws > 0) as live:
            self.run("loop", self._few, (0,))
        return max(live.peak // (self._few.rows or 1), 1)

    @property
    def row_dims(self) -> tuple[int | None, ...]:
        """The dimension of each output that counts rows, known after `measure`."""
        return self._row_dims

    def works(self, strategy: str) -> str:
        """Says why a strategy differs from one sample after another; "" if it does not. Call `measure` before."""
        try:
            if self._borrowed:
                self._take_own_reference()
            with self._apart():
                outputs = self.run(strategy, self._few, (0, 1))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        if any(not _agree(a, b, b) for a, b in zip(outputs, self._reference, strict=True)):
            return "its outputs differ from those of one sample after another"
        return ""

    def agrees(self, outputs: Outputs, samples: Sequence[int], rows: int | None) -> bool | None:
        """Whether the first rows of samples 0 and 1 have the outputs here that `measure` has found; None if that cannot
        be told, because it is other samples or no output has rows."""
        same = self._agrees(outputs, samples, rows)
        if same is False and self._borrowed:
            self._take_own_reference()
            same = self._agrees(outputs, samples, rows)
        return same

    def are_alone(self, inputs: Inputs) -> bool:
        """Whether the outputs of the first row are the same with and without the others."""
        with self._apart():
            self._activation.server.prefix = None
            one, few = (self.run("loop", inputs.first(rows), (0,)) for rows in (1, 3))
        pairs = zip(one, few, self._row_dims, strict=True)
        return all(
            out.dim() == more.dim()
            and _agree(out, more.narrow(dim + 1, 0, out.shape[dim + 1]), more.movedim(dim + 1, 0))
            for out, more, dim in pairs
            if dim is not None
        )

    def _agrees(self, outputs: Outputs, samples: Sequence[int], rows: int | None) -> bool | None:
        if samples[0] != 0 or (rows is not None and set(self._row_dims) == {None}):
            return None
        same, count = True, 2 if len(samples) > 1 and samples[1] == 1 else 1
        for out, two, dim in zip(outputs, self._reference, self._row_dims, strict=True):
            here, there = out[:count], two[:count]
            if dim is not None:
                few = self._few.rows or 1
                size = two.shape[dim + 1] // few * min(rows or few, few)
                here, there = here.narrow(dim + 1, 0, size), there.narrow(dim + 1, 0, size)
            elif rows is not None:
                continue
            same = same and _agree(here, there, two)
        return same


def _check_shapes(outputs: Sequence[Outputs], samples: Sequence[int]) -> None:
    first = [tuple(t.shape) for t in outputs[0]]
    for number, output in zip(samples, outputs, strict=True):
        shapes = [tuple(t.shape) for t in output]
        if shapes != first:
            raise ValueError(
                f"outputs change their shape between samples: {shapes} in sample {number}, {first} in "
                f"sample {samples[0]}. Give select_output=, a function that gets a tensor of fixed shape out of what "
                "the model returns"
            )


def _agree(values: Tensor, reference: Tensor, samples: Tensor) -> bool:
    """Whether values equal the reference up to rounding, which is small compared with the spread of these samples."""
    if values.shape != reference.shape:
        return False
    epsilon = torch.finfo(reference.dtype).eps if reference.is_floating_point() else 0.0
    difference, size, spread = (
        t.double().square().mean().sqrt() for t in (values - reference, reference, samples[0] - samples[-1])
    )
    return bool(difference <= 1e-2 * spread + max(1e-5, 8 * epsilon) * size) or not bool(size.isfinite())

"""The choice of a strategy: a first chunk of samples is run in the way that should be fastest, and its first rows are
compared with samples that were run one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..handlers.substitute import UnknownSourceError
from ..layers.compact.sequential import CompactSequential
from .activate import ADVICE, Activation
from .inputs import Inputs
from .sample import STRATEGIES, Outputs, Sampler

_FEW = 0.3
"""The least share of a forward before the first draw that is worth running once, since vmap has a price of its own."""

_LIGHT = 2**24
"""The number of bytes that the calls of all samples return below which the calls themselves take more time than their
work. They take the most under vmap."""

_SMALL = 1024
"""The most rows of all samples in a chunk that is run without having tried its strategy on two rows."""


class Choice:
    """The choice of one prediction, made with its first batch.

    Args:
        activation: the activation of the model.
        sampler: the sampler of the prediction.
        wanted: the strategy that was asked for, or "auto".
        samples: the number of samples.

    Attributes:
        strategy: the strategy, once it is known; "" before.
        rows_alone: whether a row's outputs are the same in any batch; None before that is known.
        said: what the user is to be warned of.
    """

    def __init__(self, activation: Activation, sampler: Sampler, wanted: str, samples: int) -> None:
        self._activation, self._sampler, self._wanted, self._samples = activation, sampler, wanted, samples
        self._order: list[str] = []
        self.strategy: str = ""
        self.rows_alone: bool | None = None
        self.said: list[str] = []

    def survey(self, inputs: Inputs) -> None:
        """Surveys the model, takes the samples to compare with, and puts the strategies in order.

        Raises:
            ValueError: nothing is random in the model.
        """
        activation, sampler, report = self._activation, self._sampler, self._activation.report
        activation.may_differentiate, borrow = True, self._wanted == "auto"
        three = activation.survey(inputs, sample=sampler.begin)
        try:
            with activation.strict():
                share = sampler.measure(inputs, three, borrow)
        except UnknownSourceError:  # so a hook draws: it has to see the forwards of a survey, too
            three = activation.survey(inputs, hooks=True, sample=sampler.begin)
            share = sampler.measure(inputs, three, borrow)
        if not report.active:
            off = "".join(f"\n  {s.module or '(model)'}: {s.kind}, {s.reason}" for s in report.inactive)
            raise ValueError(
                f"nothing random is active in the model, so all samples would be equal. {ADVICE}{off}{report.noted()}"
            )
        self._order = [s for s in STRATEGIES if s != "repeated" or inputs.rows is not None]
        if self._wanted != "auto":
            self._order = [self._wanted]
        elif not report.replayable:
            self._order = ["loop"]
        elif any(isinstance(module, CompactSequential) for module in activation.model.modules()):
            self._order.sort(key=["loop", "vectorized", "repeated"].index)  # one sample at a time can cut out its units
        elif share < _FEW or sampler.row_work * (inputs.rows or 1) * self._samples < _LIGHT:
            self._order.sort(key=["repeated", "vectorized", "loop"].index)

    def first(
        self, inputs: Inputs, first_row: int, chunk: Callable[[str], Sequence[int]]
    ) -> tuple[Sequence[int], Outputs]:
        """Runs the first samples of a batch, and decides on the strategy.

        Args:
            inputs: the batch.
            first_row: the number of its first row.
            chunk: returns the first samples to be run under a strategy.

        Raises:
            RuntimeError: the strategy that was asked for does not work.
        """
        for strategy in self._order:
            samples = chunk(strategy)
            outputs, reason = self._tried(strategy, inputs, first_row, samples)
            if outputs is not None:
                self.strategy = self._activation.report.strategy = strategy
                return samples, outputs
            if self._wanted != "auto":
                raise RuntimeError(f"strategy={strategy!r} does not work here: {reason}. Use strategy='auto'")
            self._activation.report.notes.append(f"Not {strategy}: {reason}")
        raise AssertionError("the last strategy either works or raises the model's own error")

    def _tried(
        self, strategy: str, inputs: Inputs, first_row: int, samples: Sequence[int]
    ) -> tuple[Outputs | None, str]:
        """Returns the outputs of the samples, or None and why a strategy does not work."""
        sampler, last = self._sampler, strategy == "loop"
        tried = not last and (samples[0] != 0 or len(samples) * (inputs.rows or 1) > _SMALL)
        reason = sampler.works(strategy) if tried else ""
        if reason:
            return None, reason
        try:
            outputs = sampler.run(strategy, inputs, samples, first_row)
        except Exception as error:
            if last:
                raise
            return None, _first_line(error)
        same = sampler.agrees(outputs, samples, inputs.rows)
        if same is None:
            reason = "" if tried or last else sampler.works(strategy)
            return (None, reason) if reason else (outputs, "")
        if not same:
            reason = "" if tried else sampler.works(strategy)
            if not reason and strategy == "repeated" and self._wanted == "auto":
                reason = "a row's outputs depend on the other rows of its batch, or on its place there"
            if reason and not last:
                return None, reason
            if reason:
                self._say(
                    "two passes with the same masks differ, so the samples cannot be repeated: are there random "
                    "numbers of numpy or Python in the model's forward, or a state outside of its modules?"
                )
                return outputs, ""
        self.compared(same, inputs)
        return outputs, ""

    def look_at_rows(self, inputs: Inputs) -> None:
        """Finds out whether rows depend on each other, if all batches before this one had a single row. If they do, the
        strategy is chosen anew."""
        if self.rows_alone is None and (inputs.rows or 0) > 1:
            self.compared(self._sampler.are_alone(inputs), inputs)
            if not self.rows_alone and self.strategy == "repeated" and self._wanted == "auto":
                self.strategy = ""
                self._order.remove("repeated")

    def compared(self, alone: bool, inputs: Inputs) -> None:
        """Notes whether a row's outputs are the same in any batch."""
        if self.rows_alone is None and (inputs.rows or 0) > 1:
            self.rows_alone = alone
            if not alone:
                self._say(
                    "A row's outputs depend on the other rows of its batch. If that is not meant: is batch_dim="
                    f"{inputs.dim} the dimension that counts rows?"
                )

    def _say(self, what: str) -> None:
        self._activation.report.notes.append(what[0].upper() + what[1:])
        self.said.append(what)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"

"""The base of LSTM and GRU layers with noise: the parameters, interface and checks of torch.nn's, and the forward.

The inputs of all time steps are projected at once, masks are drawn for all steps at once, and the rest is a loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ...core.portable import refuse_script
from ...core.rate import Probability, read_rate
from ...core.symbolic import leaf
from ...random import check_generator
from ..dropout import Dropout
from .cells import Noise, State, Weights
from .through_time import run_fast

Hidden = Tensor | tuple[Tensor, Tensor] | None


@contextmanager
def named(argument: str) -> Iterator[None]:
    """Adds the name of the argument to a message about a rate."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: {error}") from None


class Unrolled(nn.RNNBase):
    """A layer with the interface of nn.LSTM or nn.GRU, run step by step with the noise that `_noise` draws.

    It is no subclass of nn.LSTM, because torch.compile refuses to enter those.
    """

    __prepare_scriptable__ = refuse_script

    layer_dropout: Dropout
    """The dropout between layers. It exists only if there are several layers and it has been given a rate."""
    _dropout: Probability

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: Any,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        check_generator(generator)
        super().__init__(
            mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype,
        )  # fmt: skip
        self._generator = generator
        if "layer_dropout" in self._modules:
            self.layer_dropout.generator = generator

    @property  # type: ignore[override]
    def dropout(self) -> Probability:
        """The rate of dropout between layers: that of `layer_dropout` if there is one."""
        return self.layer_dropout.p if "layer_dropout" in self._modules else self._dropout

    @dropout.setter
    def dropout(self, p: Probability) -> None:
        with named("dropout"):
            p = read_rate(p, None)[1]
        if "layer_dropout" in self._modules:
            self.layer_dropout.p = p
        elif self.num_layers > 1 and (isinstance(p, Tensor) or p > 0.0):
            made = Dropout(p, generator=vars(self).get("_generator"))
            self.layer_dropout, self._dropout = made.train(self.training), 0.0
        else:
            self._dropout = p

    def _noise(self, like: Tensor, batch: int, steps: int) -> Noise:
        """Draws the noise of one layer in one direction, with dimensions (batch, time, units), for `like`'s dtype."""
        raise NotImplementedError

    @leaf
    def forward(self, input: Any, hx: Hidden = None) -> tuple[Any, Any]:
        packed = input if isinstance(input, PackedSequence) else None
        if packed is None and not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor or a PackedSequence, got {type(input).__name__}")
        data: Tensor = input if packed is None else packed.data
        batched = packed is not None or data.dim() == 3
        if packed is not None:
            self.check_input(data, packed.batch_sizes)
            sizes = packed.batch_sizes.tolist()
        else:
            if data.dim() not in (2, 3):
                raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {data.dim()}D instead")
            data = data if batched else data.unsqueeze(1)
            data = data.transpose(0, 1) if batched and self.batch_first else data
            self.check_input(data, None)
            sizes = [data.shape[1]] * data.shape[0]
        if not sizes:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        state = self._initial(data, hx, sizes[0], batched)
        order = None if packed is None else packed.sorted_indices
        if order is not None and hx is not None:
            state = tuple(part.index_select(1, order) for part in state)

        finals: list[State] = []
        like = data.new_empty(0)  # not the data, to which the noise is not applied
        drop = getattr(self, "layer_dropout", None)
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            data = drop(data) if layer and drop is not None else data
            rows = data if packed is not None else data.flatten(0, 1)
            outputs = []
            for direction in range(directions):
                own = tuple(part[layer * directions + direction] for part in state)
                noise = self._noise(like, sizes[0], len(sizes))
                noise = noise if order is None else noise.rows(order)
                hidden, final = run_fast(rows, sizes, self._weights(layer, direction), own, noise, bool(direction))
                outputs.append(hidden)
                finals.append(final)
            data = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            data = data if packed is not None else data.unflatten(0, (len(sizes), sizes[0]))

        last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        if packed is not None:
            if packed.unsorted_indices is not None:
                last = tuple(part.index_select(1, packed.unsorted_indices) for part in last)
            output = PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)
            return output, last if len(last) > 1 else last[0]
        if not batched:
            data, last = data.squeeze(1), tuple(part.squeeze(1) for part in last)
        elif self.batch_first:
            data = data.transpose(0, 1)
        return data, last if len(last) > 1 else last[0]

    def _weights(self, layer: int, direction: int) -> Weights:
        """Reads the weights anew, since they may be parametrized."""
        suffix = f"_l{layer}{'_reverse' * direction}"
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        names += ["weight_hr"] if self.proj_size else []
        return Weights(**{name: getattr(self, name + suffix) for name in names})

    def _initial(self, data: Tensor, hx: Hidden, batch: int, batched: bool) -> State:
        """Returns h, and for an LSTM c, of shapes (layers * directions, B, units): those given, or zeros.

        Raises:
            TypeError: `hx` is no tensor, or no pair of them for an LSTM.
            RuntimeError: another rank or size, in torch.nn's words; another dtype, outside of autocast.
        """
        layers = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(layers, batch, self.proj_size or self.hidden_size), (layers, batch, self.hidden_size)]
        is_lstm = self.mode == "LSTM"
        if hx is None:
            return tuple(data.new_zeros(shape) for shape in shapes[: 1 + is_lstm])
        given: tuple[Any, ...] = tuple(hx) if is_lstm and isinstance(hx, (tuple, list)) else (hx,)
        if len(given) != 1 + is_lstm or not all(isinstance(part, Tensor) for part in given):
            what = "a tuple (h_0, c_0) of tensors" if is_lstm else "a tensor h_0"
            raise TypeError(f"hx must be {what}, got {type(hx).__name__}")
        dims = [part.dim() for part in given]
        if set(dims) != {3 if batched else 2}:
            kind, rank = ("batched 3-D", "3-D") if batched else ("unbatched 2-D", "2-D")
            if is_lstm:
                got = f"({dims[0]}-D, {dims[1]}-D) tensors"
                raise RuntimeError(f"For {kind} input, hx and cx should also be {rank} but got {got}")
            raise RuntimeError(f"For {kind} input, hx should also be {rank} but got {dims[0]}-D tensor")
        if not batched:
            given = tuple(part.unsqueeze(1) for part in given)
        for n, (part, shape) in enumerate(zip(given, shapes, strict=False)):
            name = f"hidden[{n}]" if is_lstm else "hidden"
            self.check_hidden_size(part, shape, f"Expected {name} size {{}}, got {{}}")
            if part.dtype != data.dtype and not torch.is_autocast_enabled(data.device.type):
                raise RuntimeError(f"{name} must have the input's dtype, {data.dtype}, got {part.dtype}")
        return given

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        for name, usual in (
            ("proj_size", 0), ("num_layers", 1), ("bias", True), ("batch_first", False), ("bidirectional", False)
        ):  # fmt: skip
            value = getattr(self, name)
            parts += [f"{name}={value}"] if value != usual else []
        return ", ".join(parts)

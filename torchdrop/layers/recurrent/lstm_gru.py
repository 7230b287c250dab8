"""LSTM and GRU layers with zoneout or recurrent dropout, with the interface of nn.LSTM and nn.GRU.

Zoneout (Krueger et al., ICLR 2017) lets each unit of the states keep its old value with probability p at each step: see
`torchdrop.layers.recurrent.zoneout`.

Recurrent dropout (Semeniuta et al., COLING 2016) drops units of the update of the memory, never of the memory itself:

    c = f c' + i d(g) in an LSTM,    h = z h' + (1 - z) d(g) in a GRU,    d inverted dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import sites
from ...core.checks import check_bool
from ...core.rate import Probability, Rated
from ...kernels.mask_params import MaskParams
from ...kernels.masking import unpack_params
from .base import Unrolled, named
from .cells import Noise
from .zoneout import ZoneoutSteps


class RecurrentDropoutSteps(Rated):
    """The rate of recurrent dropout in a recurrent layer, which draws for all of its time steps at once.

    Args:
        per_step: whether each time step has a mask of its own, or all of a sequence's have the same.
    """

    def __init__(self, p: Probability, per_step: bool, generator: torch.Generator | None) -> None:
        with named("recurrent_dropout"):
            super().__init__(p, generator=generator)
        check_bool("per_step", per_step)
        self.per_step = per_step

    def forward(self, like: Tensor, shape: Sequence[int]) -> tuple[Tensor | None, Tensor | float]:
        """Returns bools of the candidates' units that are kept, and their scale."""
        if not sites.is_on(self.training):
            return None, 1.0
        batch, steps, units = shape
        drawn = (batch, steps if self.per_step else 1, units)
        params = self.rate.params_for(drawn)
        kept = sites.keep_mask(like, params, drawn, self.generator)
        if kept is None:
            return None, 1.0
        kept = kept.expand(batch, steps, units)
        if isinstance(params, MaskParams):
            return kept, params.scale
        scale: Any = unpack_params(params, like.device)[1]
        scale = scale.to(like.device)
        return kept, scale if scale.dim() == 0 else scale.expand(batch, steps, units)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, per_step={self.per_step}"


class ZoneoutLSTM(Unrolled):
    """nn.LSTM with zoneout of the hidden state and of the memory cell.

    With c~ and h~ the results of an LSTM from the states before, c' and h', for each unit and time step

        c = zc c' + (1 - zc) c~,    h = zh h' + (1 - zh) h~

    with zc ~ Bernoulli(zoneout_cell) and zh ~ Bernoulli(zoneout_hidden), and in eval mode the rates in their place: the
    expectation for given c' and h'. With both rates 0 it computes the same as nn.LSTM.

    Interface, parameters, their names and their initial values are nn.LSTM's: tensors (T, B, F), (B, T, F) and (T, F),
    PackedSequence, initial states, several layers, both directions, projections; state_dicts load both ways. The rates
    are in child modules, `zoneout_hidden` and `zoneout_cell`, under whose names `keep_probs` lists them; their
    keep_prob is the probability that a unit is updated. A stack of layers that is given a rate for `dropout`, here or
    later as ``layer.dropout = 0.3``, has it in a third one, `layer_dropout`. The masks of a sequence's states follow
    from its place in the batch and the number of time steps, whatever the size of the batch, packed or padded; those
    between the layers do not. torch.compile unrolls the loop over time; packed sequences break its graph.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as for
            nn.LSTM. `dropout`, between the layers, is torchdrop's.
        zoneout_hidden: probability that a unit of h keeps its old value. Default: 0.05.
        zoneout_cell: probability that a unit of c keeps its old value. Default: 0.5.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Returns:
        ``(output, (h_n, c_n))``, as nn.LSTM.

    Raises:
        ValueError, TypeError, RuntimeError: as nn.LSTM; a rate outside [0, 1].

    References:
        Krueger et al., ICLR 2017 (arXiv:1606.01305), section 3.2.

    Example:
        >>> import torch, torchdrop
        >>> lstm = torchdrop.ZoneoutLSTM(8, 16, zoneout_hidden=0.1, zoneout_cell=0.25)
        >>> output, (h, c) = lstm(torch.randn(20, 4, 8))
        >>> output.shape, h.shape
        (torch.Size([20, 4, 16]), torch.Size([1, 4, 16]))
        >>> torchdrop.keep_probs(lstm)["zoneout_cell"]
        0.75
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout_hidden: Probability = 0.05,
        zoneout_cell: Probability = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype, generator,
        )  # fmt: skip
        with named("zoneout_hidden"):
            self.zoneout_hidden: ZoneoutSteps = ZoneoutSteps(zoneout_hidden, generator=generator)
        with named("zoneout_cell"):
            self.zoneout_cell: ZoneoutSteps = ZoneoutSteps(zoneout_cell, generator=generator)

    def _noise(self, like: Tensor, batch: int, steps: int) -> Noise:
        hidden = self.zoneout_hidden(like, (batch, steps, self.proj_size or self.hidden_size))
        return Noise(hidden=hidden, cell=self.zoneout_cell(like, (batch, steps, self.hidden_size)))


class ZoneoutGRU(Unrolled):
    """nn.GRU with zoneout of the hidden state. All that `ZoneoutLSTM` says holds for it.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for nn.GRU.
        zoneout_hidden: probability that a unit of h keeps its old value. Default: 0.05.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Returns:
        ``(output, h_n)``, as nn.GRU.

    References:
        Krueger et al., ICLR 2017 (arXiv:1606.01305).

    Example:
        >>> import torch, torchdrop
        >>> output, h = torchdrop.ZoneoutGRU(8, 16, batch_first=True, zoneout_hidden=0.1)(torch.randn(4, 20, 8))
        >>> output.shape, h.shape
        (torch.Size([4, 20, 16]), torch.Size([1, 4, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout_hidden: Probability = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            generator,
        )  # fmt: skip
        with named("zoneout_hidden"):
            self.zoneout_hidden: ZoneoutSteps = ZoneoutSteps(zoneout_hidden, generator=generator)

    def _noise(self, like: Tensor, batch: int, steps: int) -> Noise:
        return Noise(hidden=self.zoneout_hidden(like, (batch, steps, self.hidden_size)))


class RecurrentDropoutLSTM(Unrolled):
    """nn.LSTM with dropout of the update of its memory, never of the memory itself: ``c = f c' + i d(g)``.

    d is inverted dropout, so E[c] = f c' + i g for one step from given states; in eval mode it is left out, and the
    layer computes the same as nn.LSTM. All that `ZoneoutLSTM` says of interface, parameters and names holds; the rate
    is in the child module `recurrent_dropout`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as for
            nn.LSTM. `dropout`, between the layers, is torchdrop's.
        recurrent_dropout: probability that a unit's candidate is dropped. Default: 0.25.
        per_step: whether each time step has a mask of its own; False for one mask for a whole sequence.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Returns:
        ``(output, (h_n, c_n))``, as nn.LSTM.

    References:
        Semeniuta et al., COLING 2016 (arXiv:1603.05118), section 3.

    Example:
        >>> import torch, torchdrop
        >>> lstm = torchdrop.RecurrentDropoutLSTM(8, 16, 2, recurrent_dropout=0.5, per_step=False)
        >>> output, (h, c) = lstm(torch.randn(20, 4, 8))
        >>> output.shape, h.shape
        (torch.Size([20, 4, 16]), torch.Size([2, 4, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: Probability = 0.25,
        per_step: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype, generator,
        )  # fmt: skip
        self.recurrent_dropout: RecurrentDropoutSteps = RecurrentDropoutSteps(recurrent_dropout, per_step, generator)

    def _noise(self, like: Tensor, batch: int, steps: int) -> Noise:
        kept, scale = self.recurrent_dropout(like, (batch, steps, self.hidden_size))
        return Noise(kept=kept, scale=scale)


class RecurrentDropoutGRU(Unrolled):
    """nn.GRU with dropout of only the candidate state: ``h = z h' + (1 - z) d(g)``. See `RecurrentDropoutLSTM`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for nn.GRU.
        recurrent_dropout: probability that a unit's candidate is dropped. Default: 0.25.
        per_step: whether each time step has a mask of its own; False for one mask for a whole sequence.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Returns:
        ``(output, h_n)``, as nn.GRU.

    References:
        Semeniuta et al., COLING 2016 (arXiv:1603.05118), section 3.

    Example:
        >>> import torch, torchdrop
        >>> output, h = torchdrop.RecurrentDropoutGRU(8, 16, recurrent_dropout=0.5)(torch.randn(20, 4, 8))
        >>> output.shape, h.shape
        (torch.Size([20, 4, 16]), torch.Size([1, 4, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: Probability = 0.25,
        per_step: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            generator,
        )  # fmt: skip
        self.recurrent_dropout: RecurrentDropoutSteps = RecurrentDropoutSteps(recurrent_dropout, per_step, generator)

    def _noise(self, like: Tensor, batch: int, steps: int) -> Noise:
        kept, scale = self.recurrent_dropout(like, (batch, steps, self.hidden_size))
        return Noise(kept=kept, scale=scale)

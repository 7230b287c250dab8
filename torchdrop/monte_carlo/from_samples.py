"""`from_samples`: the statistics of `mc_predict` for outputs that come from elsewhere, as from an ensemble."""

from __future__ import annotations

from typing import Any

from .blocks import Outputs
from .prediction import Prediction
from .statistics import Collector
from .task_predictions import predict_from
from .tasks import read_task


def from_samples(
    outputs: Outputs,
    task: str | None = None,
    *,
    scores: str = "auto",
    class_dim: int | str = "auto",
    tau: float | None = None,
    noise: str | None = None,
) -> Prediction:
    """Returns the prediction of samples that are there already: outputs of several networks, or of one pass.

    So a deep ensemble, or the deterministic pass, has the same statistics, metrics and calibration as `mc_predict`.

    Args:
        outputs: the samples, of shape (T, B, ...), or a pair of such with ``noise="log_variance"``. T may be 1.
        task, scores, class_dim, tau, noise: as in `mc_predict`.

    Returns:
        The prediction, which keeps the samples. Standard errors are those of T independent samples.

    Raises:
        ValueError: no samples, outputs that do not fit the task or are not finite.
        TypeError: outputs that are no tensors.

    References:
        Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep
        Ensembles", NeurIPS 2017.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.monte_carlo import from_samples
        >>> x, networks = torch.randn(8, 4), [torch.nn.Linear(4, 3) for _ in range(5)]
        >>> ensemble = from_samples(torch.stack([network(x) for network in networks]), task="classification")
        >>> ensemble.mean.shape, ensemble.mutual_information.shape, ensemble.num_samples
        (torch.Size([8, 3]), torch.Size([8]), 5)
    """
    settled: Any = read_task(task, scores=scores, class_dim=class_dim, tau=tau, noise=noise)
    collector = Collector(settled, keep_samples=True, errors="auto")
    several = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    number = len(several[0]) if several and getattr(several[0], "dim", int)() else 0
    if not number:
        raise ValueError("outputs must hold at least one sample, in their first dimension, got none")
    collector.add(outputs, range(number))
    return predict_from(collector)

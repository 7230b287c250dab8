"""`mc_predict`: samples of a model's outputs, run in the fastest way that works, and statistics of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .prediction import Prediction
from .predictor import MCPredictor
from .standard_errors import Errors


def mc_predict(
    model: nn.Module,
    inputs: Any,
    samples: int = 100,
    *,
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
        task: "classification" (outputs of shape (rows, classes, ...), of which one is true), "multilabel" (each element
            is a label that is present or not), "regression", or None for plain moments, also of boolean outputs. A
            mapping of names to these, for several outputs: each is taken by its name from what the model returns.
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
            rows. Default: 32 MiB on the CPU, 1 GiB elsewhere, for either. Where the statistics of a batch do not fit,
            or a single sample of it does not fit into a bound that was given, its rows are run in blocks, of one row at
            least, unless there is a tolerance or rows depend on each other. The result itself is not counted.
        batch_dim: the dimension of the inputs that counts rows; None if they are one whole, as a graph is.
        method: the name of the model's method that is called, such as "encode"; the model itself if None.
        select: takes the inputs from a batch, such as ``tuple`` where a pair has two arguments.
        select_output: takes the tensor from the model's output, or several as a mapping of names to tensors. By default
            a tensor is taken as it is, and from a mapping `logits` or `last_hidden_state`.
        batches: "joined": the rows of all batches make up the result, one after another. "padded": outputs may differ
            in size between batches, as where each batch is padded to its longest row. The smaller are filled with NaN,
            and the result's `valid` says where. Either way `Prediction.batches` returns the result by batch.
        standard_errors: the statistics that get a Monte Carlo standard error: True for all, False for none, a sequence
            of names such as ("mean", "mutual_information"), or "auto" for all where a row's output has at most 16384
            elements, and for the mean alone where it has more, as images of classes do. All but the mean's need the
            moments of ten groups of samples: ten times the time and memory of the statistics themselves.
        keep_samples: whether all samples are kept, for quantiles and the like.
        weight_scaling: whether the deterministic pass of eval mode is made as well, to compare with.
        progress: whether to show a progress bar (tqdm).
        group: a torch.distributed process group over whose processes the samples are split. All of them get the result.

    Returns:
        A `Prediction`, `ClassificationPrediction`, `MultiLabelPrediction` or `RegressionPrediction`, or `Predictions`
        of several outputs by name. They have rows first, with `mean` and the standard errors that were chosen, by the
        statistics' names in `standard_errors`. Under "latin" without a tolerance these are upper bounds: a hypercube's
        variance is at most T / (T - 1) times that of independent samples (Owen, 1997).

    Raises:
        ValueError: an argument out of range, no random source, a NaN in a sample, outputs that change their shape or
            do not fit the task, inputs on another device than the model.
        TypeError: a model, input or output of a kind that is not served.
        RuntimeError: a forced strategy that does not work.

    Warns:
        UserWarning: identical samples, or such as cannot be repeated; another dimension that could be meant by classes;
            a tolerance that was not met; something that is random in train mode and could not be turned on; targets
            that the model could take as an argument.

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
    predictor = MCPredictor(
        model,
        samples,
        task=task,
        scores=scores,
        class_dim=class_dim,
        valid=valid,
        tau=tau,
        noise=noise,
        seed=seed,
        masks=masks,
        sampling=sampling,
        tolerance=tolerance,
        sources=sources,
        strategy=strategy,
        chunk=chunk,
        memory=memory,
        batch_dim=batch_dim,
        method=method,
        select=select,
        select_output=select_output,
        batches=batches,
        standard_errors=standard_errors,
        keep_samples=keep_samples,
        weight_scaling=weight_scaling,
        group=group,
    )
    return predictor._predict(inputs, progress, "mc_predict", 2)

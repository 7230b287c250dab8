"""`cross_validate`: trains every fold and setting, at once if that is possible."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import optional
from ..configure.rate_sites import rate_sites
from ..configure.reach import calls_of
from ..configure.surgery import OURS, replace
from ..core.checks import check_integer
from ..core.rate import Probability
from .alone import train_alone, with_rates
from .folds import divide
from .result import SearchResult
from .settings import Setting, rates_of
from .stacked import Job, NotStackableError, Stack
from .training import (
    Fold,
    Loss,
    MakeOptimizer,
    Score,
    Training,
    default_loss,
    default_optimizer,
    default_score,
    mixed,
)

PARAMETERS, BYTES = 5 * 2**20, 2**28
"""The number of parameters that are trained at once, over all models, and the bytes that may be saved for backward: on
a CPU more models at once were measured to be no faster."""

Folds = int | Iterable[tuple[Any, Any]]


def cross_validate(
    build: Callable[[], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    settings: Sequence[Setting],
    *,
    folds: Folds = 5,
    epochs: int,
    batch_size: int = 32,
    loss: Loss = default_loss,
    score: Score = default_score,
    optimizer: MakeOptimizer = default_optimizer,
    seed: int = 0,
    at_once: int | None = None,
    progress: bool = False,
) -> SearchResult:
    """Cross-validates keep probabilities: K folds times S settings, trained together as one vectorized model.

    Each setting is trained on the training part of every fold and scored, in eval mode, on its test part. All settings
    of a fold start from the same parameters and see the same batches and the same draws for their masks, so that their
    scores are paired. A setting's scores depend on `seed`, but not on the models that are trained with it; up to
    rounding they do not depend on `at_once` either.

    Small networks gain most: their steps are dominated by the cost of calling operations, which is paid once for all
    models. A model that cannot be vectorized (torch.func's rules: nn.LSTM, control flow that depends on data, random
    numbers other than torchdrop's, attributes that a forward changes) is trained one after another. The same holds if
    settings differ in rates that are no layers, or if the optimizer is not known to work element by element.

    Args:
        build: returns a fresh model, which maps rows of `inputs` to the input of `loss`. It is called once for each
            fold, under a seed of its own. Dropout layers of torch.nn in it are replaced by torchdrop's.
        inputs, targets: the data, rows first.
        settings: for each a mapping from patterns of layer names to keep_prob, as `torchdrop.set_keep_prob` takes;
            see `grid` and `draws`. A pattern that matches several layers gives them one shared number.
        folds: the number of folds, drawn at random from the seed; or pairs of indices (train, test), as scikit-learn's
            splitters yield.
        epochs: the number of passes over the training part.
        batch_size: the number of rows in a batch. All batches are full: other rows are left over in each epoch.
        loss: a function of (output, target), the mean over the batch. Default: cross-entropy for integer targets, the
            mean squared error otherwise.
        score: a function of (output, target) for the whole test part; higher is better. Default: accuracy for integer
            targets, minus the mean squared error otherwise.
        optimizer: makes a torch.optim.Optimizer from a list of parameters. When models are trained at once, the
            parameters of all are stacked, and their dimensions may be permuted: Adam, AdamW, SGD, RMSprop and others of
            torch.optim that update each element by itself. Default: Adam with learning rate 0.001.
        seed: the seed of parameters, folds, batches and masks. PyTorch's random state is left as it was.
        at_once: the number of models at a time; 1 is one after another in the ordinary way. Default: by their size.
        progress: whether to show a progress bar (``pip install tqdm``).

    Returns:
        The scores, with means, standard errors, the best setting and the one-standard-error choice. A model whose loss
        or outputs were not finite has the score NaN.

    Raises:
        TypeError, ValueError: a bad argument, or a setting that `torchdrop.set_keep_prob` refuses, before anything is
            trained.

    Warns:
        UserWarning: models are trained one after another; it says why.

    References:
        Stone, "Cross-validatory choice and assessment of statistical predictions", JRSS B 36, 1974.

    Example:
        >>> import torch, torchdrop
        >>> from torch import nn
        >>> from torchdrop.tune import cross_validate, grid
        >>> x = torch.rand(60, 4)
        >>> def build():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), torchdrop.Dropout(0.5), nn.Linear(8, 2))
        >>> found = cross_validate(build, x, (x.sum(1) > 2).long(), grid({"2": [0.5, 0.9]}), folds=3, epochs=2)
        >>> found.scores.shape, found.at_once
        (torch.Size([2, 3]), 6)
    """
    _check_arguments(build, inputs, targets, settings, loss, score, optimizer)
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, None)):
        check_integer(name, value, least)
    if at_once is not None:
        check_integer("at_once", at_once, 1)
    parts = divide(len(inputs), folds, seed)
    smallest = min(len(train) for train, _ in parts)
    if batch_size > smallest:
        raise ValueError(f"batch_size must be at most {smallest}, the smallest training part's rows, got {batch_size}")
    training = Training(inputs, targets, loss, score, optimizer, epochs, batch_size, seed)
    settings = [dict(setting) for setting in settings]
    with torch.random.fork_rng([inputs.device.index or 0] if inputs.is_cuda else []), torch.enable_grad():
        made = [Fold(i, *part, _built(build, mixed(seed, "model", i))) for i, part in enumerate(parts)]
        for fold in made:
            _list_calls(fold, training)
        rates = rates_of(made[0].model, settings)
        _check_alike(made)
        by_size = _examined(made[0], rates[0], training)
        total = len(made) * len(settings) * epochs
        with optional("tqdm.auto", "tune").tqdm(total=total, unit="epoch") if progress else nullcontext() as bar:
            advance = bar.update if bar is not None else lambda _: None
            scores, used, reason = _all_scores(made, rates, training, at_once or by_size, advance)
    mean_keep_probs = [sum(float(torch.as_tensor(r).mean()) for r in own) / len(own) for own in rates]
    return SearchResult(settings, scores, mean_keep_probs, used, reason)


def _check_arguments(
    build: Any, inputs: Any, targets: Any, settings: Any, loss: Any, score: Any, optimizer: Any
) -> None:
    given = {"build": build, "loss": loss, "score": score, "optimizer": optimizer}
    for name, value in given.items():
        if not callable(value) or (name == "build" and isinstance(value, nn.Module)):
            raise TypeError(f"{name} must be a function, got {type(value).__name__}")
    for name, value in {"inputs": inputs, "targets": targets}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        raise ValueError(
            "inputs and targets must have the same number of rows, "
            f"got the shapes {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if isinstance(settings, (dict, str)) or not isinstance(settings, Sequence):
        raise TypeError(f"settings must be a list of mappings from pattern to keep_prob, got {type(settings).__name__}")
    if not settings:
        raise ValueError("settings must have at least one setting, got none")
    for number, setting in enumerate(settings):
        if not isinstance(setting, Mapping):
            raise TypeError(
                f"settings[{number}] must be a mapping from pattern to keep_prob, got {type(setting).__name__}"
            )


def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"build must give a torch.nn.Module, got {type(model).__name__}")
    model = copy.deepcopy(model)  # in case it is one that the caller keeps
    if any(type(module) in OURS for module in model.modules()):
        replace(model)
    return model


def _list_calls(fold: Fold, training: Training) -> None:
    """Has the model list the calls that its modules make in their own code, if they are served. A copy of it runs."""
    served = {name: calls for name, module in fold.model.named_modules() if (calls := calls_of(module)) is not None}
    if served:
        trial = copy.deepcopy(fold.model).train()
        with torch.no_grad():
            trial(training.inputs[fold.train[: training.batch_size].to(training.inputs.device)])
        for name, calls in served.items():
            made = calls_of(trial.get_submodule(name))
            calls.passed = made.passed if made is not None else {}


def _check_alike(folds: Sequence[Fold]) -> None:
    names = [[site.name for site in rate_sites(fold.model)] for fold in folds]
    for own in names:
        if own != names[0]:
            raise ValueError(f"build must give the same layers every time, got rates in {names[0]} and in {own}")


def _examined(fold: Fold, rates: Sequence[Probability], training: Training) -> int:
    """Returns the number of such models that are trained at once; tries the model and the loss on a batch.

    Raises:
        ValueError: the loss is not one number, or has no gradient.
    """
    model = with_rates(fold.model, rates)
    saved = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    rows = fold.train[: training.batch_size].to(training.inputs.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = training.loss(model(training.inputs[rows]), training.targets[rows])
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        raise ValueError(
            "loss must give one number with a gradient, "
            f"got {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
        )
    parameters = sum(p.numel() for p in model.parameters())
    return max(1, min(PARAMETERS // max(parameters, 1), BYTES // max(saved, 1)))


Advance = Callable[[int], Any]


def _all_scores(
    folds: Sequence[Fold], rates: Sequence[Sequence[Probability]], training: Training, limit: int, advance: Advance
) -> tuple[Tensor, int, str]:
    """Returns the scores (settings, folds), the largest number of models trained at once, and the reason if it is 1."""
    scores = torch.full((len(rates), len(folds)), torch.nan, dtype=torch.float64)
    reason, used = "", 1
    for chunk in _chunks(folds, len(rates), training, limit):
        jobs = [Job(folds[fold], rates[setting]) for fold, setting in chunk]
        stack, why = _stack(jobs, training) if limit > 1 and not reason else (None, "")
        if why:
            reason = why
            warnings.warn(
                f"cross_validate trains one model after another, which takes longer, because {reason}",
                UserWarning,
                stacklevel=3,
            )
        used = max(used, len(jobs) if stack else 1)
        found = _scores_at_once(stack, jobs, training, advance) if stack else _scores_in_turn(jobs, training, advance)
        for (fold, setting), value in zip(chunk, found, strict=True):
            scores[setting, fold] = value
    return scores, used, reason


def _chunks(folds: Sequence[Fold], settings: int, training: Training, limit: int) -> Iterable[list[tuple[int, int]]]:
    """Yields pairs of fold and setting to train together: equal numbers of steps, and parts of about equal size."""
    groups: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for at, fold in enumerate(folds):
        groups[training.steps(fold)] += [(at, setting) for setting in range(settings)]
    for group in groups.values():
        count = -(-len(group) // limit)
        for part in range(count):
            yield group[part * len(group) // count : (part + 1) * len(group) // count]


def _stack(jobs: Sequence[Job], training: Training) -> tuple[Stack | None, str]:
    """Returns the models stacked, or the reason why they cannot be."""
    try:
        return Stack(jobs, training), ""
    except NotStackableError as error:
        return None, str(error)
    except Exception as error:  # vmap or the model may raise anything
        lines = str(error).strip().splitlines() or [""]
        return None, f"the model cannot be vectorized ({type(error).__name__}: {lines[0]})"


def _scores_at_once(stack: Stack, jobs: Sequence[Job], training: Training, advance: Advance) -> list[float]:
    stack.train(lambda: advance(len(jobs)))
    found = zip(stack.models(), jobs, stack.finite.tolist(), strict=True)
    return [training.evaluate(model, job.fold) if finite else torch.nan for model, job, finite in found]


def _scores_in_turn(jobs: Sequence[Job], training: Training, advance: Advance) -> list[float]:
    found = []
    for job in jobs:
        model, finite = train_alone(job.fold, job.rates, training, lambda: advance(1))
        found.append(training.evaluate(model, job.fold) if finite else torch.nan)
    return found

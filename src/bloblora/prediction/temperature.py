r"""Temperature scaling of averaged probabilities (Guo et al., arXiv 1706.04599).

.. math:: T = \arg\min_T \sum_k -\log \bar p_T(y_k \mid x_k) + \tfrac12 (\log T)^2

log T has a standard normal prior, for ten records whose answers are all right would make T as small as it may be. Of a
number with normal noise the temperature is a factor of the noise's variance (`bloblora.tasks.Gaussian`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..adapter import find_posterior
from ..messages import quoted
from ..tasks.likelihood import CATEGORICAL, NO_TAG, Likelihood, likelihood_of
from .forward import PredictionTask
from .kinds import Prediction
from .prediction import cat_draws, order_of, predict, sampler_of

FEWEST_FOR_TEMPERATURE = 10
# In simulations of calibrated models (2, 4 and 20 classes, accuracy 0.38 to 0.85) log T has a standard error of 0.15 to
# 0.35 at n = 30 and of 0.30 to 0.49 at 10, and costs 0.01 to 0.02 and 0.03 to 0.07 nats. Of models that are too sure by
# a factor of 3 it costs 0.07 to 0.14 at 10, and doing without 0.20 to 1.1.
_LOG_RANGE = math.log(20.0)


def fit_temperature(logits: Sequence[Tensor], labels: Sequence[Tensor], likelihood: Likelihood = CATEGORICAL) -> float:
    """T in [1/20, 20] that is most probable after these records.

    ``logits`` of each part is (S, n, C), -inf for a class that an input lacks; ``labels`` is (n, …).
    """

    def energy(log_temperature: float) -> float:
        nll = tempered_nll(logits, labels, math.exp(log_temperature), likelihood).sum().item()
        return nll + log_temperature**2 / 2

    return math.exp(minimize_scalar(energy, bounds=(-_LOG_RANGE, _LOG_RANGE), method="bounded").x)


def tempered_nll(
    logits: Sequence[Tensor], labels: Sequence[Tensor], temperature: float, likelihood: Likelihood = CATEGORICAL
) -> Tensor:
    """NLL of each record of all parts under a temperature, nats, (n,) float64; arguments as of `fit_temperature`."""
    parts = zip(logits, labels, strict=True)
    return torch.cat([-likelihood.averaged(rows.double() / temperature, right) for rows, right in parts])


def set_temperature(
    model: nn.Module,
    inputs: Any,
    labels: Sequence[Any] | Tensor | None = None,
    num_samples: int = 10,
    seed: int = 0,
    *,
    task: PredictionTask | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 16,
) -> float:
    r"""Fit a temperature on inputs that training hasn't seen, by which predictions of the posterior are then divided.

    .. math:: T = \arg\min_T \sum_k -\log \bar p_T(y_k \mid x_k) + \tfrac12 (\log T)^2, \qquad
              \bar p_T(y \mid x) = \frac1N \sum_s \mathrm{softmax}\big(f(x; W_s)/T\big)_y

    (Guo et al., arXiv 1706.04599). Of a Gaussian head the average of draws is divided, not each of them. The posterior
    mean alone gets a T of its own. Both are in `Posterior.temperatures`, and saved with the adapter. `BlobTrainer`
    calls this after a training with its ``eval_dataset``.

    Args:
        model: with a Bayesian adapter.
        inputs: as for `predict`.
        labels: the right class of each input, (n,), or what a task's examples have as ``label``; default, what the
            inputs have: ``label`` of each of the task's examples, or ``labels`` of a batch or of a DataLoader's. Inputs
            whose class is -100 are left out.
        num_samples: N draws.
        seed: of the draws.
        task: as for `predict`.
        tokenizer: as for `predict`.
        batch_size: inputs a forward; a DataLoader has its own.

    Returns:
        T of the average over N draws.

    Raises:
        ValueError: the model has no Bayesian adapter, or it is disabled, there are no labels, not one for each input,
            or one is no class; or as `predict`.
    """
    if (posterior := find_posterior(model)) is None:
        raise ValueError("model: its adapter isn't Bayesian, so it can't keep a temperature; call bayesianize first")
    if posterior.is_disabled:
        raise ValueError("model: its adapter is disabled, and the temperature is the adapter's; leave disable_adapter")
    likelihood = likelihood_of(task)
    right = None if labels is None else _stacked(labels, likelihood)
    options: Any = {"task": task, "tokenizer": tokenizer, "batch_size": batch_size, "sampler": sampler_of(posterior)}
    own: list[Any] = []
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for part in _parts(inputs):
        if labels is None:
            own += _labels_of(part)
        for logits, draws in zip(found, (num_samples, 0), strict=True):
            logits.append(predict(model, part, draws, seed, **options).draw_logits())
    if not found[0]:
        raise ValueError("inputs: there is nothing to predict")
    right = _stacked(own, likelihood) if right is None else right
    fitted = [_fit_temperature(cat_draws(logits), right, likelihood) for logits in found]
    posterior.temperatures = fitted[0], fitted[1]
    return fitted[0]


def _parts(inputs: Any) -> Iterator[Any]:
    """Inputs of `predict`; of a DataLoader one batch after the other, so that it is read once, and not kept."""
    if not isinstance(inputs, DataLoader):
        yield inputs
        return
    order_of(inputs, None)
    for batch in inputs:
        alone: Any = [batch]
        yield DataLoader(alone, batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def _fit_temperature(logits: Tensor, right: Tensor, likelihood: Likelihood) -> float:
    """T of logits (S, n, C); a ValueError where the labels (n, …) aren't theirs."""
    if len(right) != logits.shape[1]:
        raise ValueError(f"labels: there are {len(right)}, and {logits.shape[1]} inputs; give each input its own")
    if likelihood.name == Prediction.kind and not right.is_floating_point():
        there, classes = right != NO_TAG, f"classes from 0 to {logits.shape[-1] - 1}"
        if not there.any():
            raise ValueError(f"labels: must be {classes}; all are {NO_TAG}, which is left out")
        logits, right = logits[:, there], right[there]
        first, last = int(right.min()), int(right.max())
        if not 0 <= first <= last < logits.shape[-1]:
            raise ValueError(f"labels: must be {classes}, got {first} to {last}")
    return fit_temperature([logits], [right], likelihood)


def _stacked(labels: Any, likelihood: Likelihood) -> Tensor:
    """Labels as one tensor (n, …); of classes (n,), or their probabilities (n, C)."""
    classes = likelihood.name == Prediction.kind
    wanted = "whole numbers, the class of each input from 0" if classes else "what the task's examples have as label"
    try:
        right = likelihood.stacked([*labels])
    except (TypeError, ValueError, RuntimeError) as error:  # torch has many
        raise ValueError(f"labels: must be {wanted}; got {quoted(labels)}") from error
    one_each = right.numel() == len(right) > 0
    if classes and (right.dtype == torch.bool or (right.is_floating_point() and one_each)):
        raise ValueError(f"labels: must be {wanted}; got {quoted(right.flatten()[0].item())}")
    return right.reshape(-1) if classes and not right.is_floating_point() else right


def _labels_of(inputs: Any) -> Sequence[Any]:
    """The labels that inputs of `predict` have."""
    try:
        if isinstance(inputs, DataLoader):
            return torch.cat([batch["labels"].cpu() for batch in inputs]).tolist()
        if isinstance(inputs, Mapping):
            return torch.as_tensor(inputs["labels"]).tolist()
        return [example["label"] for example in inputs]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError("labels: the inputs have none; give the right class of each, from 0") from error

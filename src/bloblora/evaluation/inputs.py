"""What metrics take: checked predictions and scores, and examples in groups."""

import torch
from torch import Tensor

from ..prediction import MultiLabelPrediction, Prediction, TagsPrediction, ValuePrediction
from ..tasks.likelihood import NO_TAG


def as_prediction(predicted: Tensor | Prediction) -> Prediction:
    """A prediction from log-probabilities (n, C), or itself."""
    return predicted if isinstance(predicted, Prediction) else Prediction(predicted[None], 0)


def checked(predicted: Tensor | Prediction, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, C) and targets (n,) on the CPU, as float64 and int64.

    Args:
        predicted: a prediction or its log-probabilities, normalized; -inf for a class that an example lacks. Values
            that rounding made slightly larger than log 1 = 0 become 0.
        targets: class indices.

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    values = predicted.log_probabilities if isinstance(predicted, Prediction) else predicted
    values, targets = _checked("log_probabilities", values, targets)
    if (values > 1e-3).any():
        raise ValueError(
            f"log_probabilities must not be above 0, got {values.max().item():.4g}; "
            "if these are probabilities, pass their logarithm"
        )
    _check_rows("exp(log_probabilities)", values.exp())
    return values.clamp_max(0), targets


def checked_probabilities(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same for probabilities (n, C)."""
    probabilities, targets = _checked("probabilities", probabilities, targets)
    _check_rows("probabilities", probabilities)
    return probabilities, targets


def checked_values(prediction: ValuePrediction, targets: Tensor) -> Tensor:
    """Targets (n,) of a prediction of values on the CPU, as float64; a ValueError where they are no such numbers."""
    n = len(prediction.num_draws)
    if targets.shape != (n,) or not n or not targets.isfinite().all():
        raise ValueError(f"targets must be ({n},), finite numbers, n > 0, got {tuple(targets.shape)}")
    return targets.detach().cpu().double()


def checked_labels(prediction: MultiLabelPrediction, targets: Tensor) -> Tensor:
    """Targets (n, L) of a prediction of several labels on the CPU, 1 or 0; a ValueError where they are none."""
    shape = prediction.logits.shape[1:]
    if targets.shape != shape or not len(targets) or not ((targets == 0) | (targets == 1)).all():
        raise ValueError(f"targets must be {tuple(shape)} of 0 and 1, n > 0, got {tuple(targets.shape)}")
    return targets.detach().cpu().long()


def checked_tags(prediction: TagsPrediction, targets: Tensor) -> Tensor:
    """Targets (n, T) of a prediction of tags on the CPU; a ValueError where they aren't one for each token."""
    targets, most = targets.detach().cpu(), len(prediction.likelihood.names) - 1
    there = targets != NO_TAG
    if not torch.equal(there, prediction.tokens) or not targets[there].ge(0).all() or not targets[there].le(most).all():
        shape = tuple(prediction.tokens.shape)
        raise ValueError(f"targets must be {shape}, in 0..{most} for each token and {NO_TAG} where there is none")
    return targets


def check_scores(name: str, scores: Tensor) -> None:
    """Raise a ValueError unless ``scores`` are (n,), n > 0, no NaN."""
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name}: scores must be (n,) with n > 0, got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{name}: score {scores.isnan().nonzero()[0].item()} is NaN")


def check_bins(num_bins: int) -> None:
    """Raise a ValueError unless there is a bin."""
    if num_bins < 1:
        raise ValueError(f"num_bins must be 1 or more, got {num_bins}")


def equal_width(values: Tensor, num_bins: int) -> Tensor:
    """Index of each value's bin, from 0: bin b is (b/bins, (b+1)/bins], and 0 lies in the first."""
    check_bins(num_bins)
    return (values * num_bins).ceil().long().clamp(1, num_bins) - 1


def group_means(values: Tensor, group: Tensor) -> Tensor:
    """Each value replaced by the mean of its group, (n,)."""
    return (group.bincount(values) / group.bincount())[group]


def tie_means(values: Tensor, scores: Tensor) -> Tensor:
    """Each value replaced by the mean over the examples of the same score, (n,).

    It is the mean over the orders of these examples, so a sort by score no longer depends on the order of the input.
    """
    return group_means(values, scores.unique(return_inverse=True)[1])


def _checked(name: str, values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if values.ndim != 2 or targets.shape != values.shape[:1] or not len(targets):
        raise ValueError(
            f"{name} must be (n, C) and targets (n,) with n > 0, got {tuple(values.shape)} and {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    wrong = ((targets < 0) | (targets >= values.shape[1])).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"targets must be in 0..{values.shape[1] - 1}, got {targets[row].item()} in row {row}")
    if values.isnan().any():
        raise ValueError(f"{name}: row {values.isnan().any(-1).nonzero()[0].item()} has a NaN")
    return values.detach().cpu().double(), targets.cpu().long()


def _check_rows(name: str, probabilities: Tensor) -> None:
    if (probabilities < 0).any():
        raise ValueError(f"{name} must not be negative, got {probabilities.min().item():.4g}")
    total = probabilities.sum(-1)
    row = int((total - 1).abs().argmax())
    if abs(total[row] - 1) > 1e-3:
        raise ValueError(f"{name}: row {row} sums to {total[row].item():.4g}, must be 1")

"""What predictions and targets must look like."""

import torch
from torch import Tensor


def checked(log_probabilities: Tensor, targets: Tensor, name: str = "log_probabilities") -> tuple[Tensor, Tensor]:
    """Both on the CPU, as float64 and int64; what rounding lifted above log 1 = 0 is lowered to it.

    Args:
        log_probabilities: (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices.
        name: of the first, for errors.

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    check_targets(name, log_probabilities, targets)
    log_probabilities = log_probabilities.detach().cpu().double()
    if (log_probabilities > 1e-3).any():
        raise ValueError(
            f"{name} must not be above 0, got {log_probabilities.max().item():.4g}; "
            "if these are probabilities, pass their logarithm"
        )
    check_rows(f"exp({name})", log_probabilities.exp())
    return log_probabilities.clamp_max(0), targets.cpu().long()


def check_targets(name: str, values: Tensor, targets: Tensor) -> None:
    """Raise a ValueError unless ``values`` are (n, C), n > 0, no NaN, and ``targets`` n of their columns."""
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


def check_rows(name: str, probabilities: Tensor) -> None:
    """Raise a ValueError unless rows are distributions, to 1e-3."""
    if (probabilities < 0).any():
        raise ValueError(f"{name} must not be negative, got {probabilities.min().item():.4g}")
    total = probabilities.sum(-1)
    row = int((total - 1).abs().argmax())
    if abs(total[row] - 1) > 1e-3:
        raise ValueError(f"{name}: row {row} sums to {total[row].item():.4g}, must be 1")


def check_scores(name: str, scores: Tensor) -> None:
    """Raise a ValueError unless ``scores`` are (n,), n > 0, no NaN."""
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name}: scores must be (n,) with n > 0, got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{name}: score {scores.isnan().nonzero()[0].item()} is NaN")

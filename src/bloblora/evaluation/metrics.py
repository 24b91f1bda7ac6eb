"""Accuracy and calibration of predicted probabilities, and telling in from out of scope."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from .reliability import reliability


def metrics(log_probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> dict[str, float | int]:
    r"""Accuracy, calibration and proper scores of n predictions.

    - ``ece``: :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|` over equal-width bins of the top
      probability (Guo et al., arXiv 1706.04599);
    - ``nll``: mean of -log p(target), nats; infinite where a target has probability 0;
    - ``brier``: mean over examples of :math:`\sum_c (p_c - 1[c = y])^2`, in [0, 2].

    Args:
        log_probabilities: (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices.
        num_bins: bins of the ECE.

    Returns:
        ``accuracy``, ``ece``, ``nll``, ``brier``, ``num_examples``.

    Raises:
        ValueError: shapes, ranges or normalization are wrong.
    """
    _check(log_probabilities, targets)
    log_probabilities = log_probabilities.double()
    probabilities = log_probabilities.exp()
    truth = torch.nn.functional.one_hot(targets, probabilities.shape[1])
    bins = reliability(probabilities, targets, num_bins)
    gaps = (bins.accuracy - bins.confidence).abs() * bins.count / len(targets)
    return {
        "accuracy": (probabilities.argmax(-1) == targets).double().mean().item(),
        "ece": gaps.nansum().item(),
        "nll": -log_probabilities.gather(1, targets[:, None]).mean().item(),
        "brier": (probabilities - truth).square().sum(-1).mean().item(),
        "num_examples": len(targets),
    }


def ood_metrics(inside: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> dict[str, float]:
    """Area under the ROC curve for telling out-of-scope inputs (positive) from those in scope.

    Args:
        inside: scores of inputs in scope by name, each (n,): higher means less certain, but for ``confidence``, of which
            1 - confidence is the score.
        outside: the same of inputs out of scope, each (m,).

    Returns:
        ``auroc_<name>`` for each score; 0.5 where all scores are equal (a plain LoRA's mutual information).

    Raises:
        ValueError: names differ, or a side is empty.
    """
    if inside.keys() != outside.keys():
        raise ValueError(f"scores differ: {sorted(inside)} in scope, {sorted(outside)} out of scope")
    result = {}
    for name in inside:
        scores = torch.cat([inside[name], outside[name]]).double()
        if not len(inside[name]) or not len(outside[name]):
            raise ValueError(f"{name}: AUROC needs inputs in and out of scope")
        labels = torch.cat([torch.zeros(len(inside[name])), torch.ones(len(outside[name]))]).long()
        # ranks, because torchmetrics would squash scores beyond [0, 1]
        ranks = scores.unique(return_inverse=True)[1].double()
        ranks = ranks / ranks.max().clamp_min(1)
        result[f"auroc_{name}"] = binary_auroc(1 - ranks if name == "confidence" else ranks, labels).item()
    return result


def _check(log_probabilities: Tensor, targets: Tensor) -> None:
    if log_probabilities.ndim != 2 or targets.shape != log_probabilities.shape[:1] or not len(targets):
        raise ValueError(
            f"log_probabilities must be (n, C) and targets (n,) with n > 0, got {tuple(log_probabilities.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if targets.min() < 0 or targets.max() >= log_probabilities.shape[1]:
        raise ValueError(f"targets must be in 0..{log_probabilities.shape[1] - 1}, got up to {targets.max().item()}")
    totals = log_probabilities.exp().sum(-1)
    if not torch.allclose(totals, torch.ones_like(totals), atol=1e-3):
        worst = (totals - 1).abs().argmax().item()
        raise ValueError(f"log_probabilities: row {worst} sums to {totals[worst].item():.4g}, must be 1")

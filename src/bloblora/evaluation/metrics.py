"""Accuracy and calibration of predicted probabilities, and telling in from out of scope."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .reliability import check_targets, reliability


def metrics(log_probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> dict[str, float | int]:
    r"""Accuracy, calibration and proper scores of n predictions.

    - ``ece``: :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|` over equal-width bins of
      the top probability (Guo et al., arXiv 1706.04599); of one example, how far that is from 1 (right) or 0;
    - ``nll``: mean of -log p(target), nats; infinite where a target has probability 0;
    - ``brier``: mean over examples of :math:`\sum_c (p_c - 1[c = y])^2`, in [0, 2].

    Args:
        log_probabilities: (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices.
        num_bins: bins of the ECE.

    Returns:
        ``accuracy``, ``ece``, ``nll``, ``brier``, ``num_examples``.

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    check_targets("log_probabilities", log_probabilities, targets)
    targets = targets.to(log_probabilities.device, torch.long)
    log_probabilities = log_probabilities.double()
    if (log_probabilities > 1e-3).any():
        raise ValueError(
            f"log_probabilities must not be above 0, got {log_probabilities.max().item():.4g}; "
            "if these are probabilities, pass their logarithm"
        )
    probabilities = log_probabilities.exp()
    truth = torch.nn.functional.one_hot(targets, probabilities.shape[1])
    bins = reliability(probabilities, targets, num_bins)
    nll = -log_probabilities.gather(1, targets[:, None]).mean()
    return {
        "accuracy": (probabilities.argmax(-1) == targets).double().mean().item(),
        "ece": bins.ece,
        "nll": nll.item() + 0.0,  # no -0.0
        "brier": (probabilities - truth).square().sum(-1).mean().item(),
        "num_examples": len(targets),
    }


def ood_metrics(inside: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> dict[str, float]:
    """Area under the ROC curve for telling out-of-scope inputs (positive) from those in scope.

    Args:
        inside: scores of inputs in scope by name, each (n,): higher means less certain, but for
            ``confidence``, of which 1 - confidence is the score.
        outside: the same of inputs out of scope, each (m,).

    Returns:
        ``auroc_<name>`` for each score; 0.5 where all scores are equal (a plain LoRA's mutual information).

    Raises:
        ValueError: names differ, or a side's scores are empty, not (n,), or NaN.
    """
    # here, because torchmetrics takes a second to import
    from torchmetrics.functional.classification import binary_auroc

    if inside.keys() != outside.keys():
        raise ValueError(f"scores differ: {sorted(inside)} in scope, {sorted(outside)} out of scope")
    result = {}
    for name in inside:
        for where, side in (("in", inside[name]), ("out of", outside[name])):
            _check_scores(f"{name} {where} scope", side)
        scores = torch.cat([inside[name], outside[name]]).double()
        labels = (torch.arange(len(scores)) >= len(inside[name])).long().to(scores.device)
        # ranks, because torchmetrics would squash scores beyond [0, 1]
        ranks = scores.unique(return_inverse=True)[1].double()
        ranks = ranks / ranks.max().clamp_min(1)
        result[f"auroc_{name}"] = binary_auroc(1 - ranks if name == "confidence" else ranks, labels).item()
    return result


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name}: AUROC needs scores (n,) with n > 0, got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{name}: score {scores.isnan().nonzero()[0].item()} is NaN")

"""Telling inputs in scope from those out of it by how uncertain the model is."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import check_scores


def ood_metrics(inside: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> dict[str, float]:
    """How well scores tell out-of-scope inputs (positive) from those in scope.

    - ``auroc_<name>``: area under the ROC curve; 0.5 where all scores are equal (a plain LoRA's mutual information);
    - ``fpr95_<name>``: share of in-scope inputs that are flagged by the highest threshold that flags 95 % of the
      out-of-scope ones (Hendrycks et al., arXiv 1812.04606), less is better; an input whose score equals the threshold
      is flagged, so 1 where all scores are equal.

    Args:
        inside: scores of inputs in scope by name, each (n,): higher means less certain, but for
            ``confidence``, of which 1 - confidence is the score.
        outside: the same of inputs out of scope, each (m,).

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
            check_scores(f"{name} {where} scope", side)
        scores = torch.cat([inside[name], outside[name]]).double()
        scores = -scores if name == "confidence" else scores
        # ranks, because torchmetrics would squash scores beyond [0, 1]
        ranks = scores.unique(return_inverse=True)[1].double()
        ranks = ranks / ranks.max().clamp_min(1)
        num_inside = len(inside[name])
        labels = (torch.arange(len(ranks)) >= num_inside).long().to(ranks.device)
        result[f"auroc_{name}"] = binary_auroc(ranks, labels).item()
        result[f"fpr95_{name}"] = _fpr95(ranks[:num_inside], ranks[num_inside:])
    return result


def _fpr95(inside: Tensor, outside: Tensor) -> float:
    flagged = -(-95 * len(outside) // 100)  # 95 %, rounded up
    threshold = outside.sort(descending=True).values[flagged - 1]
    return (inside >= threshold).double().mean().item()

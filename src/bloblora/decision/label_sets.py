r"""Sets of labels that hold the right one with a stated probability: split conformal prediction.

Each label y of an input has a score that is small where y is plausible. The set is every label whose score is at most
the ⌈(n + 1) · coverage⌉-th smallest score of the right labels of n calibration records. With p the probabilities and
ranks counted from the most probable label, the score is

- ``lac``: :math:`1 - p_y`, for the smallest sets on average (Sadinle, Lei & Wasserman 2019, arXiv 1609.00451);
- ``aps``: the probability of y and of all labels before it, for sets that grow where the model is less sure (Romano,
  Sesia & Candès 2020, arXiv 2006.02544);
- ``raps``: the same and a penalty for each rank beyond the first few, against a long tail of improbable labels
  (Angelopoulos et al. 2021, arXiv 2009.14193).

No score is randomized, so that an input has one set; and a set that would be empty gets the most probable label.
Neither can lower the coverage.

The code is our own because no library fits: MAPIE wants a scikit-learn classifier instead of probabilities, randomizes
APS and RAPS when it calibrates, and keeps nothing that JSON could hold; torchcp is LGPL and needs torch_geometric;
puncc needs numpy 1; crepes leaves the scores to its caller, and they are most of what is here.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..evaluation.checks import check_rows, check_targets
from .quantile import check_enough, check_share, conformal_quantile, quantile_bound

Kind = Literal["lac", "aps", "raps"]


@dataclass(frozen=True)
class LabelSets:
    """The labels whose score is at most a threshold.

    Attributes:
        kind: of score: ``lac``, ``aps`` or ``raps``.
        coverage: share of sets that hold the right label, as promised.
        threshold: of the score.
        num_examples: calibration records, n.
        penalty: of ``raps``, for each rank beyond ``free_ranks``.
        free_ranks: of ``raps``.
    """

    kind: Kind
    coverage: float
    threshold: float
    num_examples: int
    penalty: float
    free_ranks: int

    def sets(self, probabilities: Tensor) -> Tensor:
        """Which labels are in the set of each input, (n, C) bool; never one of probability 0.

        Args:
            probabilities: (n, C); 0 for a label that an input lacks.
        """
        probabilities = probabilities.double()
        inside = _scores(probabilities, self.kind, self.penalty, self.free_ranks) <= self.threshold
        return inside.scatter(1, probabilities.argmax(-1, keepdim=True), True)

    @property
    def promise(self) -> str:
        """What is promised, as a sentence."""
        low = quantile_bound(self.num_examples, self.coverage)
        return (
            f"at least {self.coverage:.4g} of the label sets hold the right label on average, and at least {low:.3g} "
            f"with probability 0.95, on data like the {self.num_examples} calibration records"
        )


def fit_label_sets(
    probabilities: Tensor,
    targets: Tensor,
    coverage: float = 0.9,
    kind: Kind = "lac",
    *,
    penalty: float = 0.01,
    free_ranks: int = 5,
) -> LabelSets:
    """The threshold of the scores that keeps the promise.

    Args:
        probabilities: (n, C), rows sum to 1; 0 for a label that an input lacks.
        targets: (n,), class indices.
        coverage: share of sets that hold the right label, in (0, 1).
        kind: of score.
        penalty: of ``raps``, for each rank beyond ``free_ranks``; choose neither on these records.
        free_ranks: of ``raps``.

    Raises:
        ValueError: records are too few, too many right labels have probability 0, or an argument, shapes, ranges or
            normalization are wrong.
    """
    check_coverage(len(targets), coverage)
    if kind not in get_args(Kind):
        raise ValueError(f"kind of label sets must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    check_targets("probabilities", probabilities, targets)
    probabilities, targets = probabilities.detach().cpu().double(), targets.cpu().long()
    check_rows("probabilities", probabilities)
    right = _scores(probabilities, kind, penalty, free_ranks).gather(1, targets[:, None])[:, 0]
    threshold = conformal_quantile(right, coverage)
    if threshold == torch.inf:
        share = right.isinf().double().mean().item()
        raise ValueError(f"coverage {coverage:.6g} can't be promised: {share:.4g} of right labels have probability 0")
    return LabelSets(kind, coverage, threshold, len(targets), penalty, free_ranks)


def check_coverage(n: int, coverage: float) -> None:
    """Raise a ValueError unless coverage is in (0, 1) and n records are enough for it."""
    check_share("coverage", coverage)
    check_enough(n, coverage, f"coverage {coverage:.6g}")


def _scores(probabilities: Tensor, kind: Kind, penalty: float, free_ranks: int) -> Tensor:
    """Scores of all labels, (n, C); infinite where the probability is 0."""
    if kind == "lac":
        scores = 1 - probabilities
    else:
        ranked, order = probabilities.sort(descending=True, stable=True)
        scores = ranked.cumsum(-1)
        if kind == "raps":
            ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
            scores += penalty * (ranks - free_ranks).clamp_min(0)
        scores = torch.empty_like(scores).scatter(1, order, scores)
    return scores.masked_fill(probabilities == 0, torch.inf)

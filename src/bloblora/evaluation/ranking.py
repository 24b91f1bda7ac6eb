"""What an uncertainty ranks: right answers before wrong ones, inputs in scope before those out of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import check_scores, tie_means


@dataclass(frozen=True)
class RiskCoverage:
    """Risk of the k most confident answers, k = 1..n.

    Attributes:
        risk: share of them that are wrong, (n,); among equally confident ones the mean over their orders.
    """

    risk: Tensor

    @property
    def coverage(self) -> Tensor:
        """Share of inputs that are answered, k/n, (n,)."""
        return torch.arange(1, len(self.risk) + 1, dtype=torch.float64) / len(self.risk)

    @property
    def aurc(self) -> float:
        """Area under the curve, the mean risk (Geifman, Uziel & El-Yaniv 2019, arXiv 1805.08206), in [0, 1].

        Less is better; 0 where no answer is wrong, the error rate where all confidences are equal.
        """
        return self.risk.mean().item()

    def accuracy(self, coverage: float) -> float:
        """Accuracy over the most confident share of inputs: the fewest that are at least ``coverage`` of all.

        Raises:
            ValueError: coverage is not in (0, 1].
        """
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage must be in (0, 1], got {coverage}")
        # the first k/n that reaches it, but for rounding
        k = int((self.coverage < coverage - 1e-9).sum())
        return 1 - self.risk[k].item()


def risk_coverage(confidence: Tensor, right: Tensor) -> RiskCoverage:
    """Risk-coverage curve of n answers (El-Yaniv & Wiener 2010, JMLR 11; Geifman & El-Yaniv, arXiv 1705.08500).

    Args:
        confidence: (n,), on any scale; higher is answered first (for an uncertainty, pass its negative).
        right: (n,) bool, whether the answer is right.

    Raises:
        ValueError: there is no answer, a confidence is NaN, or shapes or the dtype are wrong.
    """
    check_scores("confidence", confidence)
    if right.shape != confidence.shape or right.dtype != torch.bool:
        raise ValueError(
            f"right must be bool, {tuple(confidence.shape)} as confidence is, got {right.dtype}, {tuple(right.shape)}"
        )
    confidence, wrong = confidence.detach().cpu(), (~right.cpu()).double()
    wrong = tie_means(wrong, confidence)[confidence.argsort(descending=True)]
    return RiskCoverage(wrong.cumsum(0) / torch.arange(1, len(wrong) + 1))


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
    if inside.keys() != outside.keys():
        raise ValueError(f"scores differ: {sorted(inside)} in scope, {sorted(outside)} out of scope")
    result: dict[str, float] = {}
    for name in inside:
        sides = _scores(f"{name} in scope", inside[name]), _scores(f"{name} out of scope", outside[name])
        if name == "confidence":
            sides = -sides[0], -sides[1]
        result |= {f"auroc_{name}": _auroc(*sides), f"fpr95_{name}": _fpr95(*sides)}
    return result


def _scores(name: str, scores: Tensor) -> Tensor:
    check_scores(name, scores)
    return scores.detach().cpu().double()


def _auroc(inside: Tensor, outside: Tensor) -> float:
    """By the ranks of the out-of-scope scores, ties sharing theirs (Mann-Whitney U)."""
    from scipy.stats import rankdata  # here, because it takes half a second to import

    ranks = rankdata(torch.cat([outside, inside]))[: len(outside)]
    return float(ranks.mean() - (len(outside) + 1) / 2) / len(inside)


def _fpr95(inside: Tensor, outside: Tensor) -> float:
    flagged = -(-95 * len(outside) // 100)  # 95 %, rounded up
    threshold = outside.sort(descending=True).values[flagged - 1]
    return (inside >= threshold).double().mean().item()

"""Selective prediction: how often the answers are wrong when the least certain ones are withheld."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .bins import tie_means
from .checks import check_scores


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
        confidence: (n,), on any scale; higher is answered first (an uncertainty with a minus sign will do).
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

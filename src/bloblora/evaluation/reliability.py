"""Reliability: how often answers of a given confidence are right."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .bins import equal_width
from .checks import check_rows, check_targets


@dataclass(frozen=True)
class ReliabilityBins:
    """Equal-width bins of the top probability; an empty bin's means are NaN.

    Attributes:
        count: examples in each bin, (bins,).
        confidence: their mean top probability, (bins,).
        accuracy: share of them that are right, (bins,).
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def share(self) -> Tensor:
        """Share of all examples in each bin, (bins,)."""
        return self.count / self.count.sum()

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        return ((self.accuracy - self.confidence).abs() * self.share).nansum().item()


def reliability(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """Bin n predictions by confidence; bin b is ((b-1)/bins, b/bins].

    Args:
        probabilities: (n, C), rows sum to 1.
        targets: (n,), class indices.
        num_bins: equal-width bins on [0, 1].

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    check_targets("probabilities", probabilities, targets)
    probabilities, targets = probabilities.detach().cpu().double(), targets.cpu()
    check_rows("probabilities", probabilities)
    confidence, answer = probabilities.max(-1)
    confidence = confidence.clamp_max(1)
    return confidence_bins(confidence, answer == targets, num_bins)


def confidence_bins(confidence: Tensor, right: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """The same from each answer's confidence (n,), in [0, 1], and whether it is right, (n,)."""
    confidence, right = confidence.double(), right.double()
    index = equal_width(confidence, num_bins)
    zeros = torch.zeros(num_bins, dtype=torch.float64)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    return ReliabilityBins(
        count, zeros.index_add(0, index, confidence) / count, zeros.index_add(0, index, right) / count
    )

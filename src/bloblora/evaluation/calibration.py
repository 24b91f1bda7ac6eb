"""Calibration: reliability by bins of confidence, calibration errors, and the parts of the Brier score."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..prediction import Prediction
from .inputs import check_bins, checked, checked_probabilities, equal_width, group_means, tie_means


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
    probabilities, targets = checked_probabilities(probabilities, targets)
    confidence, answer = probabilities.max(-1)
    return confidence_bins(confidence.clamp_max(1), answer == targets, num_bins)


def confidence_bins(confidence: Tensor, right: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """The same from each answer's confidence (n,), in [0, 1], and whether it is right, (n,)."""
    confidence, right = confidence.double(), right.double()
    index = equal_width(confidence, num_bins)
    count, sure, correct = (index.bincount(w, num_bins) for w in (torch.ones_like(confidence), confidence, right))
    return ReliabilityBins(count, sure / count, correct / count)


def equal_mass_ece(predicted: Tensor | Prediction, targets: Tensor, num_bins: int = 15) -> float:
    """ECE over bins of equally many examples (adaptive ECE; Nixon et al., arXiv 1904.01685), in [0, 1].

    Among examples of equal confidence each counts as right by the share of them that is right, so it does not matter
    how a bin's edge separates them. With fewer examples than bins each has a bin of its own. Bin sizes differ by 1 at
    most; arguments and errors are those of `metrics`.
    """
    check_bins(num_bins)
    log_probabilities, targets = checked(predicted, targets)
    confidence, answer = log_probabilities.exp().max(-1)
    gap = confidence - tie_means((answer == targets).double(), confidence)
    by_rank = confidence.argsort().argsort() * num_bins // len(gap)
    return group_means(gap, by_rank).abs().mean().item()


def classwise_ece(predicted: Tensor | Prediction, targets: Tensor, num_bins: int = 15) -> float:
    r"""Mean over classes of the ECE of a class's probability (static calibration error), in [0, 1].

    :math:`\frac1C \sum_c \sum_b \frac{n_{bc}}{n_c} |\mathrm{freq}_{bc} - \bar p_{bc}|` over equal-width bins
    (Nixon et al., arXiv 1904.01685). An input without a class (-inf, unless it is the target) is no forecast of that
    class and left out of its n_c; a class that no input has is left out of C. Arguments and errors are those of
    `metrics`.
    """
    probability, outcome, label, bin = _forecasts(*checked(predicted, targets), num_bins)
    gap = group_means(probability - outcome, bin).abs()
    return (label.bincount(gap) / label.bincount()).nanmean().item()


def brier_parts(predicted: Tensor | Prediction, targets: Tensor, num_bins: int = 15) -> dict[str, float]:
    r"""The parts of the Brier score; each is at least 0, except the covariance.

    brier = uncertainty - resolution + reliability + within_bin_variance - within_bin_covariance, where with p a
    forecast, o its outcome (0 or 1), a bar for the mean of its bin, and :math:`\bar o_c` for that of its class

    - ``uncertainty`` :math:`\bar o_c (1 - \bar o_c)`: how hard the classes are to predict;
    - ``resolution`` :math:`(\bar o - \bar o_c)^2`: how far the bins separate outcomes, more is better;
    - ``reliability`` :math:`(\bar p - \bar o)^2`: the error of calibration, less is better;
    - ``within_bin_variance`` :math:`(p - \bar p)^2` and ``within_bin_covariance`` :math:`2 (o - \bar o)(p - \bar p)`:
      what bins hide; 0 where all forecasts of a bin are equal.

    Each is summed over classes and averaged over examples (Murphy 1973, J. Appl. Meteorol. 12, 595-600, for each
    class; the last two are of Stephenson et al. 2008, Weather and Forecasting 23, 752-757). Bins are those of
    `classwise_ece`, and as there an input without a class is no forecast of it. Arguments and errors are those of
    `metrics`.
    """
    p, o, label, bin = _forecasts(*checked(predicted, targets), num_bins)
    mean_p, mean_o, base = group_means(p, bin), group_means(o, bin), group_means(o, label)
    parts = {
        "uncertainty": base * (1 - base),
        "resolution": (mean_o - base).square(),
        "reliability": (mean_p - mean_o).square(),
        "within_bin_variance": (p - mean_p).square(),
        "within_bin_covariance": 2 * (o - mean_o) * (p - mean_p),
    }
    return {name: part.sum().item() / len(targets) for name, part in parts.items()}


def _forecasts(log_probabilities: Tensor, targets: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probability, outcome, class and bin (a bin is of one class) of every class of every input that has it, (m,)."""
    truth = one_hot(targets, log_probabilities.shape[1])
    has = log_probabilities.isfinite() | truth.bool()
    probability = log_probabilities.exp()[has]
    label = torch.arange(truth.shape[1]).expand_as(truth)[has]
    return probability, truth[has].double(), label, label * num_bins + equal_width(probability, num_bins)

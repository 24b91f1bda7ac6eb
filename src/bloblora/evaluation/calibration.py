"""Calibration: reliability by bins of confidence, calibration errors, and the parts of the Brier score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

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


def ece_floor(
    predicted: Tensor | Prediction, targets: Tensor, num_bins: int = 15, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """ECE that the same predictions would have if they were perfectly calibrated: ``mean`` and ``std``.

    Labels are resampled from the predicted probabilities, so that an answer is right with the probability that its
    confidence says (consistency resampling; Bröcker & Smith 2007, Weather and Forecasting 22, 651-661). An ECE near the
    mean shows no miscalibration. Arguments and errors are those of `metrics`.
    """
    confidence = checked(predicted, targets)[0].exp().amax(-1)
    return confidence_floor(confidence, num_bins, num_resamples=num_resamples, seed=seed)


def confidence_floor(
    confidence: Tensor, num_bins: int = 15, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """The same from each answer's confidence (n,), in [0, 1]."""
    confidence = confidence.double().sort().values  # so that the order has no effect
    inside = one_hot(equal_width(confidence, num_bins), num_bins).double()
    generator, found = torch.Generator().manual_seed(seed), []
    for chunk in torch.arange(num_resamples).split(max(1, 2**22 // len(confidence))):
        right = torch.rand(len(chunk), len(confidence), generator=generator, dtype=torch.float64) < confidence
        found.append(((confidence - right.double()) @ inside).abs().sum(-1) / len(confidence))
    values = torch.cat(found)
    return {"mean": values.mean().item(), "std": values.std(correction=0).item()}


@dataclass(frozen=True)
class BinGaps:
    r"""Confidence less accuracy in the bins that hold two examples or more, and their squared error without bias.

    The squared calibration error is the mean square of the bins' gaps, weighted by their numbers of examples n_b. The
    square of an observed gap is too large by the variance of the gap, of which s²/n_b is an unbiased estimate:

    .. math:: \mathrm{CE}^2 = \sum_b \frac{n_b}{\sum_b n_b} \Big(\bar d_b^2 - \frac{s_b^2}{n_b}\Big)

    with d an example's confidence less 1 if it is right. For a calibrated model this is 0 on average, so it is below 0
    half of the time (Bröcker 2012, Climate Dynamics 39, 655-667; Kumar, Liang & Ma 2019, arXiv 1909.10155, who take
    forecasts to be equal within a bin; with s² from the differences d as here, Sun et al. 2024, arXiv 2408.08998).

    Attributes:
        gap: d, (n,).
        inside: 1 where an example is in a bin, else 0, (n, k) for k bins.
    """

    gap: Tensor
    inside: Tensor

    @classmethod
    def of(cls, scores: Mapping[str, Tensor], num_bins: int = 15) -> BinGaps:
        """Of `example_scores`, in equal-width bins."""
        confidence = scores["confidence"].double()
        inside = one_hot(equal_width(confidence, num_bins), num_bins).double()
        return cls(confidence - scores["accuracy"].double(), inside[:, inside.sum(0) > 1])

    @cached_property
    def count(self) -> Tensor:
        """n_b, (k,)."""
        return self.inside.sum(0)

    @cached_property
    def mean(self) -> Tensor:
        """Mean of d in each bin, (k,)."""
        return self.gap @ self.inside / self.count

    @cached_property
    def noise(self) -> Tensor:
        """s²/n_b of each bin, (k,)."""
        squares = ((self.gap[:, None] - self.mean).square() * self.inside).sum(0)
        return squares / (self.count - 1) / self.count

    def squared_error(self) -> float:
        """CE², in [-1, 1]; 0 where no bin holds two examples."""
        return self._weighted(self.mean.square() - self.noise).item()

    def deviations(self, counts: Tensor) -> Tensor:
        """By how much CE² of resampled examples misses its own truth, (r,), for how often each is drawn, (r, n).

        Examples are drawn about bins whose squared gaps are the unbiased ones (0 where these are negative), because the
        observed gaps are too far apart to draw from. With the factor the variance of a drawn gap is ``noise``.
        """
        truth = (self.mean.square() - self.noise).clamp_min(0)
        moved = (counts @ (self.inside * self.gap[:, None]) - (counts @ self.inside) * self.mean) / self.count
        drawn = self.mean.sign() * truth.sqrt() + moved * (self.count / (self.count - 1)).sqrt()
        return self._weighted(drawn.square() - self.noise - truth)

    def _weighted(self, squares: Tensor) -> Tensor:
        return (squares * self.count / self.count.sum()).sum(-1)


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

"""Calibration beyond the ECE of equal-width bins: equal mass, every class, and the parts of the Brier score."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .bins import equal_mass, equal_width, group_means, tie_means
from .checks import checked


def equal_mass_ece(log_probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> float:
    """ECE over bins of equally many examples (adaptive ECE; Nixon et al., arXiv 1904.01685), in [0, 1].

    Among examples of equal confidence each counts as right by their share that is right, so that it doesn't matter
    how a bin's edge parts them. With fewer examples than bins each has a bin of its own.

    Args:
        log_probabilities: (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices.
        num_bins: bins of n / num_bins examples; their sizes differ by 1 at most.

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    log_probabilities, targets = checked(log_probabilities, targets)
    confidence, answer = log_probabilities.exp().max(-1)
    gap = confidence - tie_means((answer == targets).double(), confidence)
    return group_means(gap, equal_mass(confidence, num_bins)).abs().mean().item()


def classwise_ece(log_probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> float:
    r"""Mean over classes of the ECE of a class's probability (static calibration error), in [0, 1].

    :math:`\frac1C \sum_c \sum_b \frac{n_{bc}}{n_c} |\mathrm{freq}_{bc} - \bar p_{bc}|` over equal-width bins
    (Nixon et al., arXiv 1904.01685). An input without a class (-inf, unless it is the target) is no forecast of that
    class and left out of its n_c; a class that no input has is left out of C.

    Args:
        log_probabilities: (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices.
        num_bins: equal-width bins on [0, 1].

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    probability, outcome, label, bin = _forecasts(*checked(log_probabilities, targets), num_bins)
    gap = group_means(probability - outcome, bin).abs()
    return (label.bincount(gap) / label.bincount()).nanmean().item()


def brier_parts(log_probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> dict[str, float]:
    r"""What the Brier score is made of; each part is at least 0, but for the covariance.

    brier = uncertainty - resolution + reliability + within_bin_variance - within_bin_covariance, where with p a
    forecast, o its outcome (0 or 1), a bar for the mean of its bin, and :math:`\bar o_c` for that of its class

    - ``uncertainty`` :math:`\bar o_c (1 - \bar o_c)`: how hard the classes are to foresee;
    - ``resolution`` :math:`(\bar o - \bar o_c)^2`: how far the bins tell outcomes apart, more is better;
    - ``reliability`` :math:`(\bar p - \bar o)^2`: the error of calibration, less is better;
    - ``within_bin_variance`` :math:`(p - \bar p)^2` and ``within_bin_covariance`` :math:`2 (o - \bar o)(p - \bar p)`:
      what bins hide; 0 where all forecasts of a bin are equal.

    Each is summed over classes and averaged over examples (Murphy 1973, J. Appl. Meteorol. 12, 595-600, for each
    class; the last two are of Stephenson et al. 2008, Weather and Forecasting 23, 752-757). Bins are those of
    `classwise_ece`, and as there an input without a class is no forecast of it.

    Args:
        log_probabilities: (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices.
        num_bins: equal-width bins on [0, 1].

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    p, o, label, bin = _forecasts(*checked(log_probabilities, targets), num_bins)
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

"""Everything that is measured of one prediction."""

from typing import TYPE_CHECKING

from torch import Tensor

from .calibration import brier_parts, classwise_ece, equal_mass_ece
from .metrics import metrics
from .ood import ood_metrics
from .selective import risk_coverage

if TYPE_CHECKING:
    from ..prediction import Prediction

COVERAGES = (0.5, 0.8, 0.9, 0.95)
UNCERTAINTIES = ("confidence", "predictive_entropy", "mutual_information")
"""What tells inputs out of scope from others: names of a `Prediction`'s properties."""


def summary(
    inside: "Prediction", targets: Tensor, outside: "Prediction | None" = None, num_bins: int = 15
) -> dict[str, float | int]:
    """All metrics of a prediction of n inputs, and with ``outside`` how well it tells inputs out of scope.

    None is NaN, whatever the prediction; only ``nll`` may be infinite. Selective prediction is by confidence.

    Args:
        inside: of inputs in scope.
        targets: (n,), class indices.
        outside: of inputs out of scope.
        num_bins: bins of calibration errors and of the Brier score's parts.

    Returns:
        ``accuracy``, ``ece``, ``nll``, ``brier``, ``num_examples`` (`metrics`), ``num_samples``,
        ``num_draws`` (of a point there is one, whatever N), ``ece_equal_mass``,
        ``ece_classwise``, ``brier_<part>`` (`brier_parts`), ``aurc``, ``selective_accuracy_<50, 80, 90, 95>``; with
        ``outside`` ``auroc_<score>`` and ``fpr95_<score>`` (`ood_metrics`) of confidence, predictive_entropy and
        mutual_information.

    Raises:
        ValueError: there is no input, or targets are none of the prediction's columns.
    """
    predicted = inside.log_probabilities, targets, num_bins
    result = metrics(*predicted) | {
        "num_samples": inside.num_samples,
        "num_draws": len(inside.log_probs),
        "ece_equal_mass": equal_mass_ece(*predicted),
        "ece_classwise": classwise_ece(*predicted),
        **{f"brier_{name}": part for name, part in brier_parts(*predicted).items()},
    }
    curve = risk_coverage(inside.confidence, inside.labels == targets.to(inside.labels.device))
    result["aurc"] = curve.aurc
    result |= {f"selective_accuracy_{share * 100:.0f}": curve.accuracy(share) for share in COVERAGES}
    if outside is not None:
        result |= ood_metrics(uncertainty(inside), uncertainty(outside))
    return result


def uncertainty(prediction: "Prediction") -> dict[str, Tensor]:
    """``confidence``, ``predictive_entropy`` and ``mutual_information`` of each input, (n,)."""
    return {name: getattr(prediction, name) for name in UNCERTAINTIES}

"""Out of scope or not, with a stated rate of false alarms: a conformal test of how uncertain the model is.

An input is flagged where its score is above the ⌈(n + 1)(1 - α)⌉-th smallest of n calibration records in scope. That is
where its conformal p-value, (1 + number of calibration scores at least as large) / (n + 1), is at most α (Bates et al.
2023, arXiv 2104.08279).
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..evaluation.checks import check_scores
from .quantile import check_enough, check_share, conformal_quantile, quantile_bound

Score = Literal["mutual_information", "predictive_entropy"]


@dataclass(frozen=True)
class Scope:
    """Flag an input where a score is above a threshold.

    Attributes:
        score: name of the uncertainty, a property of `Prediction`.
        false_alarm: share of inputs in scope that are flagged, as promised.
        threshold: of the score, nats.
        num_examples: calibration records, n.
    """

    score: Score
    false_alarm: float
    threshold: float
    num_examples: int

    def flags(self, scores: Tensor) -> Tensor:
        """Whether inputs are out of scope, (n,) bool, for scores (n,)."""
        return scores.double() > self.threshold

    @property
    def promise(self) -> str:
        """What is promised, as a sentence."""
        high = 1 - quantile_bound(self.num_examples, 1 - self.false_alarm)
        return (
            f"at most {self.false_alarm:.4g} of inputs in scope are flagged on average, and at most {high:.3g} with "
            f"probability 0.95, on data like the {self.num_examples} calibration records"
        )


def fit_scope(scores: Tensor, false_alarm: float = 0.05, score: Score = "predictive_entropy") -> Scope:
    """The threshold that keeps the promise.

    Args:
        scores: of inputs in scope, (n,); higher means less certain.
        false_alarm: share of inputs in scope that are flagged, in (0, 1).
        score: name of the scores.

    Raises:
        ValueError: records are too few, or an argument or shapes are wrong.
    """
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {score!r}")
    check_scores(score, scores)
    check_false_alarm(len(scores), false_alarm)
    threshold = conformal_quantile(scores.detach().cpu().double(), 1 - false_alarm)
    return Scope(score, false_alarm, threshold, len(scores))


def check_false_alarm(n: int, false_alarm: float) -> None:
    """Raise a ValueError unless false_alarm is in (0, 1) and n records are enough for it."""
    check_share("false_alarm", false_alarm)
    check_enough(n, 1 - false_alarm, f"false_alarm {false_alarm:.6g}")

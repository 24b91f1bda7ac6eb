"""The three rules together, on predictions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..prediction import Prediction
from .answering import Answering, check_answering, fit_answering
from .conformal import Kind, LabelSets, Scope, Score, check_enough, fit_label_sets, fit_scope


@dataclass(frozen=True)
class Decided:
    """What was decided on n inputs.

    Attributes:
        answers: whether to answer, (n,) bool.
        label_sets: which labels are in the set, (n, C) bool.
        out_of_scope: whether it is flagged, (n,) bool.
    """

    answers: Tensor
    label_sets: Tensor
    out_of_scope: Tensor


@dataclass(frozen=True)
class Decision:
    """When to answer, which labels to name, what to call out of scope. Each promise holds by itself."""

    answering: Answering
    label_sets: LabelSets
    scope: Scope

    def decide(self, prediction: Prediction) -> Decided:
        """Decide on n inputs, from the probabilities averaged over the draws."""
        return Decided(
            self.answering.answers(prediction.confidence),
            self.label_sets.sets(prediction.probabilities),
            self.scope.flags(getattr(prediction, self.scope.score)),
        )

    @property
    def promises(self) -> dict[str, str]:
        """What each rule promises, as a sentence."""
        return {name: getattr(self, name).promise for name in _RULES}

    def realized(self, inside: Prediction, targets: Tensor, outside: Prediction | None = None) -> dict[str, float]:
        """What became of the promises.

        Args:
            inside: of inputs in scope.
            targets: (n,), class indices.
            outside: of inputs out of scope.

        Returns:
            ``answered`` (share), ``selective_risk`` (share of errors among them, 0 where none is answered),
            ``set_coverage``, ``set_size`` (mean number of labels), ``false_alarm``, and with ``outside`` ``detection``.
        """
        decided, targets = self.decide(inside), targets.to(inside.labels.device)
        wrong = decided.answers & (inside.labels != targets)
        result = {
            "answered": _share(decided.answers),
            "selective_risk": int(wrong.sum()) / max(1, int(decided.answers.sum())),
            "set_coverage": _share(decided.label_sets.gather(1, targets[:, None])),
            "set_size": decided.label_sets.sum(-1).double().mean().item(),
            "false_alarm": _share(decided.out_of_scope),
        }
        return result if outside is None else result | {"detection": _share(self.decide(outside).out_of_scope)}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Decision":
        """What `to_dict` gave, now or before a field with a default was added.

        Raises:
            KeyError, TypeError: a rule or a field is missing, or unknown.
            ValueError: a value is out of its range.
        """
        return cls(**{name: kind(**content[name]) for name, kind in _RULES.items()})


def fit_decision(
    prediction: Prediction,
    targets: Tensor,
    *,
    risk: float = 0.05,
    level: float = 0.95,
    coverage: float = 0.9,
    kind: Kind = "lac",
    false_alarm: float = 0.05,
    score: Score = "predictive_entropy",
) -> Decision:
    """Fit all three rules on labelled records that were used for nothing else.

    Args:
        prediction: of n inputs in scope.
        targets: (n,), class indices.
        risk: largest share of errors among the answers.
        level: probability that the share is no larger.
        coverage: share of label sets that hold the right label.
        kind: of label sets.
        false_alarm: share of inputs in scope that are flagged as out of it.
        score: what flags them; mutual information needs several draws.

    Raises:
        ValueError: a promise can't be made on these data, or an argument is out of its range.
    """
    if score == "mutual_information" and len(prediction.log_probs) == 1:
        raise ValueError("score mutual_information is not defined for a single draw; take predictive_entropy")
    probabilities = prediction.probabilities
    return Decision(
        fit_answering(probabilities, targets, risk, level),
        fit_label_sets(probabilities, targets, coverage, kind),
        fit_scope(getattr(prediction, score), false_alarm, score),
    )


def check_promises(
    n: int, *, risk: float = 0.05, level: float = 0.95, coverage: float = 0.9, false_alarm: float = 0.05
) -> None:
    """Raise a ValueError where these are out of range, or n records too few for them, whatever the predictions."""
    check_answering(n, risk, level)
    check_enough(n, "coverage", coverage, coverage)
    check_enough(n, "false_alarm", false_alarm, 1 - false_alarm)


def _share(which: Tensor) -> float:
    return which.double().mean().item()


_RULES: dict[str, Any] = {"answering": Answering, "label_sets": LabelSets, "scope": Scope}

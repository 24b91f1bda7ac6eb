"""The rules together, on predictions or on texts."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor

from ..files import check_fields
from ..messages import quoted
from ..prediction import DISTANCES, MultiLabelPrediction, Prediction, TagsPrediction, ValuePrediction
from ..prediction.kinds import CLASSES, covered
from .answering import Answering, check_answering, fit_answering, fit_answering_by
from .conformal import (
    AnswerSets,
    Intervals,
    Kind,
    LabelSets,
    LabelThresholds,
    PromiseError,
    Scope,
    Score,
    TagSets,
    check_enough,
    fit_answer_sets,
    fit_intervals,
    fit_label_sets,
    fit_label_thresholds,
    fit_scope,
    fit_tag_sets,
)


@dataclass(frozen=True)
class Decided:
    """What was decided on n inputs; None of a rule that isn't there.

    Attributes:
        answers: whether to answer, (n,) bool.
        label_sets: which labels are in the set, (n, C) bool.
        out_of_scope: whether it is flagged, (n,) bool.
        intervals: of a value, (n, 2).
        named: which of several labels are, (n, L) bool.
        tag_sets: which tags are in the set of each token, (n, T, K) bool.
    """

    answers: Tensor | None = None
    label_sets: Tensor | None = None
    out_of_scope: Tensor | None = None
    intervals: Tensor | None = None
    named: Tensor | None = None
    tag_sets: Tensor | None = None


@dataclass(frozen=True)
class Decision:
    """When to answer, which labels to name, what to call out of scope. Each promise holds by itself.

    Attributes:
        answering, label_sets, scope, answer_sets, intervals, label_thresholds, tag_sets: the rules; None of one that
            the calibration records carry no promise of. Texts have no label sets and no scope, labels no answer sets;
            values have intervals and scope, several labels at once thresholds and scope, tokens tag sets and scope.
        refused: why, by the rule's name.
    """

    answering: Answering | None = None
    label_sets: LabelSets | None = None
    scope: Scope | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    answer_sets: AnswerSets | None = None
    intervals: Intervals | None = None
    label_thresholds: LabelThresholds | None = None
    tag_sets: TagSets | None = None

    def __post_init__(self) -> None:
        if not self.promises:
            raise ValueError(f"a decision needs at least one of {', '.join(_RULES)}")

    def decide(self, prediction: Prediction) -> Decided:
        """Decide on n inputs, from what is averaged over the draws."""
        found: dict[str, Tensor] = {}
        if self.scope is not None:
            found["out_of_scope"] = self.scope.flags(prediction.score(self.scope.score))
        if self.answering is not None:
            found["answers"] = self.answering.answers(prediction.confidence)
        if self.label_sets is not None:
            found["label_sets"] = self.label_sets.sets(prediction.probabilities)
        if self.intervals is not None and isinstance(prediction, ValuePrediction):
            found["intervals"] = self.intervals.intervals(prediction.mean, prediction.std)
        if self.label_thresholds is not None:
            found["named"] = self.label_thresholds.named(prediction.probabilities)
        if self.tag_sets is not None:
            found["tag_sets"] = self.tag_sets.sets(prediction.probabilities)
        return Decided(**found)

    @property
    def promises(self) -> dict[str, str]:
        """What each rule promises, as a sentence."""
        return {name: rule.promise for name in _RULES if (rule := getattr(self, name)) is not None}

    def realized(self, inside: Prediction, targets: Tensor, outside: Prediction | None = None) -> dict[str, float]:
        """What became of the promises.

        Args:
            inside: of inputs in scope.
            targets: (n,), class indices, or values.
            outside: of inputs out of scope.

        Returns:
            Of the rules that are there: ``answered`` (share), ``selective_risk`` (share of errors among them, 0 where
            none is answered), ``set_coverage``, ``set_size`` (mean number of labels), ``false_alarm``, and with
            ``outside`` ``detection``; of values ``promised_coverage`` and ``promised_width`` (mean); of several
            labels ``named`` (labels an input), and where an input has one with a promise ``recall`` (mean over these)
            and ``least_recall``; of tokens ``set_coverage`` (share of records of which all sets hold the right tag) and
            ``set_size`` (tags a token).
        """
        decided = self.decide(inside)
        result: dict[str, float] = {}
        if (intervals := decided.intervals) is not None:
            width = intervals.diff().mean().item()
            result |= {"promised_coverage": _share(covered(intervals, targets)), "promised_width": width}
        if (named := decided.named) is not None:
            assert self.label_thresholds is not None
            has = targets.bool() & torch.tensor(self.label_thresholds.promised)
            recalls = (named & has).sum(0)[(any_ := has.any(0))] / has.sum(0)[any_]
            if len(recalls):
                result |= {"least_recall": recalls.min().item(), "recall": recalls.mean().item()}
            result["named"] = _per_input(named)
        if (answers := decided.answers) is not None:
            result |= _answered(answers, inside.labels == targets.to(inside.labels.device))
        if (sets := decided.label_sets) is not None:
            result["set_coverage"] = _share(sets.gather(1, targets[:, None].to(sets.device)))
            result["set_size"] = _per_input(sets)
        if (tag_sets := decided.tag_sets) is not None:
            there = targets >= 0
            held = tag_sets.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1) | ~there
            result |= {"set_coverage": _share(held.all(-1)), "set_size": _per_input(tag_sets[there])}
        if decided.out_of_scope is not None:
            result["false_alarm"] = _share(decided.out_of_scope)
        if outside is not None and (flagged := self.decide(outside).out_of_scope) is not None:
            result["detection"] = _share(flagged)
        return result

    def realized_by_texts(self, confidence: Tensor, right: Tensor, ranks: Tensor | None) -> dict[str, float]:
        """The same for texts, of which `fit_text_decision` takes these."""
        result = {} if self.answering is None else _answered(self.answering.answers(confidence), right)
        if self.answer_sets is not None and ranks is not None:
            result["set_coverage"] = _share(ranks <= self.answer_sets.threshold)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; no key of a rule that isn't there."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Decision":
        """What `to_dict` gave, now or before a field with a default was added.

        Raises:
            ValueError: a field is missing, unknown, of another type or out of its range, or no rule is there.
        """
        check_fields(content, cls, "decision", ValueError)
        rules = {name: kind(**content[name]) for name, kind in _RULES.items() if content.get(name) is not None}
        return cls(**rules, refused=content.get("refused", {}))


def fit_decision(
    prediction: Prediction,
    targets: Tensor,
    *,
    risk: float = 0.05,
    level: float = 0.95,
    coverage: float = 0.9,
    kind: Kind = "lac",
    false_alarm: float = 0.05,
    score: Score | None = None,
) -> Decision:
    """Fit the rules on labelled records that were used for nothing else; ``refused`` says which can't be.

    Of classes there are three; of values intervals and scope, of several labels at once thresholds and scope, of tokens
    tag sets and scope.

    Args:
        prediction: of n inputs in scope.
        targets: (n,), class indices, or values.
        risk: largest share of errors among the answers.
        level: probability that the share is no larger.
        coverage: share of label sets that hold the right label, of intervals that hold the right value, of the inputs
            that have a label for which it is named, or of the inputs of which all tokens' tag sets hold the right tag.
        kind: of label sets.
        false_alarm: share of inputs in scope that are flagged as out of it.
        score: what flags them, one of `Prediction.scores`; default `Prediction.usual_score`. The epistemic ones need
            several draws.

    Raises:
        PromiseError: these data carry none of the promises.
        ValueError: an argument is out of its range, or of a rule that such a prediction hasn't.
    """
    _check_used(type(prediction), risk, level, kind, score)
    name: Any = score or prediction.usual_score
    if name in ("mutual_information", "epistemic_std") and not prediction.knows_epistemic:
        raise ValueError(f"score {name} is not defined for a single draw; take {prediction.usual_score}")
    rules: dict[str, Callable[[], Any]] = {}
    if isinstance(prediction, ValuePrediction):
        rules["intervals"] = lambda: fit_intervals(prediction.mean, prediction.std, targets, coverage)
    elif isinstance(prediction, TagsPrediction):
        rules["tag_sets"] = lambda: fit_tag_sets(prediction.probabilities, targets, coverage)
    elif isinstance(prediction, MultiLabelPrediction):
        rules["label_thresholds"] = lambda: fit_label_thresholds(prediction.probabilities, targets, coverage)
    else:
        probabilities = prediction.probabilities
        rules["answering"] = lambda: fit_answering(probabilities, targets, risk, level)
        rules["label_sets"] = lambda: fit_label_sets(probabilities, targets, coverage, kind)
    rules["scope"] = lambda: fit_scope(prediction.score(name), false_alarm, name)
    return Decision(**_kept(rules))


def fit_text_decision(
    confidence: Tensor,
    right: Tensor,
    ranks: Tensor | None = None,
    *,
    score: str = "p_correct",
    risk: float = 0.05,
    level: float = 0.95,
    coverage: float = 0.9,
) -> Decision:
    """Fit the rules for texts, on labelled ones that were used for nothing else; ``refused`` says which can't be.

    Args:
        confidence: of n texts, (n,), see `fit_answering_by`.
        right: whether they are, (n,) bool.
        ranks: of the first right one among the answers to each prompt, (n,), see `fit_answer_sets`; None for texts that
            are given, which have no answer sets.
        score: name of the confidence.
        risk: largest share of wrong texts among those that aren't withheld.
        level: probability that the share is no larger.
        coverage: share of answer sets that hold a right answer.

    Raises:
        PromiseError: these data carry none of the promises.
        ValueError: an argument is out of its range.
    """
    rules: dict[str, Callable[[], Any]] = {"answering": lambda: fit_answering_by(confidence, right, risk, level, score)}
    if ranks is not None:
        rules["answer_sets"] = lambda: fit_answer_sets(ranks, coverage)
    return Decision(**_kept(rules))


def check_promises(
    n: int,
    *,
    predicted: type[Prediction] = Prediction,
    risk: float = 0.05,
    level: float = 0.95,
    coverage: float = 0.9,
    kind: Kind = "lac",
    false_alarm: float = 0.05,
    score: Score | None = None,
) -> None:
    """Raise a ValueError where these are out of range, or of a rule that the class ``predicted`` hasn't.

    A PromiseError where n records are too few for any of them. That is known before any prediction.
    """
    _check_used(predicted, risk, level, kind, score)
    rules: dict[str, Callable[[], Any]] = {
        "answering": lambda: check_answering(n, risk, level),
        "coverage": lambda: check_enough(n, "coverage", coverage, coverage),
        "scope": lambda: check_enough(n, "false_alarm", false_alarm, 1 - false_alarm),
    }
    if predicted.kind not in CLASSES:
        del rules["answering"]
    _kept(rules)


def _check_used(predicted: type[Prediction], risk: float, level: float, kind: Kind, score: Score | None) -> None:
    """Raise a ValueError for an option that such predictions don't use."""
    scores = [name for name in get_args(Score) if name in predicted.uncertainties or name in DISTANCES]
    if score is not None and score not in scores:
        raise ValueError(f"score {quoted(score)}: of a {predicted.kind} prediction it is one of {', '.join(scores)}")
    if predicted.kind not in CLASSES and changed(risk=risk, level=level, kind=kind):
        raise ValueError(
            "risk, confidence and label_sets are for classes that exclude each other, which a "
            f"{predicted.kind} prediction hasn't: leave them out"
        )


def changed(**promises: Any) -> list[str]:
    """Names of those that aren't the defaults of `fit_decision`."""
    defaults = signature(fit_decision).parameters
    return [name for name, value in promises.items() if value != defaults[name].default]


def check_text_promises(n: int, *, risk: float, level: float, coverage: float, sets: bool) -> None:
    """The same for `fit_text_decision`, with or without answer ``sets``."""
    rules: dict[str, Callable[[], Any]] = {"answering": lambda: check_answering(n, risk, level)}
    if sets:
        rules["answer_sets"] = lambda: check_enough(n, "coverage", coverage, coverage)
    _kept(rules)


def _kept(rules: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What the rules' functions give, and ``refused``, why others can't be promised; a PromiseError where none can."""
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, rule in rules.items():
        try:
            found[name] = rule()
        except PromiseError as error:
            refused[name] = str(error)
    if not found:
        raise PromiseError("\n".join(refused.values()))
    return found | {"refused": refused}


def _answered(answers: Tensor, right: Tensor) -> dict[str, float]:
    wrong = answers & ~right
    return {"answered": _share(answers), "selective_risk": int(wrong.sum()) / max(1, int(answers.sum()))}


def _per_input(which: Tensor) -> float:
    return which.sum(-1).double().mean().item()


def _share(which: Tensor) -> float:
    return which.double().mean().item()


_RULES: dict[str, Any] = {
    "answering": Answering,
    "label_sets": LabelSets,
    "scope": Scope,
    "answer_sets": AnswerSets,
    "intervals": Intervals,
    "label_thresholds": LabelThresholds,
    "tag_sets": TagSets,
}

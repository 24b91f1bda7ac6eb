r"""Promises that rest on one order statistic (split conformal prediction): sets of labels, and what is out of scope.

Of n + 1 exchangeable scores the last is at most the k-th smallest of the others, k = ⌈(n + 1) · level⌉, with
probability ``level`` or more, and with less than ``level`` + 1/(n + 1) where no two are equal (Vovk, Gammerman & Shafer
2005, Algorithmic Learning in a Random World).

**Label sets** hold the right label with a stated probability. Each label y of an input has a score that is small where
y is plausible; the set is every label whose score is at most the k-th smallest score of the right labels of n
calibration records. With p the probabilities and ranks counted from the most probable label, the score is

- ``lac``: :math:`1 - p_y`, for the smallest sets on average (Sadinle, Lei & Wasserman 2019, arXiv 1609.00451);
- ``aps``: the probability of y and of all labels before it, for sets that grow where the model is less sure (Romano,
  Sesia & Candès 2020, arXiv 2006.02544);
- ``raps``: the same and a penalty for each rank beyond the first few, against a long tail of improbable labels
  (Angelopoulos et al. 2021, arXiv 2009.14193).

**Answer sets** are the first answers of a list that was sampled, as many as the k-th smallest of n calibration records
needs to hold a right one. Where a list holds none that number is infinite; so no coverage is promised above the share
of records, of n + 1, whose list holds one. It is the simplest case of Quach et al. 2023 (Conformal Language Modeling,
arXiv 2306.10193), whose rules also say when to stop the sampling.

No score is randomized, so that an input has one set; and a set that would be empty gets the most probable label.
Neither can lower the coverage.

**Intervals** hold the right value with a stated probability: the mean ± c·std of the prediction, with c the k-th
smallest |y − mean| / std of n calibration records (split conformal prediction with normalized residuals, Lei et al.
2018, arXiv 1604.04173). They are as wide as the model is uncertain, and c corrects how wide that is.

**Several labels at once** have a threshold each: a label is named where its probability is at least that, which is one
minus the k-th smallest 1 - p of the n calibration records that have the label. Given that an input has it, it is
exchangeable with those, so that the label is named with the stated probability: its recall is promised.

**Tag sets** hold for each token the tags whose probability is at least one minus the k-th smallest score of n
calibration records, the score of a record being the largest 1 - p of its tokens' right tags. Tokens of one text depend
on each other, so it is records that are exchangeable, and the promise is of all tokens of a record together.

**Scope**: an input is flagged as out of scope where its uncertainty is above the k-th smallest of n calibration records
in scope, with level 1 - α. That is where its conformal p-value, (1 + number of calibration scores at least as large) /
(n + 1), is at most α (Bates et al. 2023, arXiv 2104.08279), so α is the rate of false alarms.

No library fits: MAPIE wants a scikit-learn classifier, randomizes APS and RAPS, and keeps nothing that JSON could hold;
torchcp is LGPL and needs torch_geometric; puncc needs numpy 1; crepes leaves the scores to its caller.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import scipy  # loads scipy.stats, half a second, where it is used
import torch
from torch import Tensor

from ..checks import check_choice
from ..evaluation.inputs import check_scores, checked_probabilities
from ..files import is_finite
from ..messages import quoted


class PromiseError(ValueError):
    """These records carry no such promise; the message says what they do carry, or how many are needed."""


Kind = Literal["lac", "aps", "raps"]
Score = Literal[
    "predictive_entropy", "mutual_information", "std", "epistemic_std", "mahalanobis", "relative_mahalanobis"
]


@dataclass(frozen=True)
class _Covering:
    """A rule that at least a share of the inputs is covered by.

    Attributes:
        covers: what is promised of that share.
    """

    coverage: float
    threshold: float
    num_examples: int

    covers: ClassVar[str]

    def __post_init__(self) -> None:
        check_share("coverage", self.coverage)
        check_numbers(self, "num_examples")

    @property
    def promise(self) -> str:
        """What is promised, as a sentence."""
        low = _share_below(self.num_examples, self.coverage)
        return (
            f"at least {self.coverage:.4g} of the {self.covers} on average, and at least {low:.3g} with probability "
            f"0.95, on data like the {self.num_examples} calibration records"
        )


@dataclass(frozen=True)
class LabelSets(_Covering):
    """The labels whose score is at most a threshold.

    Attributes:
        coverage: share of sets that hold the right label, as promised.
        threshold: of the score.
        num_examples: calibration records, n.
        kind: of score: ``lac``, ``aps`` or ``raps``.
        penalty: of ``raps``, for each rank beyond ``free_ranks``.
        free_ranks: of ``raps``.
    """

    kind: Kind
    penalty: float = 0.01
    free_ranks: int = 5
    covers: ClassVar[str] = "label sets hold the right label"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind of label sets", self.kind, Kind)
        check_numbers(self, "penalty", "free_ranks")

    def sets(self, probabilities: Tensor) -> Tensor:
        """Which labels are in the set of each input, (n, C) bool, for probabilities (n, C); never one of 0."""
        probabilities = probabilities.double()
        inside = _scores(probabilities, self.kind, self.penalty, self.free_ranks) <= self.threshold
        return inside.scatter(1, probabilities.argmax(-1, keepdim=True), True)


@dataclass(frozen=True)
class Intervals(_Covering):
    """Values no further from the predictive mean than a number of predictive standard deviations.

    Attributes:
        coverage: share of intervals that hold the right value, as promised.
        threshold: that number.
        num_examples: calibration records, n.
    """

    covers: ClassVar[str] = "intervals hold the right value"

    def intervals(self, mean: Tensor, std: Tensor) -> Tensor:
        """The two ends of each interval, (n, 2), for predictive means and standard deviations (n,)."""
        return torch.stack([mean - self.threshold * std, mean + self.threshold * std], dim=-1)


@dataclass(frozen=True)
class LabelThresholds:
    """Which of several labels are named: those whose probability is at least a threshold.

    Attributes:
        coverage: of the inputs that have a label, the share for which it is named, as promised.
        thresholds: of each label's probability; 0.5 where there is no promise.
        num_examples: calibration records that have each label; too few carry no promise.
    """

    coverage: float
    thresholds: list[float]
    num_examples: list[int]

    def __post_init__(self) -> None:
        check_share("coverage", self.coverage)
        if len(self.thresholds) != len(self.num_examples) or not all(0 <= value <= 1 for value in self.thresholds):
            raise ValueError(f"thresholds must be in [0, 1], one a label, got {quoted(self.thresholds)}")

    @property
    def promised(self) -> list[bool]:
        """Whether the promise is made of each label."""
        return [_rank(n, self.coverage) <= n for n in self.num_examples]

    def named(self, probabilities: Tensor) -> Tensor:
        """Which labels are named, (n, L) bool, for probabilities (n, L)."""
        return probabilities.double() >= torch.tensor(self.thresholds, dtype=torch.float64)

    @property
    def promise(self) -> str:
        """What is promised, as a sentence."""
        of = [n for n, promised in zip(self.num_examples, self.promised, strict=True) if promised]
        low = min(_share_below(n, self.coverage) for n in of)
        return (
            f"of the inputs that have a label it is named for at least {self.coverage:.4g} on average, and at least "
            f"{low:.3g} with probability 0.95 of a label; so for {len(of)} of {len(self.thresholds)} labels, which "
            f"{min(of)} or more of the calibration records have, on data like these"
        )


@dataclass(frozen=True)
class TagSets(_Covering):
    """For each token the tags whose probability is at least a threshold.

    Attributes:
        coverage: share of the records of which the sets of all tokens hold the right tags, as promised.
        threshold: of the probability.
        num_examples: calibration records, n.
    """

    covers: ClassVar[str] = "records have the right tag of every token in its tag set"

    def sets(self, probabilities: Tensor) -> Tensor:
        """Which tags are in the set of each token, (n, T, K) bool, for probabilities (n, T, K)."""
        inside = probabilities.double() >= self.threshold
        return inside.scatter(-1, probabilities.argmax(-1, keepdim=True), True)


@dataclass(frozen=True)
class AnswerSets(_Covering):
    """The first answers of a list.

    Attributes:
        coverage: share of sets that hold a right answer, as promised.
        threshold: how many answers are in a set, where the list has as many.
        num_examples: calibration records, n.
    """

    threshold: int
    covers: ClassVar[str] = "answer sets hold a right answer"


@dataclass(frozen=True)
class Scope:
    """Flag an input where a score is above a threshold.

    Attributes:
        score: name of the uncertainty or distance, one of `Prediction.scores`.
        false_alarm: share of inputs in scope that are flagged, as promised.
        threshold: of the score, nats, the units of the data, or a squared distance.
        num_examples: calibration records, n.
    """

    score: Score
    false_alarm: float
    threshold: float
    num_examples: int

    def __post_init__(self) -> None:
        check_choice("score", self.score, Score)
        check_share("false_alarm", self.false_alarm)
        check_numbers(self, "num_examples")

    def flags(self, scores: Tensor) -> Tensor:
        """Whether inputs are out of scope, (n,) bool, for scores (n,)."""
        return scores.double() > self.threshold

    @property
    def promise(self) -> str:
        """What is promised, as a sentence."""
        high = 1 - _share_below(self.num_examples, 1 - self.false_alarm)
        return (
            f"at most {self.false_alarm:.4g} of inputs in scope are flagged on average, and at most {high:.3g} with "
            f"probability 0.95, on data like the {self.num_examples} calibration records"
        )


def fit_label_sets(
    probabilities: Tensor,
    targets: Tensor,
    coverage: float = 0.9,
    kind: Kind = "lac",
    *,
    penalty: float = 0.01,
    free_ranks: int = 5,
) -> LabelSets:
    """The threshold of the scores that keeps the promise.

    Args:
        probabilities: (n, C), rows sum to 1; 0 for a label that an input lacks.
        targets: (n,), class indices.
        coverage: share of sets that hold the right label, in (0, 1).
        kind: of score.
        penalty: of ``raps``, for each rank beyond ``free_ranks``; choose neither on these records.
        free_ranks: of ``raps``.

    Raises:
        PromiseError: records are too few, or too many right labels have probability 0.
        ValueError: an argument, shapes, ranges or normalization are wrong.
    """
    check_enough(len(targets), "coverage", coverage, coverage)
    probabilities, targets = checked_probabilities(probabilities, targets)
    right = _scores(probabilities, kind, penalty, free_ranks).gather(1, targets[:, None])[:, 0]
    threshold = _quantile(right, coverage)
    if threshold == torch.inf:
        share = right.isinf().double().mean().item()
        raise PromiseError(f"coverage {coverage:.6g} can't be promised: {share:.4g} of right labels have probability 0")
    return LabelSets(coverage, threshold, len(targets), kind, penalty, free_ranks)


def fit_intervals(mean: Tensor, std: Tensor, targets: Tensor, coverage: float = 0.9) -> Intervals:
    """The width that keeps the promise.

    Args:
        mean: predictive means, (n,).
        std: predictive standard deviations, (n,), above 0.
        targets: the right values, (n,).
        coverage: share of intervals that hold the right value, in (0, 1).

    Raises:
        PromiseError: records are too few.
        ValueError: an argument or shapes are wrong.
    """
    if not (mean.shape == std.shape == targets.shape and mean.ndim == 1):
        shapes = ", ".join(str(tuple(part.shape)) for part in (mean, std, targets))
        raise ValueError(f"mean, std and targets must be (n,), got {shapes}")
    check_enough(len(targets), "coverage", coverage, coverage)
    scores = (targets.double() - mean.double()).abs() / std.double()
    check_scores("|target - mean| / std", scores)
    return Intervals(coverage, _quantile(scores, coverage), len(targets))


def fit_label_thresholds(probabilities: Tensor, targets: Tensor, coverage: float = 0.9) -> LabelThresholds:
    """The thresholds that keep the promise.

    Args:
        probabilities: (n, L).
        targets: whether inputs have each label, (n, L).
        coverage: of the inputs that have a label, the share for which it is named, in (0, 1).

    Raises:
        PromiseError: of each label records are too few.
        ValueError: an argument or shapes are wrong.
    """
    check_share("coverage", coverage)
    if probabilities.shape != targets.shape or probabilities.ndim != 2:
        shapes = f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"probabilities and targets must be (n, L), got {shapes}")
    counts = targets.bool().sum(0).tolist()
    check_enough(max(counts), "coverage", coverage, coverage)
    thresholds = [0.5] * len(counts)
    for label, count in enumerate(counts):
        if _rank(count, coverage) <= count:
            thresholds[label] = -_quantile(-probabilities[targets[:, label].bool(), label].double(), coverage)
    return LabelThresholds(coverage, thresholds, counts)


def fit_tag_sets(probabilities: Tensor, targets: Tensor, coverage: float = 0.9) -> TagSets:
    """The threshold that keeps the promise.

    Args:
        probabilities: (n, T, K).
        targets: the right tags, (n, T); negative where a record has no more tokens.
        coverage: share of the records of which all sets hold the right tags, in (0, 1).

    Raises:
        PromiseError: records are too few.
        ValueError: an argument or shapes are wrong.
    """
    if probabilities.ndim != 3 or targets.shape != probabilities.shape[:2]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"probabilities must be (n, T, K) and targets (n, T), got {shapes}")
    check_enough(len(targets), "coverage", coverage, coverage)
    right = probabilities.double().gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    least = right.masked_fill(targets < 0, 1).amin(-1)
    return TagSets(coverage, -_quantile(-least, coverage), len(targets))


def fit_answer_sets(ranks: Tensor, coverage: float = 0.9) -> AnswerSets:
    """The size of set that keeps the promise.

    Args:
        ranks: place of the first right answer in the list of each record, (n,), from 1; infinite where none is right.
        coverage: share of sets that hold a right answer, in (0, 1).

    Raises:
        PromiseError: records are too few, or too many lists hold no right answer: the message says which coverage could
            be promised.
        ValueError: an argument is wrong.
    """
    check_enough(n := len(ranks), "coverage", coverage, coverage)
    if not (ranks >= 1).all():
        raise ValueError("ranks must be 1 or more, infinite where no answer is right")
    threshold = _quantile(ranks.double(), coverage)
    if threshold == torch.inf:
        held = int(ranks.isfinite().sum())
        most = math.floor(1000 * held / (n + 1)) / 1000
        could = f"the most that could be is {most:.3f}" if most else "no coverage could be"
        raise PromiseError(
            f"coverage {coverage:.6g} can't be promised: for {n - held} of {n} records no answer is right; {could}"
        )
    return AnswerSets(coverage, int(threshold), n)


def fit_scope(scores: Tensor, false_alarm: float = 0.05, score: Score = "predictive_entropy") -> Scope:
    """The threshold that keeps the promise.

    Args:
        scores: of inputs in scope, (n,); higher means less certain.
        false_alarm: share of inputs in scope that are flagged, in (0, 1).
        score: name of the scores.

    Raises:
        PromiseError: records are too few.
        ValueError: an argument or shapes are wrong.
    """
    check_scores(score, scores)
    check_enough(len(scores), "false_alarm", false_alarm, 1 - false_alarm)
    threshold = _quantile(scores.detach().cpu().double(), 1 - false_alarm)
    return Scope(score, false_alarm, threshold, len(scores))


def check_enough(n: int, name: str, value: float, level: float) -> None:
    """Raise a ValueError unless a promised share is in (0, 1), a PromiseError where n records are too few for it."""
    check_share(name, value)
    if _rank(n, level) > n:
        needed = math.ceil(level / (1 - level) - _SLACK)
        raise PromiseError(f"{name} {value:.6g} needs at least {needed} records to calibrate on, got {n}")


def check_share(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is in (0, 1)."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")


def check_numbers(rule: object, *names: str) -> None:
    """Raise a ValueError unless the threshold and these attributes are finite numbers, these not below 0."""
    for name in ("threshold", *names):
        value = getattr(rule, name)
        if not is_finite(value) or (name in names and value < 0):
            raise ValueError(f"{name} must be a number{' of 0 or more' if name in names else ''}, got {quoted(value)}")


def _scores(probabilities: Tensor, kind: Kind, penalty: float, free_ranks: int) -> Tensor:
    """Scores of all labels, (n, C); infinite where the probability is 0."""
    if kind == "lac":
        scores = 1 - probabilities
    else:
        ranked, order = probabilities.sort(descending=True, stable=True)
        scores = ranked.cumsum(-1)
        if kind == "raps":
            ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
            scores += penalty * (ranks - free_ranks).clamp_min(0)
        scores = torch.empty_like(scores).scatter(1, order, scores)
    return scores.masked_fill(probabilities == 0, torch.inf)


def _quantile(scores: Tensor, level: float) -> float:
    """The k-th smallest of n scores (n,)."""
    return scores.sort().values[_rank(len(scores), level) - 1].item()


def _share_below(n: int, level: float) -> float:
    """Least share of new scores that are at most the quantile of n, with probability 0.95 over those n.

    The share is Beta(k, n + 1 - k) where no two scores are equal, and no smaller where some are (Vovk 2012, arXiv
    1209.2673).
    """
    k = _rank(n, level)
    return float(scipy.stats.beta.ppf(0.05, k, n + 1 - k))


def _rank(n: int, level: float) -> int:
    return math.ceil((n + 1) * level - _SLACK)


_SLACK = 1e-9  # 0.9 / (1 - 0.9) is a little more than 9

r"""The probability that a text is right: a map of its measures of uncertainty, fitted on texts that are labelled.

With c a confidence in (0, 1) that a score stands for, :math:`e^s` of a log-probability, :math:`e^{-s}` of an entropy or
a variance, and an agreement or P(True) as it is, the maps are

- ``platt``: :math:`\sigma(b + \sum_j w_j s_j)`, over one score or several (Platt 1999, Advances in Large Margin
  Classifiers), with the usual ridge penalty on standardized scores;
- ``beta``: :math:`\sigma(m + a \log c - b \log(1 - c))` with a, b ≥ 0 (Kull, Silva Filho & Flach 2017, AISTATS 54,
  623-631), fitted by logistic regression as in their package betacal;
- ``isotonic``: a non-decreasing step-wise linear function of log c (Zadrozny & Elkan 2002, KDD, 694-699), since c
  of a long text's log-probability is 0 in float64.

The map is the one with the lowest NLL under cross-validation. A map of n texts says nothing outside of
[1/(n + 2), (n + 1)/(n + 2)], Laplace's rule of succession for n of a kind, so that the NLL of a step to 0 is finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation import confidence_bins, confidence_floor, ood_metrics, risk_coverage
from ..messages import quoted

MAPS = ("platt", "beta", "isotonic")
SIGNS = {
    "log_probability": 1,
    "sequence_log_probability": 1,
    "mixture_log_probability": 1,
    "agreement": 0,
    "self_consistency": 0,
    "predictive_entropy": -1,
    "expected_entropy": -1,
    "mutual_information": -1,
    "log_probability_variance": -1,
    "draw_semantic_entropy": -1,
    "semantic_entropy": -1,
    "discrete_semantic_entropy": -1,
    "p_true": 0,
    "tokur_total": -1,
    "tokur_aleatoric": -1,
    "tokur_epistemic": -1,
}
"""The scores that a map can be of: 1 where log c = s, -1 where log c = -s, 0 where c = s."""
_ASKED_BY = {
    **dict.fromkeys(("agreement", "self_consistency", "draw_semantic_entropy"), "draws"),
    **dict.fromkeys(("semantic_entropy", "discrete_semantic_entropy"), "answers"),
    "p_true": "p_true",
}
"""The option of generation without which texts have no such score."""
_FOLDS = 5
_SMALLEST = 1e-6  # of c and 1 - c
_ROUNDING = 1e-6  # differences of scores that come from it


class CorrectnessError(ValueError):
    """Texts, or a file, of which there is no map; the message says what would be right."""


@dataclass(frozen=True)
class Correctness:
    """A map from scores to the probability that a text is right.

    Attributes:
        kind: one of `MAPS`.
        scores: the names of its scores.
        parameters: ``weights`` of the features and ``intercept``; or of isotonic ``log_confidence`` and
            ``probability``, the corners of the function.
        num_examples: texts that it was fitted on, n.
        num_right: of them, right.
        metrics: what the whole choice of a map is worth on texts that it has not seen, by `fit_correctness`.
    """

    kind: str
    scores: tuple[str, ...]
    parameters: dict[str, Any]
    num_examples: int
    num_right: int
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        if self.kind not in MAPS or not self.scores or any(name not in SIGNS for name in self.scores):
            raise CorrectnessError(f"correctness: no map {quoted(self.kind)} of {', '.join(map(str, self.scores))}")
        if not 0 < self.num_right < self.num_examples:
            raise CorrectnessError(f"num_right must be in 1..{self.num_examples - 1}, got {self.num_right}")
        if self.kind == "isotonic":
            x, y = (np.asarray(self.parameters[name], float) for name in ("log_confidence", "probability"))
            valid = x.ndim == 1 and x.shape == y.shape and x.size > 0 and bool(np.isfinite(x).all())
            valid = valid and bool((np.diff(x) > 0).all() and (np.diff(y) >= 0).all() and y[0] >= 0 and y[-1] <= 1)
        else:
            numbers = np.asarray([*self.parameters["weights"], self.parameters["intercept"]], float)
            features = 2 if self.kind == "beta" else len(self.scores)
            valid = numbers.shape == (features + 1,) and bool(np.isfinite(numbers).all())
        if not valid or (self.kind != "platt" and len(self.scores) != 1):
            raise CorrectnessError(f"parameters: {self.parameters} are not those of a map {quoted(self.kind)}")

    def probabilities(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The probability that each of n texts is right, (n,) float64.

        Args:
            scores: by name, each (n,), as `TokenScores.scores` gives them.

        Raises:
            CorrectnessError: one that it needs isn't there.
        """
        if missing := [name for name in self.scores if name not in scores]:
            options = sorted({_ASKED_BY[name] for name in missing if name in _ASKED_BY})
            advice = f"; ask for them with {' and '.join(options)}" if options else ""
            raise CorrectnessError(f"scores: the map to p_correct needs {', '.join(missing)}{advice}")
        columns = np.stack([scores[name].double().cpu().numpy() for name in self.scores])
        if self.kind == "isotonic":
            x = _log_confidence(self.scores[0], columns[0])
            found = np.interp(x, self.parameters["log_confidence"], self.parameters["probability"])
        else:
            features = _beta_features(self.scores[0], columns[0]) if self.kind == "beta" else columns.T
            logits = features @ np.asarray(self.parameters["weights"]) + self.parameters["intercept"]
            found = torch.from_numpy(logits).sigmoid().numpy()
        least = 1 / (self.num_examples + 2)
        return torch.from_numpy(np.clip(found, least, 1 - least))

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; `from_dict` reads it back."""
        return asdict(self) | {"scores": list(self.scores)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Correctness:
        """The map that `to_dict` described.

        Raises:
            CorrectnessError: it describes none.
        """
        try:
            return cls(**{**values, "scores": tuple(values["scores"])})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorrectnessError(f"not what this version of bloblora writes: {error}") from error


def fit_correctness(
    scores: Mapping[str, Tensor], right: Tensor, *, maps: Sequence[str] = MAPS, seed: int = 0
) -> Correctness:
    """The map with the lowest NLL in 5-fold cross-validation, fitted on all texts.

    Candidates are every map of every score that isn't constant, and ``platt`` over all of them.

    Args:
        scores: by name, each (n,), as `TokenScores.scores` gives them.
        right: (n,) bool.
        maps: to choose from.
        seed: of the folds.

    Returns:
        The map. Its metrics are of probabilities for texts outside of the folds that chose and fitted theirs (nested
        cross-validation): ``nll``, nats; ``brier``, the mean of (p - right)², in [0, 1]; ``ece`` and ``ece_floor``,
        over 15 bins of p; ``auroc`` of right texts against wrong ones; ``aurc``, and ``risk_80`` and ``risk_50``, the
        share of wrong texts among the 80 % and 50 % with the highest p.

    Raises:
        CorrectnessError: fewer than 5 texts are right, or wrong; scores are all constant, or unknown; or scikit-learn
            isn't there.
    """
    check_maps(maps)
    if unknown := sorted(set(scores) - set(SIGNS)):
        raise CorrectnessError(f"scores must be among {', '.join(SIGNS)}, got {', '.join(unknown)}")
    check_counts(int(right.sum()), len(right))
    columns = {name: values.double().cpu().numpy() for name, values in scores.items()}
    if broken := [name for name, values in columns.items() if not np.isfinite(values).all()]:
        raise CorrectnessError(f"scores: {', '.join(broken)} must be finite numbers")
    columns = {
        name: values for name, values in columns.items() if np.ptp(values) > _ROUNDING * max(1.0, np.abs(values).max())
    }
    if not columns:
        raise CorrectnessError(f"scores: all {len(right)} texts have the same, so that nothing tells right from wrong")
    outcomes = right.cpu().numpy().astype(bool)
    held_out = _held_out(columns, outcomes, seed, lambda c, o: _chosen(c, o, maps, seed))
    return _chosen(columns, outcomes, maps, seed, _metrics(torch.from_numpy(held_out), right.cpu().bool()))


def check_maps(maps: Sequence[str]) -> None:
    """Raise a CorrectnessError for maps that aren't among `MAPS`, or none."""
    wrong = [name for name in maps if name not in MAPS]
    if wrong or not maps:
        raise CorrectnessError(f"maps must be among {', '.join(MAPS)}, got {', '.join(wrong) or 'none'}")


def check_by(name: str, scores: Iterable[str]) -> None:
    """Raise a CorrectnessError unless texts that have these scores can be ranked by ``name``."""
    if name not in (known := ["p_correct", *(score for score in scores if score in SIGNS)]):
        raise CorrectnessError(f"by: must be one of {', '.join(known)}, got {name!r}")


def check_counts(num_right: int, num_examples: int) -> None:
    """Raise a CorrectnessError where too few texts are right, or wrong, for a map."""
    if min(num_right, num_wrong := num_examples - num_right) < _FOLDS:
        counts = f"of {num_examples} texts {num_right} are right and {num_wrong} wrong"
        raise CorrectnessError(f"{counts}; a map needs at least {_FOLDS} of each")


def confidence_of(scores: Mapping[str, Tensor], name: str, correctness: Correctness | None) -> Tensor:
    """What n texts are ranked by, (n,) float64: ``p_correct``, or the confidence that a score stands for.

    That is log c, at most 0, of a log-probability, an entropy or a variance, since c of a long text is 0 in float64;
    and c of an agreement or P(True).

    Args:
        scores: by name, each (n,).
        name: ``p_correct``, or one of the scores.
        correctness: the map, for ``p_correct``.

    Raises:
        CorrectnessError: there is no such score, or map.
    """
    if name == "p_correct" and correctness is not None:
        return correctness.probabilities(scores)
    if name == "p_correct":
        raise CorrectnessError("by: there is no map to p_correct")
    check_by(name, scores)
    values = scores[name].double().cpu()
    return (values * sign).clamp(max=0) if (sign := SIGNS[name]) else values


_Columns = dict[str, np.ndarray]


def _chosen(
    columns: _Columns, right: np.ndarray, maps: Sequence[str], seed: int, metrics: dict[str, float] | None = None
) -> Correctness:
    """The best candidate, fitted on all; the first of equal ones."""
    candidates: list[tuple[str, tuple[str, ...]]] = [(kind, (name,)) for kind in maps for name in columns]
    if "platt" in maps and len(columns) > 1:
        candidates.append(("platt", tuple(columns)))

    def loss(candidate: tuple[str, tuple[str, ...]]) -> float:
        found = _held_out(columns, right, seed, lambda c, o: _fitted(*candidate, c, o))
        return -np.log(np.where(right, found, 1 - found)).mean()

    best = min(candidates, key=loss) if len(candidates) > 1 else candidates[0]
    return _fitted(*best, columns, right, metrics)


def _held_out(
    columns: _Columns, right: np.ndarray, seed: int, fit: Callable[[_Columns, np.ndarray], Correctness]
) -> np.ndarray:
    """The probability of each text by a map that was fitted without its fold; folds have equal shares of right ones."""
    fold = np.empty(len(right), int)
    generator = np.random.default_rng(seed)
    for outcome in (True, False):
        rows = generator.permutation((right == outcome).nonzero()[0])
        fold[rows] = np.arange(len(rows)) % _FOLDS
    found = np.empty(len(right))
    for number in range(_FOLDS):
        inside, outside = fold != number, fold == number
        fitted = fit({name: values[inside] for name, values in columns.items()}, right[inside])
        found[outside] = fitted.probabilities({n: torch.from_numpy(v[outside]) for n, v in columns.items()}).numpy()
    return found


def _fitted(
    kind: str, names: tuple[str, ...], columns: _Columns, right: np.ndarray, metrics: dict[str, float] | None = None
) -> Correctness:
    """A map of some scores."""
    try:
        from sklearn.isotonic import IsotonicRegression
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise CorrectnessError("a map needs scikit-learn: pip install 'bloblora[correctness]'") from error
    parameters: dict[str, Any]
    if kind == "isotonic":
        isotonic = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        isotonic.fit(_log_confidence(names[0], columns[names[0]]), right.astype(float))
        x, y = isotonic.X_thresholds_, isotonic.y_thresholds_
        parameters = {"log_confidence": x.tolist(), "probability": y.tolist()}
    elif kind == "beta":
        features = _beta_features(names[0], columns[names[0]])
        used, weights = [0, 1], np.zeros(2)
        while used:  # without those of a negative weight, as betacal does
            model = LogisticRegression(C=1e6, max_iter=1000).fit(features[:, used], right)
            if (model.coef_[0] >= 0).all():
                weights[used], intercept = model.coef_[0], float(model.intercept_[0])
                break
            used.pop(int(model.coef_[0].argmin()))
        else:
            intercept = math.log(right.sum() / (~right).sum())
        parameters = {"weights": weights.tolist(), "intercept": intercept}
    else:
        features = np.stack([columns[name] for name in names], axis=-1)
        mean, std = features.mean(0), features.std(0)
        std[std == 0] = 1  # constant among these
        model = LogisticRegression(max_iter=1000).fit((features - mean) / std, right)
        weights = model.coef_[0] / std
        parameters = {"weights": weights.tolist(), "intercept": float(model.intercept_[0] - weights @ mean)}
    return Correctness(kind, names, parameters, len(right), int(right.sum()), metrics or {})


def _log_confidence(name: str, values: np.ndarray) -> np.ndarray:
    """log c."""
    sign = SIGNS[name]
    return sign * values if sign else np.log(values.clip(_SMALLEST))


def _beta_features(name: str, values: np.ndarray) -> np.ndarray:
    """log c and -log(1 - c), (n, 2)."""
    log_confidence = _log_confidence(name, values).clip(max=math.log1p(-_SMALLEST))
    return np.stack([log_confidence, -np.log(-np.expm1(log_confidence))], axis=-1)


def _metrics(probabilities: Tensor, right: Tensor) -> dict[str, float]:
    curve, floor = risk_coverage(probabilities, right), confidence_floor(probabilities)
    of_right, of_wrong = ({"p": -probabilities[of]} for of in (right, ~right))
    log_likelihood = torch.where(right, probabilities, 1 - probabilities).log()
    return {
        "nll": -log_likelihood.mean().item(),
        "brier": (probabilities - right.double()).square().mean().item(),
        "ece": confidence_bins(probabilities, right).ece,
        "ece_floor": floor["mean"],
        "ece_floor_std": floor["std"],
        "auroc": ood_metrics(of_right, of_wrong)["auroc_p"],
        "aurc": curve.aurc,
        "risk_80": 1 - curve.accuracy(0.8),
        "risk_50": 1 - curve.accuracy(0.5),
    }

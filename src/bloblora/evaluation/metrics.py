"""Everything that is measured of a prediction: each metric by name, with its title, direction and range."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..prediction import DISTANCES, KINDS, MultiLabelPrediction, Prediction, TagsPrediction, ValuePrediction
from ..prediction.kinds import CLASSES, INTERVAL, covered
from ..registry import Registry
from ..tasks.likelihood import NO_TAG
from ..tasks.token_classification import entities_of
from .calibration import BinGaps, brier_parts, classwise_ece, ece_floor, equal_mass_ece, reliability
from .inputs import as_prediction, checked, checked_labels, checked_tags, checked_values, equal_width
from .ranking import ood_metrics, risk_coverage

Table = Literal["main", "more", "asked"]

COVERAGES = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Metric:
    """What is measured of a prediction of n inputs.

    Another package adds one with an entry point of its name in the group ``bloblora.metrics``. It is then in `summary`
    and in tables, and in `paired_bootstrap` if it is a mean over examples.

    Attributes:
        name: in results, such as ``ece``.
        title: of a table's column, such as "ECE".
        function: gets the `Prediction` and targets (n,), class indices, both on the CPU, and gives a number; with
            ``per_example`` one for each example, (n,).
        higher_is_better: None where neither direction is better.
        range: least and greatest value.
        key: where the function gives several metrics by name, the name of this one; it is called once for all of them.
        per_example: the metric is the mean of what the function gives.
        takes: keyword arguments of the function: ``num_bins``; and ``outside``, the `Prediction` of inputs out of
            scope. A metric is left out where what it takes isn't there.
        marked: whether tables mark the best; not of a calibration error, which is least for a model that knows no more
            than its own accuracy.
        of: kinds of predictions that it is of, such as ``gaussian``; others don't have it.
        table: ``main`` is in every table and in `metrics`, ``more`` in a report's second table, ``asked`` where it is
            asked for.
    """

    name: str
    title: str
    function: Callable[..., Any]
    higher_is_better: bool | None
    range: tuple[float, float] = (-math.inf, math.inf)
    key: str | None = None
    per_example: bool = False
    takes: tuple[str, ...] = ()
    marked: bool = True
    of: tuple[str, ...] = CLASSES
    table: Table = "main"

    def examples(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """The value of each example, (n,) float64, of a metric that is their mean.

        Raises:
            ValueError: the function gave another shape.
        """
        values = torch.as_tensor(self.function(prediction, targets)).double()
        if values.shape != targets.shape[:1]:
            shapes = f"{tuple(targets.shape[:1])}, got {tuple(values.shape)}"
            raise ValueError(f"metric {self.name!r} is per_example: its function must give the shape {shapes}")
        return values


def metric_names(table: Table | None = None, outside: bool | None = None) -> list[str]:
    """Names in the order of tables: all, or of one table; all, or those that do or don't take ``outside``."""
    return [
        name
        for name, metric in METRICS.items()
        if table in (None, metric.table) and outside in (None, "outside" in metric.takes)
    ]


def metrics(predicted: Tensor | Prediction, targets: Tensor, num_bins: int = 15) -> dict[str, float | int]:
    r"""Accuracy, calibration and proper scores of n predictions.

    Of classes:

    - ``ece``: :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|` over equal-width bins of
      the top probability (Guo et al., arXiv 1706.04599); of one example, how far that is from 1 (right) or 0;
    - ``ece_floor``, ``ece_floor_std``: mean and standard deviation of the ECE that a perfectly calibrated model would
      have on the same records (`ece_floor`);
    - ``squared_calibration_error``: without the bias that few records give an ECE (`BinGaps`), in [-1, 1];
    - ``nll``: mean of -log p(target), nats; infinite where a target has probability 0;
    - ``brier``: mean over examples of :math:`\sum_c (p_c - 1[c = y])^2`, in [0, 2].

    Of several labels at once, of which those are named whose probability is above 0.5:

    - ``nll``: mean of the sum over labels of -log p(has it or not), nats;
    - ``f1_micro``, ``f1_macro``: F1 of all pairs of input and label, and the mean over labels (0 for one that nobody
      has or names);
    - ``exact_match``: share of the inputs whose labels are all right;
    - ``label_brier``, ``label_ece``: means over labels of the squared error of its probability, and of its ECE, the
      mean distance of probability and frequency over bins.

    Of tags of tokens, the first as a mean over inputs and the others over all tokens or entities:

    - ``nll``: mean of the sum over an input's tokens of -log p(tag), nats; ``token_nll`` is that of a token;
    - ``token_accuracy``, ``token_ece``: as of classes, each token being an example;
    - ``entity_precision``, ``entity_recall``, ``entity_f1``: of entities in BIO tags, right where type and both ends
      are (`entities_of`); 0 where there is none, and not there where no tag is of that form;
    - ``entity_ece``: over bins of the predicted entities' probabilities, the mean distance to the share that is right.

    Of values, in the units of the data but for ``nll``:

    - ``nll``: mean of -log p(target) of standardized values, nats; plus log ``scale`` it is that of the data;
    - ``rmse``, ``mae``: root mean squared and mean absolute error of the predictive mean;
    - ``crps``: continuous ranked probability score of the mixture, in closed form (Grimit et al. 2006,
      doi 10.1256/qj.05.235), which is the absolute error for a prediction without spread;
    - ``interval_coverage``, ``interval_width``: share of the 90 % intervals that hold the target, and their mean width.

    Args:
        predicted: a prediction, or log-probabilities (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices, or values; (n, L), whether inputs have each label; (n, T), tags of tokens.
        num_bins: equal-width bins on [0, 1].

    Returns:
        These by name, ``accuracy``, other packages' metrics of the main table, and ``num_examples``.

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    prediction, first = as_prediction(predicted), [*metric_names("main", outside=False), "ece_floor_std"]
    names = [name for name in _of(prediction) if name in first]
    return _values(names, prediction, targets, num_bins=num_bins) | {"num_examples": len(targets)}


def example_scores(predicted: Tensor | Prediction, targets: Tensor) -> dict[str, Tensor]:
    """Of each example the metrics that are means over examples, and of classes ``confidence``, by name: (n,) float64.

    Arguments and errors are those of `metrics`.
    """
    prediction, targets = as_prediction(predicted), targets.cpu()
    means = [METRICS[name] for name in _of(prediction) if METRICS[name].per_example]
    scores = {metric.name: metric.examples(prediction, targets) for metric in means}
    if prediction.kind not in CLASSES:
        return scores
    return scores | {"confidence": checked(predicted, targets)[0].exp().amax(-1)}


def summary(
    inside: Prediction,
    targets: Tensor,
    outside: Prediction | None = None,
    num_bins: int = 15,
) -> dict[str, float | int]:
    """All metrics of a prediction of n inputs, and with ``outside`` how well it tells inputs out of scope.

    None of ours is NaN; of classes ``nll`` may be infinite. Selective prediction is by confidence.

    Args:
        inside: of inputs in scope.
        targets: (n,), class indices.
        outside: of inputs out of scope.
        num_bins: bins of calibration errors and of the Brier score's parts.

    Returns:
        The values of `METRICS` by name; ``num_examples``, ``num_samples``, and ``num_draws``, which is 1 where all
        weight samples agree.

    Raises:
        ValueError: there is no input, or targets are none of the prediction's columns.
    """
    first = metrics(inside, targets, num_bins)
    given = {"num_bins": num_bins, "outside": outside}
    there = {name for name, value in given.items() if value is not None}
    rest = [name for name in _of(inside) if name not in first and there.issuperset(METRICS[name].takes)]
    counts = {"num_samples": inside.num_samples, "num_draws": int(inside.num_draws.max())}
    return first | counts | _values(rest, inside, targets, **given)


def _of(prediction: Prediction) -> list[str]:
    """Names of the metrics of such a prediction."""
    return [name for name, metric in METRICS.items() if prediction.kind in metric.of]


def _values(names: list[str], prediction: Prediction, targets: Tensor, **options: Any) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    given: dict[Callable[..., Any], Any] = {}
    targets = targets.cpu()
    for metric in map(METRICS.__getitem__, names):
        if metric.per_example:
            found[metric.name] = metric.examples(prediction, targets).mean().item()
            continue
        if metric.function not in given:
            taken = {name: options[name] for name in metric.takes}
            given[metric.function] = metric.function(prediction, targets, **taken)
        value = given[metric.function]
        if metric.key is None or metric.key in value:
            found[metric.name] = float(value if metric.key is None else value[metric.key])
    return found


def _accuracy(prediction: Prediction, targets: Tensor) -> Tensor:
    log_probabilities, targets = checked(prediction, targets)
    return (log_probabilities.argmax(-1) == targets).double()


def _ece(prediction: Prediction, targets: Tensor, num_bins: int) -> float:
    return reliability(checked(prediction, targets)[0].exp(), targets, num_bins).ece


def _squared_calibration_error(prediction: Prediction, targets: Tensor, num_bins: int) -> float:
    return BinGaps.of(example_scores(prediction, targets), num_bins).squared_error()


def _nll(prediction: Prediction, targets: Tensor) -> Tensor:
    if isinstance(prediction, ValuePrediction):
        return -prediction.log_prob(checked_values(prediction, targets))
    if isinstance(prediction, TagsPrediction):
        return -prediction.token_log_probs(checked_tags(prediction, targets)).sum(-1)
    if isinstance(prediction, MultiLabelPrediction):
        return -prediction.likelihood.averaged(prediction.logits.double(), checked_labels(prediction, targets))
    log_probabilities, targets = checked(prediction, targets)
    return 0 - log_probabilities.gather(1, targets[:, None])[:, 0]  # 0 - x, because -x would give -0.0


def _brier(prediction: Prediction, targets: Tensor) -> Tensor:
    log_probabilities, targets = checked(prediction, targets)
    return (log_probabilities.exp() - one_hot(targets, log_probabilities.shape[1])).square().sum(-1)


def _f1(prediction: MultiLabelPrediction, targets: Tensor) -> dict[str, float]:
    named, has = prediction.labels, checked_labels(prediction, targets).bool()
    hits, misses = (named & has).sum(0).double(), (named ^ has).sum(0).double()

    def score(hits: Tensor, misses: Tensor) -> Tensor:
        return torch.where(hits + misses > 0, 2 * hits / (2 * hits + misses).clamp_min(1), 0)

    return {"micro": score(hits.sum(), misses.sum()).item(), "macro": score(hits, misses).mean().item()}


def _exact(prediction: MultiLabelPrediction, targets: Tensor) -> Tensor:
    return (prediction.labels == checked_labels(prediction, targets).bool()).all(-1).double()


def _label_brier(prediction: MultiLabelPrediction, targets: Tensor) -> Tensor:
    return (prediction.probabilities.double() - checked_labels(prediction, targets)).square().mean(-1)


def _label_ece(prediction: MultiLabelPrediction, targets: Tensor, num_bins: int) -> float:
    return _gap(prediction.probabilities.double(), checked_labels(prediction, targets).double(), num_bins)


def _gap(probabilities: Tensor, happened: Tensor, num_bins: int) -> float:
    """Mean distance of probabilities (n, L) and frequencies over bins, and the mean over L; 0 of none."""
    gaps, bins = happened - probabilities, equal_width(probabilities, num_bins)
    sums = torch.zeros(num_bins, gaps.shape[1], dtype=torch.float64).scatter_add(0, bins, gaps)
    return (sums.abs().sum(0) / max(1, len(gaps))).mean().item()


def _tokens(prediction: TagsPrediction, targets: Tensor, num_bins: int) -> dict[str, float]:
    there = (targets := checked_tags(prediction, targets)) != NO_TAG
    probabilities, right = prediction.probabilities[there].double(), targets[there]
    nll = -prediction.token_log_probs(targets).sum() / len(right)
    accuracy = (prediction.labels[there] == right).double().mean()
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return {
        "nll": max(0.0, nll.item()),
        "accuracy": accuracy.item(),
        "ece": reliability(probabilities, right, num_bins).ece,
    }


def _entities(prediction: TagsPrediction, targets: Tensor, num_bins: int) -> dict[str, float]:
    names = prediction.likelihood.names
    if not any(entities_of([name]) for name in names):
        return {}
    rows = [[names[tag] for tag in row if tag != NO_TAG] for row in checked_tags(prediction, targets).tolist()]
    wanted = [{*entities_of(row)} for row in rows]
    found = [
        (one["probability"], (one["entity"], one["start"], one["end"]) in right)
        for ours, right in zip(prediction.entities(), wanted, strict=True)
        for one in ours
    ]
    hits, count = sum(right for _, right in found), sum(map(len, wanted))
    probabilities, happened = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).split(1, -1)
    return {
        "precision": hits / max(1, len(found)),
        "recall": hits / max(1, count),
        "f1": 2 * hits / max(1, len(found) + count),
        "ece": _gap(probabilities, happened, num_bins),
    }


def _errors(prediction: ValuePrediction, targets: Tensor) -> Tensor:
    return (checked_values(prediction, targets) - prediction.mean).abs()


def _rmse(prediction: ValuePrediction, targets: Tensor) -> float:
    return _errors(prediction, targets).square().mean().sqrt().item()


def _crps(prediction: ValuePrediction, targets: Tensor) -> Tensor:
    targets, (means, stds) = checked_values(prediction, targets), prediction.moments
    between = [
        _mean_distance(means - mean, (stds.square() + std.square()).sqrt()).mean(0)
        for mean, std in zip(means, stds, strict=True)
    ]
    return _mean_distance(targets - means, stds).mean(0) - torch.stack(between).mean(0) / 2


def _mean_distance(mean: Tensor, std: Tensor) -> Tensor:
    """E|X| of a normal variable."""
    z = mean / std
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return mean * (2 * torch.special.ndtr(z) - 1) + 2 * std * density


def _interval_coverage(prediction: ValuePrediction, targets: Tensor) -> Tensor:
    return covered(prediction.interval(), checked_values(prediction, targets)).double()


def _interval_width(prediction: ValuePrediction, targets: Tensor) -> Tensor:
    checked_values(prediction, targets)
    return prediction.interval().diff().squeeze(-1)


def _selective(prediction: Prediction, targets: Tensor) -> dict[str, float]:
    curve = risk_coverage(prediction.confidence, prediction.labels == targets)
    return {"aurc": curve.aurc} | {f"{coverage:.0%}": curve.accuracy(coverage) for coverage in COVERAGES}


def _ood(prediction: Prediction, _: Tensor, outside: Prediction) -> dict[str, float]:
    return ood_metrics(prediction.scores, outside.scores)


def _own() -> Iterator[Metric]:
    share, bins = (0.0, 1.0), ("num_bins",)
    yield Metric("accuracy", "accuracy", _accuracy, True, share, per_example=True)
    error: dict[str, Any] = {"higher_is_better": False, "takes": bins, "marked": False}
    yield Metric("ece", "ECE", _ece, range=share, **error)
    yield Metric("ece_floor", "ECE floor", ece_floor, None, share, "mean", takes=bins)
    yield Metric("ece_floor_std", "ECE floor, sd", ece_floor, None, share, "std", takes=bins, table="asked")
    yield Metric("squared_calibration_error", "CE²", _squared_calibration_error, range=(-1, 1), **error)
    yield Metric("nll", "NLL", _nll, False, per_example=True, of=tuple(KINDS))
    yield Metric("brier", "Brier", _brier, False, (0, 2), per_example=True)
    several: dict[str, Any] = {"range": share, "of": (MultiLabelPrediction.kind,)}
    yield Metric("f1_micro", "F1, micro", _f1, True, key="micro", **several)
    yield Metric("f1_macro", "F1, macro", _f1, True, key="macro", **several)
    yield Metric("exact_match", "all labels right", _exact, True, per_example=True, **several)
    yield Metric("label_brier", "Brier of a label", _label_brier, False, per_example=True, **several)
    yield Metric("label_ece", "ECE of a label", _label_ece, False, takes=bins, marked=False, **several)
    tagged: dict[str, Any] = {"takes": bins, "of": (TagsPrediction.kind,)}
    yield Metric("token_accuracy", "token accuracy", _tokens, True, share, "accuracy", **tagged)
    yield Metric("token_nll", "NLL of a token", _tokens, False, key="nll", **tagged)
    yield Metric("token_ece", "ECE of tokens", _tokens, False, share, "ece", marked=False, **tagged)
    yield Metric("entity_precision", "precision", _entities, True, share, "precision", **tagged)
    yield Metric("entity_recall", "recall", _entities, True, share, "recall", **tagged)
    yield Metric("entity_f1", "F1", _entities, True, share, "f1", **tagged)
    yield Metric("entity_ece", "ECE of entities", _entities, False, share, "ece", marked=False, **tagged)
    sizes: dict[str, Any] = {"range": (0.0, math.inf), "of": (ValuePrediction.kind,)}
    yield Metric("rmse", "RMSE", _rmse, False, **sizes)
    yield Metric("mae", "MAE", _errors, False, per_example=True, **sizes)
    yield Metric("crps", "CRPS", _crps, False, per_example=True, **sizes)
    interval = f"{INTERVAL:.0%} interval"
    coverage: dict[str, Any] = {"range": share, "per_example": True, "of": (ValuePrediction.kind,)}
    yield Metric("interval_coverage", f"{interval}, coverage", _interval_coverage, None, **coverage)
    yield Metric("interval_width", f"{interval}, width", _interval_width, None, per_example=True, **sizes)
    yield Metric("ece_equal_mass", "ECE, equal mass", equal_mass_ece, range=share, table="more", **error)
    yield Metric("ece_classwise", "ECE, classwise", classwise_ece, range=share, table="more", **error)
    better = {"uncertainty": None, "resolution": True, "reliability": False}
    for name, higher in (better | {"within_bin_variance": None, "within_bin_covariance": None}).items():
        title, bounds = f"Brier {name.replace('_', ' ')}", (-2 if name.endswith("covariance") else 0, 2)
        table: Table = "asked" if higher is None else "more"
        marked = name != "reliability"
        yield Metric(f"brier_{name}", title, brier_parts, higher, bounds, name, takes=bins, table=table, marked=marked)
    yield Metric("aurc", "AURC", _selective, False, share, "aurc", table="more")
    for part in COVERAGES:
        name, title = f"selective_accuracy_{part * 100:.0f}", f"accuracy at {part * 100:.0f} %"
        yield Metric(name, title, _selective, True, share, f"{part:.0%}", table="more" if part == 0.8 else "asked")
    shown = {name: short for kind in KINDS.values() for name, short in kind.uncertainties.items()}
    of_score = {name: tuple(kind.kind for kind in KINDS.values() if name in kind.uncertainties) for name in shown}
    of_score |= dict.fromkeys(DISTANCES, tuple(KINDS))
    for score, short in (shown | DISTANCES).items():
        options: dict[str, Any] = {"takes": ("outside",), "of": of_score[score]}
        auroc, fpr95 = f"auroc_{score}", f"fpr95_{score}"
        yield Metric(auroc, f"AUROC {short}", _ood, True, share, auroc, **options)
        yield Metric(fpr95, f"FPR95 {short}", _ood, False, share, fpr95, table="more", **options)


METRICS: Registry[Metric] = Registry(
    "bloblora.metrics",
    {metric.name: metric for metric in _own()},
    lambda name, metric: (
        None if isinstance(metric, Metric) and metric.name == name else f"it isn't a Metric of the name {name!r}"
    ),
)
"""The metrics by name, in the order of tables."""

"""Everything that is measured of a prediction: each metric by name, with its title, direction and range."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..prediction import Prediction
from ..registry import Registry
from .calibration import BinGaps, brier_parts, classwise_ece, ece_floor, equal_mass_ece, reliability
from .distance import DISTANCES
from .inputs import as_prediction, checked
from .ranking import ood_metrics, risk_coverage

Table = Literal["main", "more", "asked"]

COVERAGES = (0.5, 0.8, 0.9, 0.95)
UNCERTAINTIES = {"confidence": "conf.", "predictive_entropy": "entropy", "mutual_information": "MI"}
"""What tells inputs out of scope from others: properties of a `Prediction`, and what tables call them."""


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
        takes: keyword arguments of the function: ``num_bins``; ``outside``, the `Prediction` of inputs out of scope;
            and ``distances``, scores by name of inputs in scope and out of it. A metric is left out where what it takes
            isn't there.
        marked: whether tables mark the best; not of a calibration error, which is least for a model that knows no more
            than its own accuracy.
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
    table: Table = "main"

    def examples(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """The value of each example, (n,) float64, of a metric that is their mean.

        Raises:
            ValueError: the function gave another shape.
        """
        values = torch.as_tensor(self.function(prediction, targets)).double()
        if values.shape != targets.shape:
            shapes = f"{tuple(targets.shape)}, got {tuple(values.shape)}"
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

    - ``ece``: :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|` over equal-width bins of
      the top probability (Guo et al., arXiv 1706.04599); of one example, how far that is from 1 (right) or 0;
    - ``ece_floor``, ``ece_floor_std``: mean and standard deviation of the ECE that a perfectly calibrated model would
      have on the same records (`ece_floor`);
    - ``squared_calibration_error``: without the bias that few records give an ECE (`BinGaps`), in [-1, 1];
    - ``nll``: mean of -log p(target), nats; infinite where a target has probability 0;
    - ``brier``: mean over examples of :math:`\sum_c (p_c - 1[c = y])^2`, in [0, 2].

    Args:
        predicted: a prediction, or log-probabilities (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices.
        num_bins: equal-width bins on [0, 1].

    Returns:
        These by name, ``accuracy``, other packages' metrics of the main table, and ``num_examples``.

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    names = [name for name in METRICS if name in metric_names("main", outside=False) or name == "ece_floor_std"]
    return _values(names, as_prediction(predicted), targets, num_bins=num_bins) | {"num_examples": len(targets)}


def example_scores(predicted: Tensor | Prediction, targets: Tensor) -> dict[str, Tensor]:
    """Of each example the metrics that are means over examples, and ``confidence``, by name: (n,) float64.

    Arguments and errors are those of `metrics`.
    """
    prediction, targets = as_prediction(predicted), targets.cpu()
    scores = {name: metric.examples(prediction, targets) for name, metric in METRICS.items() if metric.per_example}
    return scores | {"confidence": checked(predicted, targets)[0].exp().amax(-1)}


def summary(
    inside: Prediction,
    targets: Tensor,
    outside: Prediction | None = None,
    num_bins: int = 15,
    distances: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> dict[str, float | int]:
    """All metrics of a prediction of n inputs, and with ``outside`` how well it tells inputs out of scope.

    None of ours is NaN; only ``nll`` may be infinite. Selective prediction is by confidence.

    Args:
        inside: of inputs in scope.
        targets: (n,), class indices.
        outside: of inputs out of scope.
        num_bins: bins of calibration errors and of the Brier score's parts.
        distances: `Distance.scores` of the inputs in scope and of those out of it.

    Returns:
        The values of `METRICS` by name; ``num_examples``, ``num_samples``, and ``num_draws``, which is 1 where all
        weight samples agree.

    Raises:
        ValueError: there is no input, or targets are none of the prediction's columns.
    """
    first = metrics(inside, targets, num_bins)
    given = {"num_bins": num_bins, "outside": outside, "distances": distances}
    there = {name for name, value in given.items() if value is not None}
    rest = [name for name, metric in METRICS.items() if name not in first and there.issuperset(metric.takes)]
    counts = {"num_samples": inside.num_samples, "num_draws": len(inside.log_probs)}
    return first | counts | _values(rest, inside, targets, **given)


def uncertainty(prediction: Prediction) -> dict[str, Tensor]:
    """``confidence``, ``predictive_entropy`` and ``mutual_information`` of each input, (n,)."""
    return {name: getattr(prediction, name) for name in UNCERTAINTIES}


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
    log_probabilities, targets = checked(prediction, targets)
    return 0 - log_probabilities.gather(1, targets[:, None])[:, 0]  # 0 - x, because -x would give -0.0


def _brier(prediction: Prediction, targets: Tensor) -> Tensor:
    log_probabilities, targets = checked(prediction, targets)
    return (log_probabilities.exp() - one_hot(targets, log_probabilities.shape[1])).square().sum(-1)


def _selective(prediction: Prediction, targets: Tensor) -> dict[str, float]:
    curve = risk_coverage(prediction.confidence, prediction.labels == targets)
    return {"aurc": curve.aurc} | {f"{coverage:.0%}": curve.accuracy(coverage) for coverage in COVERAGES}


def _ood(prediction: Prediction, _: Tensor, outside: Prediction) -> dict[str, float]:
    return ood_metrics(uncertainty(prediction), uncertainty(outside))


def _distances(
    _: Prediction, __: Tensor, outside: Prediction, distances: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
) -> dict[str, float]:
    return ood_metrics(*distances)


def _own() -> Iterator[Metric]:
    share, bins = (0.0, 1.0), ("num_bins",)
    yield Metric("accuracy", "accuracy", _accuracy, True, share, per_example=True)
    error: dict[str, Any] = {"higher_is_better": False, "takes": bins, "marked": False}
    yield Metric("ece", "ECE", _ece, range=share, **error)
    yield Metric("ece_floor", "ECE floor", ece_floor, None, share, "mean", takes=bins)
    yield Metric("ece_floor_std", "ECE floor, sd", ece_floor, None, share, "std", takes=bins, table="asked")
    yield Metric("squared_calibration_error", "CE²", _squared_calibration_error, range=(-1, 1), **error)
    yield Metric("nll", "NLL", _nll, False, (0, math.inf), per_example=True)
    yield Metric("brier", "Brier", _brier, False, (0, 2), per_example=True)
    yield Metric("ece_equal_mass", "ECE, equal mass", equal_mass_ece, range=share, table="more", **error)
    yield Metric("ece_classwise", "ECE, classwise", classwise_ece, range=share, table="more", **error)
    better = {"uncertainty": None, "resolution": True, "reliability": False}
    for part, higher in (better | {"within_bin_variance": None, "within_bin_covariance": None}).items():
        title, bounds = f"Brier {part.replace('_', ' ')}", (-2 if part.endswith("covariance") else 0, 2)
        table: Table = "asked" if higher is None else "more"
        marked = part != "reliability"
        yield Metric(f"brier_{part}", title, brier_parts, higher, bounds, part, takes=bins, table=table, marked=marked)
    yield Metric("aurc", "AURC", _selective, False, share, "aurc", table="more")
    for coverage in COVERAGES:
        name, title = f"selective_accuracy_{coverage * 100:.0f}", f"accuracy at {coverage * 100:.0f} %"
        yield Metric(
            name, title, _selective, True, share, f"{coverage:.0%}", table="more" if coverage == 0.8 else "asked"
        )
    detection: list[tuple[dict[str, str], Callable[..., Any], tuple[str, ...]]] = [
        (UNCERTAINTIES, _ood, ("outside",)),
        (DISTANCES, _distances, ("outside", "distances")),
    ]
    for scores, function, takes in detection:
        for score, short in scores.items():
            auroc, fpr95 = f"auroc_{score}", f"fpr95_{score}"
            yield Metric(auroc, f"AUROC {short}", function, True, share, auroc, takes=takes)
            yield Metric(fpr95, f"FPR95 {short}", function, False, share, fpr95, takes=takes, table="more")


_OWN = SimpleNamespace(**{metric.name: metric for metric in _own()})

METRICS: Registry[Metric] = Registry(
    "bloblora.metrics",
    {name: f"{__name__}:_OWN.{name}" for name in vars(_OWN)},
    lambda name, metric: (
        None if isinstance(metric, Metric) and metric.name == name else f"it isn't a Metric of the name {name!r}"
    ),
)
"""The metrics by name, in the order of tables."""

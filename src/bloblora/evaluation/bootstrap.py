"""Is one method better than another, or are these test examples kind to it?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .bins import equal_width

Metric = Literal["accuracy", "nll", "brier", "ece"]


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    first: Sequence[Mapping[str, Tensor]],
    second: Sequence[Mapping[str, Tensor]],
    metric: Metric = "accuracy",
    *,
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    num_bins: int = 15,
) -> Interval:
    """Confidence interval of a metric's mean over the first method's seeds less that over the second's.

    Examples are drawn with replacement, the same ones for every seed of both methods; the bounds are percentiles of
    the drawn differences (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13). So the interval is
    about other test examples, not about other seeds. Few examples a bin lift an ECE, of the better calibrated method
    most, and drawing does so once more; so of the ECE the percentiles are reflected at the estimate (Davison &
    Hinkley 1997, Bootstrap Methods and their Application, section 2.4). Even then a stated 95 % was 87 % with ten
    examples a bin and 92 % with thirty, in a simulation.

    Of one example the interval has no width; where an NLL is infinite the bounds are NaN.

    Args:
        first: `example_scores` of each seed.
        second: the same of the other method, of the same examples; the number of seeds may differ.
        metric: of those of `metrics`.
        num_resamples: how often examples are drawn.
        level: of confidence, in (0, 1).
        seed: of the drawing.
        num_bins: bins of the ECE.

    Raises:
        ValueError: a method has no seed, an argument is out of its range, or numbers of examples differ.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be 1 or more, got {num_resamples}")
    a, b = (_columns(name, seeds, metric, num_bins) for name, seeds in (("first", first), ("second", second)))
    n = len(a)
    if len(b) != n:
        raise ValueError(f"second has {len(b)} examples, first {n}; they must be the same ones")

    def difference(counts: Tensor) -> Tensor:
        each = (counts @ a).abs().sum(-1) / len(first) - (counts @ b).abs().sum(-1) / len(second)
        return each / n

    estimate = difference(torch.ones(n, dtype=torch.float64)).item()
    drawn = torch.cat([difference(counts) for counts in _counts(n, num_resamples, seed)])
    low, high = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    if metric == "ece":
        low, high = 2 * estimate - high, 2 * estimate - low
    return Interval(estimate, low, high)


def _columns(name: str, seeds: Sequence[Mapping[str, Tensor]], metric: Metric, num_bins: int) -> Tensor:
    """The `_parts` of all seeds of a method, (n, seeds * k)."""
    if not len(seeds):
        raise ValueError(f"{name}: there is no seed")
    return torch.cat([_parts(scores, metric, num_bins) for scores in seeds], 1)


def _parts(scores: Mapping[str, Tensor], metric: Metric, num_bins: int) -> Tensor:
    """Columns, (n, k), such that a metric is the sum of their means' absolute values: bins' gaps, or one score."""
    if metric != "ece":
        return scores[metric].double()[:, None]
    confidence = scores["confidence"].double()
    gap = confidence - scores["accuracy"].double()
    return one_hot(equal_width(confidence, num_bins), num_bins) * gap[:, None]


def _counts(n: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each of n examples is drawn, (r, n) at a time so that many resamples of many examples fit."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in torch.arange(num_resamples).split(max(1, 2**22 // n)):
        drawn = torch.randint(n, (len(chunk), n), generator=generator)
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        yield torch.zeros_like(ones).scatter_add(1, drawn, ones)

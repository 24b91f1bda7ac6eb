"""Intervals against SciPy's bootstrap, and how often they cover the truth."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from bloblora.evaluation import Interval, example_scores, metrics, paired_bootstrap

METRICS = ("accuracy", "nll", "brier", "ece")


def population(n):
    """Targets, and two seeds of an overconfident method and of one that is nearly calibrated."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(n, 4, generator=generator, dtype=torch.float64)

    logits = 1.5 * noise()
    targets = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    over = [(2.5 * (logits + 0.8 * noise())).log_softmax(-1) for _ in range(2)]
    good = [(logits + 0.5 * noise()).log_softmax(-1) for _ in range(2)]
    return targets, over, good


def difference(over, good, targets, metric):
    return sum(metrics(a, targets)[metric] - metrics(b, targets)[metric] for a, b in zip(over, good, strict=True)) / 2


def compare(first, second, targets, *arguments, **options):
    scores = ([example_scores(x, targets) for x in side] for side in (first, second))
    return paired_bootstrap(*scores, *arguments, **options)


@pytest.mark.parametrize("metric", METRICS)
def test_equals_scipy(metric):
    targets, over, good = population(150)
    found = compare(over, good, targets, metric)
    assert found.estimate == pytest.approx(difference(over, good, targets, metric))
    expected = bootstrap(
        (np.arange(150),),
        lambda rows: difference([x[rows] for x in over], [x[rows] for x in good], targets[rows], metric),
        vectorized=False,
        n_resamples=400,
        method="basic" if metric == "ece" else "percentile",
        random_state=0,
    )
    low, high = expected.confidence_interval
    # a quantile of 400 draws has an error of about 7 % of the interval's width
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.2 * (high - low))


@pytest.mark.parametrize("metric", METRICS)
def test_covers_the_truth_as_often_as_it_says(metric):
    targets, over, good = population(20_000)
    truth = difference(over, good, targets, metric)
    hits = 0
    for seed in range(200):
        rows = torch.randint(20_000, (300,), generator=torch.Generator().manual_seed(1000 + seed))
        samples = ([x[rows] for x in over], [x[rows] for x in good], targets[rows])
        interval = compare(*samples, metric, num_resamples=300, seed=seed, num_bins=5)
        hits += interval.low <= truth <= interval.high
    assert hits / 200 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 200))


def test_pairs_examples_and_is_seeded():
    targets, over, good = population(100)
    same = compare(over, over[::-1], targets, "nll")
    assert (same.estimate, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-12)
    wide, narrow = (compare(over, good, targets, "brier", level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert wide == compare(over, good, targets, "brier")
    assert wide != compare(over, good, targets, "brier", seed=1)


def test_many_examples_are_drawn_in_chunks():
    targets, over, good = population(3000)
    few, many = (compare(over, good, targets, num_resamples=n) for n in (1000, 2000))
    assert few.estimate == many.estimate
    assert (few.low, few.high) == pytest.approx((many.low, many.high), abs=0.3 * (many.high - many.low))


def test_the_number_of_seeds_may_differ():
    targets, over, good = population(50)
    found = compare(over, good[:1], targets, "brier").estimate
    scores = [metrics(x, targets)["brier"] for x in (*over, good[0])]
    assert found == pytest.approx((scores[0] + scores[1]) / 2 - scores[2])


def test_one_example_and_an_infinite_nll():
    right, wrong = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    zero = torch.tensor([0])
    assert compare([right], [wrong], zero) == Interval(1, 1, 1)
    assert compare([right], [wrong], zero, "ece") == Interval(-1, -1, -1)
    result = compare([wrong], [right], zero, "nll")
    assert result.estimate == math.inf
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_errors_name_what_is_wrong():
    half, zero = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])
    with pytest.raises(ValueError, match="metric must be one of accuracy, ece, nll, brier, got 'f1'"):
        compare([half], [half], zero, "f1")
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        compare([half], [half], zero, level=95)
    with pytest.raises(ValueError, match="num_resamples must be 1 or more, got 0"):
        compare([half], [half], zero, num_resamples=0)
    with pytest.raises(ValueError, match="second: there is no seed"):
        compare([half], [], zero)
    one, two = (example_scores(half.expand(n, 2), zero.expand(n)) for n in (1, 2))
    with pytest.raises(ValueError, match="second has 2 examples, first 1; they must be the same ones"):
        paired_bootstrap([one], [two])

"""Intervals against SciPy's bootstrap, and how often they cover the truth."""

import functools
import math
from statistics import mean

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from bloblora.evaluation import Interval, example_scores, metrics, paired_bootstrap

METRICS = ("accuracy", "nll", "brier")


def population(n):
    """Targets, two seeds of an overconfident method and of one that is nearly calibrated, and the truth."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(n, 4, generator=generator, dtype=torch.float64)

    logits = 1.5 * noise()
    targets = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    over = [(2.5 * (logits + 0.8 * noise())).log_softmax(-1) for _ in range(2)]
    good = [(logits + 0.5 * noise()).log_softmax(-1) for _ in range(2)]
    return targets, over, good, logits.log_softmax(-1)


def difference(over, good, targets, metric):
    return mean(metrics(x, targets)[metric] for x in over) - mean(metrics(x, targets)[metric] for x in good)


def compare(first, second, targets, *arguments, **options):
    scores = ([example_scores(x, targets) for x in side] for side in (first, second))
    return paired_bootstrap(*scores, *arguments, **options)


@pytest.fixture(scope="module")
def of_rows():
    """Differences of all metrics on rows of a small population; SciPy's draws of one seed are the same for each."""
    targets, over, good, _ = population(150)

    @functools.cache
    def means(rows):
        rows = [*rows]
        both = ([metrics(x[rows], targets[rows]) for x in side] for side in (over, good))
        return [{name: mean(one[name] for one in side) for name in METRICS} for side in both]

    def of_rows(rows, metric):
        first, second = means(tuple(rows.tolist()))
        return first[metric] - second[metric]

    return of_rows


@pytest.mark.parametrize("metric", METRICS)
def test_equals_scipy(metric, of_rows):
    targets, over, good, _ = population(150)
    found = compare(over, good, targets, metric)
    assert found.estimate == pytest.approx(difference(over, good, targets, metric))
    expected = bootstrap(
        (np.arange(150),),
        lambda rows: of_rows(rows, metric),
        vectorized=False,
        n_resamples=400,
        method="percentile",
        random_state=0,
    )
    low, high = expected.confidence_interval
    # a quantile of 400 draws has an error of about 7 % of the interval's width
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.2 * (high - low))


def coverage(first, second, targets, metric, size):
    """How often the interval of a sample covers the population's difference, and the intervals' mean width."""
    truth = difference(first, second, targets, metric)
    hits, width = 0, 0.0
    for seed in range(200):
        rows = torch.randint(20_000, (size,), generator=torch.Generator().manual_seed(1000 + seed))
        samples = ([x[rows] for x in first], [x[rows] for x in second], targets[rows])
        interval = compare(*samples, metric, num_resamples=300, seed=seed)
        hits += interval.low <= truth <= interval.high
        width += (interval.high - interval.low) / 200
    return hits / 200, width


@pytest.mark.parametrize("metric", ["accuracy", "nll", pytest.param("brier", marks=pytest.mark.long)])
def test_covers_the_truth_as_often_as_it_says(metric):
    targets, over, good, _ = population(20_000)
    found, _ = coverage(over, good, targets, metric, 300)
    assert found == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 200))


@pytest.mark.parametrize(
    ("pair", "widest", "size"),
    [
        ("over good", 0.08, 150),
        ("over truth", 0.09, 450),
        ("good truth", 0.04, 150),
        pytest.param("over good", 0.08, 450, marks=pytest.mark.long),
        pytest.param("over truth", 0.09, 150, marks=pytest.mark.long),
        pytest.param("good truth", 0.04, 450, marks=pytest.mark.long),
    ],
)
def test_covers_the_calibration_error_with_few_examples_a_bin(pair, widest, size):
    """At least as often as stated; more often of two methods that are nearly calibrated, whose intervals are narrow."""
    targets, over, good, truth = population(20_000)
    sides = {"over": over, "good": good, "truth": [truth]}
    first, second = (sides[name] for name in pair.split())
    found, width = coverage(first, second, targets, "squared_calibration_error", size)
    assert found > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200)
    assert width < widest * math.sqrt(150 / size)


def test_pairs_examples_and_is_seeded():
    targets, over, good, _ = population(100)
    same = compare(over, over[::-1], targets, "nll")
    assert (same.estimate, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-12)
    wide, narrow = (compare(over, good, targets, "brier", level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert wide == compare(over, good, targets, "brier")
    assert wide != compare(over, good, targets, "brier", seed=1)


def test_many_examples_are_drawn_in_chunks():
    targets, over, good, _ = population(3000)
    few, many = (compare(over, good, targets, num_resamples=n) for n in (1000, 2000))
    assert few.estimate == many.estimate
    assert (few.low, few.high) == pytest.approx((many.low, many.high), abs=0.3 * (many.high - many.low))


def test_the_number_of_seeds_may_differ():
    targets, over, good, _ = population(50)
    found = compare(over, good[:1], targets, "brier").estimate
    scores = [metrics(x, targets)["brier"] for x in (*over, good[0])]
    assert found == pytest.approx((scores[0] + scores[1]) / 2 - scores[2])


def test_one_example_and_an_infinite_nll():
    right, wrong = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    zero = torch.tensor([0])
    assert compare([right], [wrong], zero) == Interval(1, 1, 1)
    assert compare([right], [wrong], zero, "squared_calibration_error") == Interval(0, 0, 0)  # no bin holds two
    result = compare([wrong], [right], zero, "nll")
    assert result.estimate == math.inf
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_errors_name_what_is_wrong():
    half, zero = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])
    with pytest.raises(
        ValueError,
        match=r"one of accuracy, squared_calibration_error, nll, brier, exact_match, .*, got 'f1'",
    ):
        compare([half], [half], zero, "f1")
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        compare([half], [half], zero, level=95)
    with pytest.raises(ValueError, match="num_resamples must be 1 or more, got 0"):
        compare([half], [half], zero, num_resamples=0)
    with pytest.raises(ValueError, match="second: there is no seed"):
        compare([half], [], zero)
    one, two = (example_scores(half.expand(n, 2), zero.expand(n)) for n in (1, 2))
    for second in ([two], [one, two]):
        with pytest.raises(ValueError, match="second has 2 examples, first 1; they must be the same ones"):
            paired_bootstrap([one], second)

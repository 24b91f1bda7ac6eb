"""Selective risk: by hand, against scipy's binomial test, and over many calibrations of models whose risk is known."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from bloblora.decision import fit_answering, fit_answering_by
from tests.decision.conftest import standard_error

SPLITS = 2000
RISK, LEVEL = 0.1, 0.95


def binary(confidence, wrong):
    """Two labels; the first is the answer."""
    confidence = torch.as_tensor(confidence, dtype=torch.float64)
    return torch.stack([confidence, 1 - confidence], -1), torch.as_tensor(wrong).long()


def fitted(confidence, wrong, **options):
    try:
        return fit_answering(*binary(confidence, wrong), **options)
    except ValueError as error:
        assert "no threshold" in str(error)  # noqa: PT017
        return None


class Model:
    """Whose answers of the most confident share u of inputs are wrong at a rate that is known."""

    def __init__(self, edges, rates):
        self.edges, self.rates = np.array([0, *edges, 1.0]), np.array(rates)

    def draw(self, n, generator):
        """Ranks u of n inputs, the most confident first, and whether their answers are wrong."""
        u = np.sort(generator.random(n))
        return u, generator.random(n) < self.rates[np.searchsorted(self.edges, u) - 1]

    def risk(self, u):
        """Of all inputs up to rank u."""
        widths = np.clip(u - self.edges[:-1], 0, np.diff(self.edges))
        return (self.rates * widths).sum() / u


FALLING = Model([0.3, 0.5, 0.7], [0.02, 0.08, 0.3, 0.6])  # above 0.1 where more than 54 % are answered
NEVER = Model([], [RISK + 1e-6])
TWICE = Model([0.02, 0.5], [0.6, 0.05, 0.5])  # also where 12 % or fewer are answered
TOP_ERRORS = {rate: Model([0.6], [rate, 0.3]) for rate in (0.02, 0.03)}  # as labels that are wrong at that rate give


def violations(model, choose, n=300):
    """How often the rule's true risk is above the stated one; ``choose`` gives how many are answered, or 0."""
    generator = np.random.default_rng(0)
    count = 0
    for _ in range(SPLITS):
        u, wrong = model.draw(n, generator)
        answered = choose(u, wrong)
        count += answered > 0 and model.risk(u[answered] if answered < n else 1.0) > RISK
    return count / SPLITS


def promised(u, wrong):
    rule = fitted(1 - u / 2, wrong, risk=RISK, level=LEVEL)
    return rule.num_answered if rule else 0


def counts_and_errors(wrong):
    return np.arange(1, len(wrong) + 1), wrong.cumsum()


def by_the_plain_rate(u, wrong):
    m, errors = counts_and_errors(wrong)
    return m[errors / m <= RISK].max(initial=0)


def by_the_best_of_many_tests(u, wrong):
    m, errors = counts_and_errors(wrong)
    return m[binom.cdf(errors, m, RISK) <= 1 - LEVEL].max(initial=0)


def by_one_start(u, wrong):
    m, errors = counts_and_errors(wrong)
    passed = binom.cdf(errors, m, RISK) <= 1 - LEVEL
    start = int(np.argmax(binom.cdf(1, m, RISK) <= 1 - LEVEL))
    return start + int(np.argmin([*passed[start:], False])) if passed[start] else 0


@pytest.mark.parametrize(
    ("model", "n", "least"),
    [
        (FALLING, 1000, 0.03),
        (NEVER, 150, 0.03),
        (TWICE, 300, 0),
        pytest.param(FALLING, 300, 0, marks=pytest.mark.long),
        pytest.param(NEVER, 300, 0, marks=pytest.mark.long),
    ],
)
def test_the_promise_fails_no_more_often_than_stated(model, n, least):
    assert least <= violations(model, promised, n) <= 1 - LEVEL + 3 * standard_error(1 - LEVEL, SPLITS)


@pytest.mark.parametrize(("rate", "n", "before", "now"), [(0.02, 500, 0.25, 0.002), (0.03, 500, 0.41, 0.01)])
def test_a_few_errors_among_the_most_confident_no_longer_end_the_search(rate, n, before, now):
    """How often nothing is promised, and how many are answered; the difference is over 10 standard errors."""
    generator = np.random.default_rng(1)
    drawn = [TOP_ERRORS[rate].draw(n, generator) for _ in range(500)]
    one, several = (np.array([choose(u, wrong) for u, wrong in drawn]) for choose in (by_one_start, promised))
    assert (one == 0).mean() == pytest.approx(before, abs=3 * standard_error(before, 500))
    assert (several == 0).mean() <= now + 3 * standard_error(now, 500)
    assert several.mean() > one.mean() + 10 * (several - one).std() / 500**0.5


def test_few_records_have_one_start():
    generator = np.random.default_rng(2)
    for _ in range(200):
        u, wrong = FALLING.draw(120, generator)
        assert promised(u, wrong) == by_one_start(u, wrong)


def test_the_promise_needs_the_bound_and_the_sequence():
    limit = 1 - LEVEL + 10 * standard_error(1 - LEVEL, SPLITS)
    assert violations(FALLING, by_the_plain_rate) > limit
    assert violations(NEVER, by_the_best_of_many_tests) > limit


def test_hand_computed_case():
    # 0.5^5 · (1 + 5) = 0.1875 and 0.5^4 · (1 + 4) = 0.3125: at level 0.8 one error may pass from 5 answers on, and
    # of 6 answers 2 don't: 0.5^6 · (1 + 6 + 15) = 0.344
    confidence = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65]
    rule = fitted(confidence, [0, 1, 0, 0, 0, 1, 1], risk=0.5, level=0.8)
    assert (rule.threshold, rule.num_answered, rule.num_wrong, rule.num_examples) == (0.7, 5, 1, 7)
    assert rule.answers(torch.tensor([0.71, 0.7, 0.2], dtype=torch.float64)).tolist() == [True, False, False]
    # all: 0.5^7 · (1 + 7) = 0.0625
    rule = fitted(confidence, [0, 0, 0, 0, 0, 0, 1], risk=0.5, level=0.8)
    assert (rule.threshold, rule.num_answered) == (0, 7)
    assert rule.promise == (
        "at most 0.5 of the answered are wrong, with probability 0.8, on data like the 7 calibration records"
    )


def test_hand_computed_case_of_two_starts():
    # of 30 at level 0.8 the starts are 6 with 0.16 (0.5^6 · 7 = 0.109; of 5 it is 0.187) and 0.5n = 15 with 0.04
    confidence = np.linspace(0.95, 0.55, 30)

    def answered(*wrong):
        return fitted(confidence, np.isin(np.arange(1, 31), wrong), risk=0.5, level=0.8).num_answered

    # 2 of 6 fail (0.344); 3 of 15 pass with the second start's share (0.018), 4 of 16 (0.038), 5 of 17 don't (0.072)
    assert answered(1, 2, 12, *range(16, 31)) == 16
    # 1 of 6 pass and 4 of 13 (0.133), so from 15 on there is 0.2: 6 of 17 pass (0.166), 7 of 18 don't (0.240)
    assert answered(6, 9, 12, 13, *range(16, 31)) == 17


def test_confidences_are_any_finite_numbers():
    """Ranked as they are, so that what is added to all of them changes the threshold alone."""
    confidence = torch.tensor([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65], dtype=torch.float64)
    wrong = torch.tensor([0, 1, 0, 0, 0, 1, 1])
    rule = fit_answering_by(confidence - 1500, wrong == 0, risk=0.5, level=0.8)
    assert (rule.threshold, rule.num_answered, rule.num_wrong) == (pytest.approx(0.7 - 1500), 5, 1)
    assert rule.answers(confidence - 1500).tolist() == [True] * 5 + [False] * 2
    everything = fit_answering_by(confidence - 1500, torch.ones(7), risk=0.5, level=0.8)
    assert everything.num_answered == 7
    assert everything.answers(torch.tensor([-1e9, 0.0])).all()
    assert fit_answering_by(torch.zeros(7), torch.ones(7), risk=0.5, level=0.8).num_answered == 7
    with pytest.raises(ValueError, match="confidence: must be 7 finite numbers, one for each answer"):
        fit_answering_by(confidence.log() - torch.inf, wrong == 0, risk=0.5, level=0.8)


def test_equal_confidences_are_answered_together():
    # five answers pass, but the sixth is as sure as the fifth, and with it two errors don't
    assert fitted([0.9, 0.9, 0.9, 0.9, 0.7, 0.7], [0, 0, 0, 0, 1, 1], risk=0.5, level=0.8) is None
    rule = fitted([0.9] * 8, [0, 0, 0, 0, 0, 0, 0, 1], risk=0.5, level=0.8)
    assert (rule.threshold, rule.num_answered) == (0, 8)


def test_the_test_is_scipys_upper_clopper_pearson_bound():
    u, wrong = FALLING.draw(150, np.random.default_rng(10))
    rule = fitted(1 - u / 2, wrong, risk=RISK, level=LEVEL)

    def bound(m):
        test = binomtest(int(wrong[:m].sum()), m, alternative="less")
        return test.proportion_ci(LEVEL, "exact").high

    assert rule.num_wrong == wrong[: rule.num_answered].sum() > 0
    assert bound(rule.num_answered) <= RISK < bound(rule.num_answered + 1)


def test_what_cannot_be_promised():
    confidence, wrong = np.linspace(0.99, 0.51, 60), np.arange(60) % 5 == 4
    with pytest.raises(
        ValueError, match=r"no threshold on these 60 records promises a risk of 0\.1 with .* 0\.9"
    ) as error:
        fit_answering(*binary(confidence, wrong), risk=0.1, level=0.9)
    least = float(str(error.value).rpartition(" ")[2])
    assert fitted(confidence, wrong, risk=least, level=0.9)
    assert fitted(confidence, wrong, risk=least - 0.001, level=0.9) is None
    # 0.95^93 + 93 · 0.05 · 0.95^92 = 0.0499, and with 92 it is 0.0522
    with pytest.raises(ValueError, match=r"risk 0\.05 with probability 0\.95 needs at least 93 records .* got 60"):
        fit_answering(*binary(confidence, wrong))
    with pytest.raises(ValueError, match=r"at least 4743863 records"):
        fit_answering(*binary(confidence, wrong), risk=1e-6)
    with pytest.raises(ValueError, match=r"promises a risk of 0\.9 with probability 0\.95$"):
        fit_answering(*binary(confidence, np.ones(60)), risk=0.9)
    with pytest.raises(ValueError, match=r"risk must be in \(0, 1\), got 5"):
        fit_answering(*binary(confidence, wrong), risk=5)
    with pytest.raises(ValueError, match="row 0 sums to 2"):
        fit_answering(binary(confidence, wrong)[0] * 2, torch.zeros(60, dtype=torch.long), risk=0.5)

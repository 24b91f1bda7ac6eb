"""Intervals of values: the share that holds the right one, over many simulated calibrations."""

import pytest
import torch

from bloblora.decision import Decision, Intervals, PromiseError, fit_decision, fit_intervals
from bloblora.prediction import ValuePrediction
from bloblora.tasks import Gaussian


@pytest.mark.parametrize(("n", "coverage"), [(19, 0.9), (60, 0.8)])
def test_coverage_is_at_least_what_is_promised_and_hardly_more(n, coverage):
    """The model's noise is wrong by a factor, and differs between inputs; the promise is of k/(n + 1), k of n."""
    torch.manual_seed(0)
    repetitions, held = 1500, []
    for _ in range(repetitions):
        std = torch.rand(n + 40) + 0.1
        targets = 3 * torch.randn(n + 40) * std
        rule = fit_intervals(torch.zeros(n), std[:n], targets[:n], coverage)
        low, high = rule.intervals(torch.zeros(40), std[n:]).unbind(-1)
        held.append(((low <= targets[n:]) & (targets[n:] <= high)).double().mean())
    held = torch.stack(held)
    error = (held.std() / repetitions**0.5).item()
    expected = -(-(n + 1) * coverage // 1) / (n + 1)
    assert held.mean().item() == pytest.approx(expected, abs=4 * error)
    assert expected >= coverage


def test_the_threshold_is_the_order_statistic_of_the_finite_sample():
    """Residuals 1..9 of a standard deviation of 2: 0.8 · 10 = 8th smallest, 8/2."""
    rule = fit_intervals(torch.zeros(9), torch.full((9,), 2.0), torch.arange(1.0, 10.0), 0.8)
    assert rule == Intervals(0.8, 4.0, 9)
    with pytest.raises(PromiseError, match=r"coverage 0\.95 needs at least 19 records"):
        fit_intervals(torch.zeros(9), torch.ones(9), torch.ones(9), 0.95)


def test_a_decision_of_values_has_intervals_and_scope():
    torch.manual_seed(0)
    likelihood = Gaussian(10.0, 2.0)
    prediction = ValuePrediction(Gaussian.of(torch.randn(4, 30), torch.ones(4, 30)), 4, likelihood)
    targets = prediction.mean + 2 * torch.randn(30)
    decision = fit_decision(prediction, targets, coverage=0.7, false_alarm=0.2)
    assert {*decision.promises} == {"intervals", "scope"}
    assert decision.decide(prediction).out_of_scope.sum() == 5  # above the ⌈31 · 0.8⌉ = 25th
    with pytest.raises(ValueError, match="risk, confidence and label_sets are for classes that exclude each other"):
        fit_decision(prediction, targets, risk=0.1)
    with pytest.raises(ValueError, match="score epistemic_std is not defined for a single draw; take std"):
        fit_decision(ValuePrediction(prediction.logits[:1], 0, likelihood), targets, score="epistemic_std")
    assert Decision.from_dict(decision.to_dict()) == decision
    found = decision.realized(prediction, targets)
    assert found["promised_coverage"] == 22 / 30  # the k-th smallest of n, k = ⌈31 · 0.7⌉
    expected = 2 * decision.intervals.threshold * prediction.std.mean().item()
    assert found["promised_width"] == pytest.approx(expected)

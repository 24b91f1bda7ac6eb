"""The out-of-scope flag: by hand, by its conformal p-value, and by the exact law of its false alarms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom

from bloblora.decision import fit_scope


def test_hand_computed_case():
    rule = fit_scope(torch.arange(1, 20) / 10, 0.1)  # the ⌈20 · 0.9⌉ = 18th of 19
    assert rule.threshold == pytest.approx(1.8)
    assert rule.flags(torch.tensor([1.79, 1.81])).tolist() == [False, True]
    assert rule.promise.startswith("at most 0.1 of inputs in scope are flagged on average, and at most 0.2")


@given(st.lists(st.integers(0, 6), min_size=9, max_size=40), st.integers(0, 7), st.integers(10, 90))
def test_flagged_is_a_small_p_value(scores, new, percent):
    """With ties too."""
    rule = fit_scope(torch.tensor(scores).double(), percent / 100)
    p_value = (1 + sum(score >= new for score in scores)) / (len(scores) + 1)
    assert rule.flags(torch.tensor([float(new)])).item() == (p_value <= percent / 100 + 1e-9)


def test_false_alarms_follow_their_law():
    n, m, rate, splits = 60, 100, 0.1, 3000
    scores = torch.tensor(np.random.default_rng(0).exponential(size=(splits, n + m)))
    alarms = np.array([int(fit_scope(row[:n], rate).flags(row[n:]).sum()) for row in scores])
    k = 55  # ⌈61 · 0.9⌉
    law, uncorrected = betabinom(m, n + 1 - k, k), betabinom(m, n + 2 - k, k - 1)
    error = law.std() / splits**0.5
    assert abs(alarms.mean() - law.mean()) < 3 * error < abs(law.mean() - uncorrected.mean())
    assert alarms.var() == pytest.approx(law.var(), rel=0.1)
    assert law.mean() <= rate * m < uncorrected.mean()


def test_errors_say_what_would_be_right():
    with pytest.raises(ValueError, match=r"false_alarm 0\.05 needs at least 19 records to calibrate on, got 18"):
        fit_scope(torch.arange(18).double())
    with pytest.raises(ValueError, match=r"false_alarm must be in \(0, 1\), got 5"):
        fit_scope(torch.arange(18).double(), 5)
    with pytest.raises(ValueError, match="mutual_information: score 1 is NaN"):
        fit_scope(torch.tensor([0.0, torch.nan]), 0.5, "mutual_information")
    with pytest.raises(ValueError, match="score must be one of predictive_entropy, mutual_information, std"):
        fit_scope(torch.zeros(20), 0.5, "labels")

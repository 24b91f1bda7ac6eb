"""Promises about texts: by hand, and over many calibrations of answers whose truth is known."""

import numpy as np
import pytest
import torch

from bloblora.decision import (
    Correctness,
    CorrectnessError,
    PromiseError,
    confidence_of,
    fit_answer_sets,
    fit_text_decision,
)
from tests.decision.conftest import standard_error

SPLITS = 300
MISS = torch.inf


def test_a_share_of_wrong_texts_above_the_risk_is_as_rare_as_promised():
    """p_correct of the score s is σ(2s); a text is right with probability σ(s), so the map is overconfident."""
    generator = torch.Generator().manual_seed(0)
    correctness = Correctness("platt", ("log_probability",), {"weights": [2.0], "intercept": 0.0}, 99, 50, {})
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)  # scores are uniform
    risk_above = (1 - grid.sigmoid()).flip(0).cumsum(0).flip(0) / torch.arange(len(grid), 0, -1)
    failed = answered = 0
    for _ in range(SPLITS):
        scores = {"log_probability": torch.rand(200, generator=generator, dtype=torch.float64) * 8 - 4}
        right = torch.rand(200, generator=generator) < scores["log_probability"].sigmoid()
        confidence = confidence_of(scores, "p_correct", correctness)
        try:
            rule = fit_text_decision(confidence, right, risk=0.25, level=0.9).answering
        except PromiseError:
            continue
        answered += 1
        first = int(rule.answers(correctness.probabilities({"log_probability": grid})).double().argmax())
        failed += bool(risk_above[first] > 0.25)
    assert answered > 0.9 * SPLITS
    assert 0.02 * SPLITS < failed <= (0.1 + 3 * standard_error(0.1, SPLITS)) * SPLITS


@pytest.mark.parametrize("coverage", [0.6, 0.8])
def test_answer_sets_hold_a_right_answer_as_often_as_promised(coverage):
    """Of the lists 0.86 hold one, at a place up to 5; on average, and in 95 % of calibrations at least what is said."""
    generator = np.random.default_rng(1)
    shares = np.array([0.4, 0.25, 0.12, 0.06, 0.03])
    places = np.array([1.0, 2, 3, 4, 5, np.inf])
    found, below = [], 0
    for _ in range(SPLITS):
        ranks = generator.choice(places, 100, p=[*shares, 1 - shares.sum()])
        try:
            rule = fit_answer_sets(torch.tensor(ranks), coverage)
        except PromiseError:
            found.append(1.0)  # no set, and no promise that fails
            continue
        found.append(shares[: rule.threshold].sum())
        below += found[-1] < float(rule.promise.split("at least ")[2].split(" ")[0]) - 5e-4  # which has three digits
    assert np.mean(found) >= coverage - 3 * np.std(found) / SPLITS**0.5
    assert below / SPLITS <= 0.05 + 3 * standard_error(0.05, SPLITS)


def test_hand_computed_sets():
    # of 5 records ⌈6 · 0.5⌉ = 3, ⌈6 · 0.6⌉ = 4 and ⌈6 · 0.7⌉ = 5; the fourth is the last that holds one, so 4/6
    ranks = torch.tensor([3, 1, MISS, 2, 1])
    assert [fit_answer_sets(ranks, share).threshold for share in (0.3, 0.5, 0.6)] == [1, 2, 3]
    with pytest.raises(PromiseError, match=r"for 1 of 5 records no answer is right; the most that could be is 0\.666"):
        fit_answer_sets(ranks, 0.7)
    assert fit_answer_sets(ranks, 0.666).threshold == 3
    with pytest.raises(PromiseError, match="for 5 of 5 records no answer is right; no coverage could be"):
        fit_answer_sets(torch.full((5,), MISS), 0.5)
    with pytest.raises(PromiseError, match=r"coverage 0\.9 needs at least 9 records to calibrate on, got 5"):
        fit_answer_sets(ranks, 0.9)
    with pytest.raises(ValueError, match="ranks must be 1 or more"):
        fit_answer_sets(torch.zeros(9), 0.5)
    assert fit_answer_sets(ranks, 0.5).promise.startswith(
        "at least 0.5 of the answer sets hold a right answer on average"
    )


def test_what_a_promise_lacks_is_said():
    """0.5^5 · 6 = 0.1875: at level 0.8 and risk 0.5 one of five may be wrong."""
    right = torch.tensor([True, False, True, True, True, False, False])
    confidence = torch.linspace(-1, -2, 7).exp()
    found = fit_text_decision(confidence, right, MISS * torch.ones(7), score="log_probability", risk=0.5, level=0.8)
    assert (found.answering.score, found.answering.num_answered) == ("log_probability", 5)
    assert found.refused["answer_sets"].startswith("coverage 0.9 needs")
    assert found.from_dict(found.to_dict()) == found
    with pytest.raises(PromiseError, match=r"needs at least .* records to calibrate on, got 7"):
        fit_text_decision(confidence, right)
    with pytest.raises(ValueError, match="p_correct: must be 7 finite numbers"):
        fit_text_decision(confidence * MISS, right, risk=0.5, level=0.8)


def test_long_texts_are_told_apart_by_their_log_probability():
    """Of -1,500 to -800 nats e^s is 0 in float64; the more probable half is right."""
    scores, right = {"sequence_log_probability": torch.linspace(-1500, -800, 200)}, torch.arange(200) >= 100
    confidence = confidence_of(scores, "sequence_log_probability", None)
    rule = fit_text_decision(confidence, right, score="sequence_log_probability", risk=0.2, level=0.9).answering
    assert rule.num_answered - rule.num_wrong == 100
    assert rule.num_wrong < 25
    assert rule.answers(confidence).sum() == rule.num_answered


def test_the_confidence_of_a_score():
    scores = {
        "sequence_log_probability": torch.tensor([-2.0, 0.0]),
        "mutual_information": torch.tensor([0.5, 0.0]),
        "agreement": torch.tensor([0.25, 1.0]),
    }
    for name, expected in (
        ("sequence_log_probability", [-2, 0]),
        ("mutual_information", [-0.5, 0]),
        ("agreement", [0.25, 1]),
    ):
        assert confidence_of(scores, name, None).tolist() == pytest.approx(expected)
    with pytest.raises(
        CorrectnessError, match=r"by: must be one of p_correct, sequence_log_probability, .* got 'rank'"
    ):
        confidence_of(scores, "rank", None)

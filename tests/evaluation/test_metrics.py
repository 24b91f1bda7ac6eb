"""Metrics against hand-computed cases and scikit-learn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from bloblora.evaluation import metrics, ood_metrics


def random_case(n=200, c=5):
    log_probs = (torch.randn(n, c) * 2).double().log_softmax(-1)
    return log_probs, torch.randint(0, c, (n,))


def test_hand_computed_case():
    # confidences .9 (right), .9 (wrong), .6 (right): bins of .9 has accuracy .5, of .6 has 1
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]).double()
    result = metrics(probs.log(), torch.tensor([0, 1, 1]))
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["ece"] == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)
    assert result["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.6)) / 3)
    assert result["brier"] == pytest.approx((2 * 0.01 + 2 * 0.81 + 2 * 0.16) / 3)
    assert result["num_examples"] == 3


def test_against_scikit_learn():
    log_probs, targets = random_case()
    result = metrics(log_probs, targets)
    assert result["nll"] == pytest.approx(log_loss(targets, log_probs.exp(), labels=range(5)))
    binary, truth = random_case(c=2)
    # scikit-learn's binary score counts one of the two classes, whose errors are equal
    brier = brier_score_loss(truth, binary[:, 1].exp())
    assert metrics(binary, truth)["brier"] == pytest.approx(2 * brier)
    inside, outside = torch.randn(50), torch.randn(70) + 0.7
    auroc = ood_metrics({"predictive_entropy": inside}, {"predictive_entropy": outside})
    expected = roc_auc_score([0] * 50 + [1] * 70, torch.cat([inside, outside]))
    assert auroc["auroc_predictive_entropy"] == pytest.approx(expected, abs=1e-6)
    confidence = ood_metrics({"confidence": -inside}, {"confidence": -outside})
    assert confidence["auroc_confidence"] == pytest.approx(expected, abs=1e-6)


def test_ece_equals_torchmetrics_where_no_confidence_lies_on_an_edge():
    from torchmetrics.functional.classification import multiclass_calibration_error

    log_probs, targets = random_case()
    expected = multiclass_calibration_error(log_probs.exp(), targets, num_classes=5, n_bins=15)
    assert metrics(log_probs, targets)["ece"] == pytest.approx(expected.item(), abs=1e-6)


def test_perfect_prediction_and_missing_choices():
    log_probs = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    result = metrics(log_probs, torch.tensor([0, 1]))
    assert (result["accuracy"], result["ece"], result["nll"], result["brier"]) == (1, 0, 0, 0)


def test_equal_scores_are_no_better_than_chance():
    auroc = ood_metrics({"mutual_information": torch.zeros(4)}, {"mutual_information": torch.zeros(3)})
    assert auroc["auroc_mutual_information"] == 0.5


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"row 1 sums to 0\.5"):
        metrics(torch.tensor([[0.5, 0.5], [0.25, 0.25]]).log(), torch.tensor([0, 1]))
    half = torch.tensor([[0.5, 0.5]]).log()
    for target in (2, -1):
        with pytest.raises(ValueError, match=rf"targets must be in 0\.\.1, got {target} in row 0"):
            metrics(half, torch.tensor([target]))
    with pytest.raises(ValueError, match=r"targets must be integers, got torch\.float32"):
        metrics(half, torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"got \(0, 2\) and \(0,\)"):
        metrics(half[:0], torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="row 1 has a NaN"):
        metrics(torch.tensor([[0.0, -math.inf], [0.0, math.nan]]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"must not be above 0, got 0\.5; if these are probabilities"):
        metrics(half.exp(), torch.tensor([0]))
    with pytest.raises(ValueError, match="num_bins must be 1 or more, got 0"):
        metrics(half, torch.tensor([0]), num_bins=0)
    with pytest.raises(ValueError, match=r"confidence out of scope: scores must be \(n,\) with n > 0"):
        ood_metrics({"confidence": torch.ones(2)}, {"confidence": torch.ones(0)})
    with pytest.raises(ValueError, match="predictive_entropy in scope: score 1 is NaN"):
        ood_metrics({"predictive_entropy": torch.tensor([1, math.nan])}, {"predictive_entropy": torch.ones(2)})
    with pytest.raises(ValueError, match="scores differ"):
        ood_metrics({"confidence": torch.ones(2)}, {})


def test_one_example_and_an_impossible_target():
    result = metrics(torch.tensor([[0.7, 0.3]]).log(), torch.tensor([1]))
    assert result["ece"] == pytest.approx(0.7)
    assert result["num_examples"] == 1
    assert metrics(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))["nll"] == math.inf


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0, 30), st.integers(1, 20), st.integers(0, 2**31))
def test_ranges_and_order_of_rows(n, c, sharpness, num_bins, seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (torch.randn(n, c, generator=generator) * sharpness).log_softmax(-1)
    targets = torch.randint(0, c, (n,), generator=generator)
    result = metrics(log_probs, targets, num_bins)
    assert 0 <= result["accuracy"] <= 1
    assert 0 <= result["ece"] <= 1
    assert 0 <= result["brier"] <= 2 + 1e-9
    order = torch.randperm(n, generator=generator)
    assert metrics(log_probs[order], targets[order], num_bins) == pytest.approx(result, abs=1e-9)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 20))
def test_certain_and_right_is_perfect(targets, num_bins):
    targets = torch.tensor(targets)
    log_probs = torch.nn.functional.one_hot(targets, 5).double().log()
    result = metrics(log_probs, targets, num_bins)
    assert (result["accuracy"], result["ece"], result["nll"], result["brier"]) == (1, 0, 0, 0)
    wrong = metrics(log_probs.roll(1, -1), targets, num_bins)
    assert (wrong["accuracy"], wrong["ece"], wrong["nll"], wrong["brier"]) == (0, 1, math.inf, 2)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
)
def test_auroc_equals_scikit_learn_with_ties_and_any_scale(inside, outside):
    score = (
        {"score": torch.tensor(inside, dtype=torch.float64)},
        {"score": torch.tensor(outside, dtype=torch.float64)},
    )
    expected = roc_auc_score([0] * len(inside) + [1] * len(outside), inside + outside)
    assert ood_metrics(*score)["auroc_score"] == pytest.approx(expected, abs=1e-6)

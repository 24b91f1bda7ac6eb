"""Metrics against hand-computed cases and scikit-learn."""

import math

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from bloblora.evaluation import metrics, ood_metrics, reliability, reliability_diagram


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


def test_bins_are_closed_on_the_right():
    bins = reliability(torch.tensor([[1.0, 0.0], [0.8, 0.2]], dtype=torch.float64), torch.tensor([0, 0]), num_bins=5)
    assert bins.count.tolist() == [0, 0, 0, 1, 1]


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="row 1 sums to 0.5"):
        metrics(torch.tensor([[0.5, 0.5], [0.25, 0.25]]).log(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"targets must be in 0\.\.1, got up to 2"):
        metrics(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([2]))
    with pytest.raises(ValueError, match="needs inputs in and out"):
        ood_metrics({"confidence": torch.ones(2)}, {"confidence": torch.ones(0)})


def test_diagram_is_a_png(tmp_path):
    log_probs, targets = random_case()
    reliability_diagram({"a": (log_probs.exp(), targets)}, tmp_path / "plots" / "r.png")
    assert (tmp_path / "plots" / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

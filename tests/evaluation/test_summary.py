"""The summary of real predictions: its names, its parts, and that it is always defined."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from bloblora.evaluation import brier_parts, classwise_ece, equal_mass_ece, metrics, risk_coverage, summary
from bloblora.prediction import Prediction

INSIDE = [
    *("accuracy", "ece", "ece_floor", "ece_floor_std", "squared_calibration_error", "nll", "brier", "num_examples"),
    *("num_samples", "num_draws", "ece_equal_mass", "ece_classwise"),
    *("brier_uncertainty", "brier_resolution", "brier_reliability"),
    *("brier_within_bin_variance", "brier_within_bin_covariance", "aurc"),
    *("selective_accuracy_50", "selective_accuracy_80", "selective_accuracy_90", "selective_accuracy_95"),
]
SCORES = ("confidence", "predictive_entropy", "mutual_information")


def predict(n, draws=4, c=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Prediction((2 * torch.randn(draws, n, c, generator=generator)).log_softmax(-1), draws)


def test_names_and_values():
    inside, outside, targets = predict(200), predict(60, seed=1), torch.arange(200) % 5
    result = summary(inside, targets, outside)
    assert list(result) == INSIDE + [f"{kind}_{score}" for score in SCORES for kind in ("auroc", "fpr95")]
    assert json.loads(json.dumps(result)) == result

    arguments = inside.log_probabilities, targets
    assert result.items() >= metrics(*arguments).items()
    assert result["ece_equal_mass"] == equal_mass_ece(*arguments)
    assert result["ece_classwise"] == classwise_ece(*arguments)
    assert result["brier_resolution"] == brier_parts(*arguments)["resolution"]
    curve = risk_coverage(inside.confidence, inside.labels == targets)
    assert (result["aurc"], result["selective_accuracy_80"]) == (curve.aurc, curve.accuracy(0.8))
    entropy = torch.cat([inside.predictive_entropy, outside.predictive_entropy])
    expected = roc_auc_score([0] * 200 + [1] * 60, entropy)
    assert result["auroc_predictive_entropy"] == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
def test_no_value_is_ever_nan(n, c, seed):
    """One example, one class, certainty, ties, choices that are missing."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-1, 2, (2, n, c), generator=generator) * 1000.0
    lacks = torch.rand(n, c, generator=generator) < 0.3
    lacks[:, 0] = False
    prediction = Prediction(logits.masked_fill(lacks, -math.inf).log_softmax(-1), 2)
    result = summary(prediction, torch.zeros(n, dtype=torch.long), prediction)
    assert not any(map(math.isnan, result.values()))
    assert all(math.isfinite(value) for name, value in result.items() if name != "nll")

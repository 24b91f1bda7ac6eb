"""FPR95 by hand and against scikit-learn's ROC curve; AUROC is tested in test_metrics.py."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from bloblora.evaluation import ood_metrics


def fpr95(inside, outside, name="score"):
    sides = ({name: torch.tensor(side, dtype=torch.float64)} for side in (inside, outside))
    return ood_metrics(*sides)[f"fpr95_{name}"]


def test_hand_computed_case():
    # 19 of 20 out-of-scope scores are 2..20, so 2 is the threshold; it flags two of the four in scope
    assert fpr95([0.0, 1.5, 2.0, 30.0], list(range(1, 21))) == 0.5
    assert fpr95([1.0, 2.0], [3.0]) == 0
    assert fpr95([3.0], [1.0, 2.0]) == 1


def test_confidence_counts_the_other_way():
    assert fpr95([0.9, 0.8, 0.3], [0.4, 0.5], "confidence") == pytest.approx(1 / 3)


def test_equal_scores_flag_everything():
    assert fpr95([0.0, 0.0], [0.0]) == 1


scores = st.lists(st.one_of(st.floats(-1e3, 1e3), st.integers(0, 3).map(float)), min_size=1, max_size=45)


@given(scores, scores)
def test_equals_scikit_learn_with_ties(inside, outside):
    labels = [0] * len(inside) + [1] * len(outside)
    false_alarms, found, _ = roc_curve(labels, inside + outside, drop_intermediate=False)
    # 19/20 and 0.95 differ by rounding
    assert fpr95(inside, outside) == pytest.approx(false_alarms[np.argmax(found >= 0.95 - 1e-9)])

"""Calibration errors and the parts of the Brier score: by hand, torchmetrics, scikit-learn, and a sum that is exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error

from bloblora.evaluation import BinGaps, brier_parts, classwise_ece, ece_floor, equal_mass_ece, metrics

INF = math.inf


def binary(*confidences):
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p, 1 - p], -1).log()


def with_missing_choices(n, c, seed, sharpness=2.0):
    """Like multiple choice: each input has at least its target and lacks some of the rest."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, c, (n,), generator=generator)
    lacks = torch.rand(n, c, generator=generator) < 0.3
    lacks[torch.arange(n), targets] = False
    logits = sharpness * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return logits.masked_fill(lacks, -INF).log_softmax(-1), targets


def total(parts):
    return (
        parts["uncertainty"]
        - parts["resolution"]
        + parts["reliability"]
        + parts["within_bin_variance"]
        - parts["within_bin_covariance"]
    )


def test_equal_mass_by_hand():
    # bins {.6 wrong, .7 right} and {.8 right, .9 right}: gaps .65 - .5 and .85 - 1
    log_probs, targets = binary(0.9, 0.6, 0.8, 0.7), torch.tensor([0, 1, 0, 0])
    assert equal_mass_ece(log_probs, targets, num_bins=2) == pytest.approx(0.15)


def test_equal_mass_equals_scikit_learn():
    log_probs = (torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) * 2).double().log_softmax(-1)
    targets = torch.arange(300) % 4
    confidence, answer = log_probs.exp().max(-1)
    accuracy, mean = calibration_curve(answer == targets, confidence, n_bins=15, strategy="quantile")
    assert equal_mass_ece(log_probs, targets) == pytest.approx(np.abs(accuracy - mean).mean())


def test_equal_mass_with_ties_depends_on_no_order():
    # of the four at .8 one is wrong, wherever it stands: each bin is .8 sure and .75 right
    for wrong in range(4):
        targets = torch.nn.functional.one_hot(torch.tensor(wrong), 4)
        assert equal_mass_ece(binary(*[0.8] * 4), targets, num_bins=2) == pytest.approx(0.05)


def test_equal_mass_with_fewer_examples_than_bins():
    assert equal_mass_ece(binary(0.7), torch.tensor([1])) == pytest.approx(0.7)
    assert equal_mass_ece(binary(0.7, 0.9), torch.tensor([1, 0])) == pytest.approx((0.7 + 0.1) / 2)


def test_classwise_by_hand_with_a_class_that_an_input_lacks():
    log_probs = torch.tensor([[0.75, 0.25, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]]).log()
    # two bins: class 0 {.25 of outcome 0}, {.75 of 1}; class 1 {.25, .25 of 0 and 1}; class 2 {.5 of 0}; 3 has no input
    expected = ((0.25 + 0.25) / 2 + abs(0.25 - 0.5) + 0.5) / 3
    assert classwise_ece(log_probs, torch.tensor([0, 1]), num_bins=2) == pytest.approx(expected)


def test_classwise_equals_torchmetrics():
    log_probs = (torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 2).log_softmax(-1)
    targets = torch.arange(200) % 5
    each = [binary_calibration_error(log_probs[:, c].exp(), (targets == c).long(), n_bins=15) for c in range(5)]
    assert classwise_ece(log_probs, targets) == pytest.approx(sum(each).item() / 5, abs=1e-6)


def test_classwise_counts_a_target_held_impossible():
    certain = torch.tensor([[0.0, -INF, -INF]])
    assert classwise_ece(certain, torch.tensor([0])) == 0
    assert classwise_ece(certain, torch.tensor([1])) == 1


def test_brier_parts_by_hand():
    # class 0 (class 1 mirrors it), two bins: {.25 of 0, .25 of 1} and {.75 of 1, .875 of 1}; base rate .75
    parts = brier_parts(binary(0.25, 0.25, 0.75, 0.875), torch.tensor([1, 0, 0, 0]), num_bins=2)
    assert parts == pytest.approx(
        {
            "uncertainty": 2 * 0.75 * 0.25,
            "resolution": 2 * (0.25**2 + 0.25**2) / 2,
            "reliability": 2 * (0.25**2 + 0.1875**2) / 2,
            "within_bin_variance": 2 * (0 + 0.0625**2) / 2,
            "within_bin_covariance": 0,
        }
    )


def test_brier_parts_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    log_probs, targets = binary(*torch.rand(500, generator=generator)), torch.arange(500) % 3 % 2
    p, outcome = log_probs[:, 0].exp().numpy(), (targets == 0).numpy()
    rate, mean = calibration_curve(outcome, p, n_bins=15)
    share = np.histogram(p, bins=15, range=(0, 1))[0] / 500
    parts = brier_parts(log_probs, targets)
    assert parts["uncertainty"] == pytest.approx(2 * outcome.var())
    assert parts["reliability"] == pytest.approx(2 * share @ (mean - rate) ** 2)
    assert parts["resolution"] == pytest.approx(2 * share @ (rate - outcome.mean()) ** 2)


@given(st.integers(1, 60), st.integers(1, 6), st.floats(0, 30), st.integers(1, 20), st.integers(0, 2**31))
def test_brier_parts_sum_to_the_score(n, c, sharpness, num_bins, seed):
    log_probs, targets = with_missing_choices(n, c, seed, sharpness)
    parts = brier_parts(log_probs, targets, num_bins)
    assert total(parts) == pytest.approx(metrics(log_probs, targets)["brier"], abs=1e-9)
    assert min(value for name, value in parts.items() if name != "within_bin_covariance") >= 0


def test_brier_parts_where_only_one_class_occurs():
    parts = brier_parts(binary(0.7, 0.7), torch.tensor([0, 0]))
    assert parts.pop("reliability") == pytest.approx(2 * 0.3**2)
    assert parts == pytest.approx(dict.fromkeys(parts, 0))


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 20), st.integers(0, 2**31))
def test_ranges_and_order_of_rows(n, c, num_bins, seed):
    log_probs, targets = with_missing_choices(n, c, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for error in (equal_mass_ece, classwise_ece):
        value = error(log_probs, targets, num_bins)
        assert 0 <= value <= 1
        assert error(log_probs[order], targets[order], num_bins) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("function", [equal_mass_ece, classwise_ece, brier_parts])
def test_errors_name_what_is_wrong(function):
    with pytest.raises(ValueError, match="num_bins must be 1 or more, got 0"):
        function(binary(0.5), torch.tensor([0]), num_bins=0)
    with pytest.raises(ValueError, match=r"exp\(log_probabilities\): row 0 sums to 0\.75, must be 1"):
        function(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0]))


def four_classes(n, seed):
    """Log-probabilities of a model, and many label vectors of which they are the truth, (400, n)."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (1.5 * torch.randn(n, 4, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return log_probs, log_probs.exp().multinomial(400, replacement=True, generator=generator).T


@pytest.mark.parametrize("n", [60, 500])
def test_the_floor_is_the_ece_of_labels_drawn_from_the_probabilities(n):
    log_probs, labels = four_classes(n, seed=n)
    eces = torch.tensor([metrics(log_probs, row)["ece"] for row in labels], dtype=torch.float64)
    floor = ece_floor(log_probs, labels[0])
    assert floor["mean"] == pytest.approx(eces.mean().item(), abs=4 * eces.std().item() * (1 / 400 + 1 / 1000) ** 0.5)
    # of a standard deviation from m draws the error is 1/√(2m) of it, 3.5 % and 2.2 %
    assert floor["std"] == pytest.approx(eces.std().item(), rel=0.17)
    assert floor == ece_floor(log_probs, labels[1])  # the labels at hand have no effect
    assert metrics(log_probs, labels[0])["ece_floor"] == floor["mean"]


def test_the_floor_of_one_record_is_known_and_of_certain_ones_is_0():
    log_probs, zero = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0])
    floor = ece_floor(log_probs, zero)  # the ECE is 0.1 with probability 0.9, else 0.9: mean 0.18, deviation 0.24
    assert (floor["mean"], floor["std"]) == pytest.approx((0.18, 0.24), abs=0.04)
    certain = torch.tensor([[0.0, -math.inf]] * 3)
    assert ece_floor(certain, torch.zeros(3, dtype=torch.long)) == {"mean": 0, "std": 0}


@pytest.mark.parametrize("n", [20, 150])
def test_the_squared_calibration_error_has_no_bias_where_the_model_is_calibrated(n):
    """And the spread of its mean over 400 draws of the labels is the test's tolerance: 4 standard errors."""
    log_probs, labels = four_classes(n, seed=n)
    found = torch.tensor([metrics(log_probs, row)["squared_calibration_error"] for row in labels])
    assert abs(found.mean()) < 4 * found.std() / 400**0.5
    assert (found < 0).double().mean() > 0.3
    squares = torch.tensor([metrics(log_probs, row)["ece"] ** 2 for row in labels])
    assert squares.mean() > 8 * found.std() / 400**0.5  # an ECE's square is far from 0


def test_the_squared_calibration_error_has_no_bias_where_the_error_is_known():
    """Confidences in (0.6, 0.65) and (0.87, 0.92), of mean 0.625 and 0.895; right 0.5 and 0.8 of the time."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2000, 40, generator=generator, dtype=torch.float64) < 0.4
    inner = 0.05 * torch.rand(2000, 40, generator=generator, dtype=torch.float64)
    confidence = inner + torch.where(low, 0.6, 0.87)
    right = torch.rand(2000, 40, generator=generator, dtype=torch.float64) < torch.where(low, 0.5, 0.8)
    found = torch.tensor(
        [BinGaps.of({"confidence": c, "accuracy": r}).squared_error() for c, r in zip(confidence, right, strict=True)]
    )
    truth = 0.4 * 0.125**2 + 0.6 * 0.095**2
    assert found.mean().item() == pytest.approx(truth, abs=4 * found.std().item() / 2000**0.5)


def test_the_squared_calibration_error_by_hand():
    # gaps -0.1 and 0.9 in one bin: mean 0.4, s² 0.5, so 0.16 - 0.25 (which is -0.1 · 0.9); one example has no share
    gaps = BinGaps.of({"confidence": torch.tensor([0.9, 0.9, 0.6]), "accuracy": torch.tensor([1.0, 0.0, 1.0])})
    assert gaps.squared_error() == pytest.approx(-0.09)
    alone = BinGaps.of({"confidence": torch.tensor([0.9]), "accuracy": torch.tensor([0.0])})
    assert alone.squared_error() == 0

"""Bins by hand and against scikit-learn, and a diagram that shows them."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.calibration import calibration_curve

from bloblora.evaluation import metrics, reliability, reliability_diagram


def random_case(n=300):
    log_probs = (torch.randn(n, 2) * 2).double().log_softmax(-1)
    return log_probs, torch.randint(0, 2, (n,))


def test_bins_are_closed_on_the_right():
    bins = reliability(torch.tensor([[1.0, 0.0], [0.8, 0.2]], dtype=torch.float64), torch.tensor([0, 0]), num_bins=5)
    assert bins.count.tolist() == [0, 0, 0, 1, 1]


def test_bins_equal_scikit_learn():
    log_probs, targets = random_case()
    bins = reliability(log_probs.exp(), targets, num_bins=15)
    confidence, answer = log_probs.exp().max(-1)
    accuracy, mean_confidence = calibration_curve(answer == targets, confidence, n_bins=15)
    full = bins.count > 0
    np.testing.assert_array_equal(bins.count, np.histogram(confidence, bins=15, range=(0, 1))[0])
    np.testing.assert_allclose(bins.accuracy[full], accuracy)
    np.testing.assert_allclose(bins.confidence[full], mean_confidence)
    assert bins.accuracy[~full].isnan().all()
    assert bins.share.sum().item() == pytest.approx(1)
    assert metrics(log_probs, targets)["ece"] == bins.ece


def test_ece_stays_in_its_range_when_rounding_lifts_a_row_above_one():
    bins = reliability(torch.tensor([[1.0005, 0.0]]), torch.tensor([1]))
    assert bins.ece == 1


def test_errors_name_what_is_wrong():
    half, zero = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    with pytest.raises(ValueError, match=r"probabilities: row 0 sums to 0\.25, must be 1"):
        reliability(half / 4, zero)
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.5"):
        reliability(torch.tensor([[1.5, -0.5]]), zero)
    with pytest.raises(ValueError, match=r"targets must be in 0\.\.1, got 7 in row 0"):
        reliability(half, zero + 7)
    with pytest.raises(ValueError, match="no method to draw"):
        reliability_diagram({}, "unused.png")


def test_diagram_grows_by_a_panel_a_method_and_leaves_nothing_else(tmp_path):
    log_probs, targets = random_case()
    bins, file = reliability(log_probs.exp(), targets), tmp_path / "plots" / "r.png"
    widths = []
    for names in (["LoRA"], ["LoRA", "BLoB, N = 10"]):
        reliability_diagram(dict.fromkeys(names, bins), file)
        widths.append(imread(file).shape[1])
    assert widths[1] > 1.5 * widths[0]
    assert [path.name for path in file.parent.iterdir()] == ["r.png"]


@pytest.mark.parametrize(("sure", "is_red"), [(0.98, True), (0.52, False)])
def test_overconfidence_is_red(tmp_path, sure, is_red):
    """Half right at ``sure``: red between accuracy and confidence, above the legend's own red."""
    probs = torch.tensor([[sure, 1 - sure]]).repeat(100, 1)
    reliability_diagram({"a": reliability(probs, torch.arange(100) % 2)}, tmp_path / "r.png")
    image = imread(tmp_path / "r.png")
    panel = image[: int(0.6 * len(image)), :, :3]
    red = (panel[..., 0] - panel[..., 2] > 0.1).mean()
    assert (red > 0.005) == is_red

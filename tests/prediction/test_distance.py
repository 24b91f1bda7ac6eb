"""Distances of hidden states against scikit-learn and a case by hand."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from bloblora.evaluation import METRICS, summary
from bloblora.prediction import DISTANCES, Distance, Prediction


def states(n, d, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centers = 3 * torch.randn(classes, d, generator=generator)
    mixing = torch.randn(d, d, generator=generator)
    return centers[labels] + torch.randn(n, d, generator=generator) @ mixing, labels


@pytest.mark.parametrize(("n", "d"), [(200, 6), (12, 30)], ids=["many records", "fewer than dimensions"])
def test_the_distances_are_scikit_learns(n, d):
    z, labels = states(n, d)
    distance, new = Distance.fit(z, labels + 5), states(40, d, seed=1)[0]
    z, labels, points = z.double().numpy(), labels.numpy(), new.double().numpy()
    means = np.stack([z[labels == c].mean(0) for c in range(3)])
    shared = LedoitWolf(assume_centered=True).fit(z - means[labels])
    nearest = np.min([shared.mahalanobis(points - mean) for mean in means], axis=0)
    background = LedoitWolf().fit(z).mahalanobis(points)
    found = distance.scores(new)
    np.testing.assert_allclose(found["mahalanobis"], nearest, rtol=1e-4)
    np.testing.assert_allclose(found["relative_mahalanobis"], nearest - background, rtol=1e-3, atol=1e-3)
    assert list(found) == list(DISTANCES)


def test_without_classes_there_is_one_gaussian():
    z, _ = states(100, 4)
    distance, new = Distance.fit(z), states(20, 4, seed=1)[0]
    found = distance.scores(new)
    assert list(found) == ["mahalanobis"]
    expected = LedoitWolf().fit(z.double().numpy()).mahalanobis(new.double().numpy())
    np.testing.assert_allclose(found["mahalanobis"], expected, rtol=1e-4)


def test_by_hand():
    """Residuals ±1 in both dimensions: the covariance is the identity, whatever it is shrunk by."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    z, labels = torch.cat([corners, corners + torch.tensor([10.0, 0.0])]), torch.tensor([0] * 4 + [1] * 4)
    distance = Distance.fit(z, labels)
    found = distance.scores(torch.tensor([[0.0, 0.0], [13.0, 4.0]]))["mahalanobis"]
    torch.testing.assert_close(found, torch.tensor([0.0, 25.0], dtype=torch.float64))
    assert Distance(**vars(distance)).scores(z)["mahalanobis"].tolist() == pytest.approx([2.0] * 8)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(1, 3), r"states must be \(n, d\), n > 1, and finite, got \(1, 3\)"),
        (torch.tensor([[0.0], [torch.nan]]), "and finite"),
        (torch.ones(5, 3), "those of a class are all equal"),
    ],
)
def test_states_that_have_no_distance(z, message):
    with pytest.raises(ValueError, match=message):
        Distance.fit(z)


def test_the_metrics_are_in_the_summary_where_there_are_distances():
    generator = torch.Generator().manual_seed(0)
    sides = [Prediction(torch.randn(1, 4, 3, generator=generator).log_softmax(-1), 0) for _ in range(2)]
    inside, outside = ({"mahalanobis": torch.tensor(x)} for x in ([1.0, 2.0, 3.0, 9.0], [4.0, 5.0, 6.0, 7.0]))
    targets = torch.zeros(4, dtype=torch.long)
    found = summary(sides[0].with_distances(inside), targets, sides[1].with_distances(outside))
    assert (found["auroc_mahalanobis"], found["fpr95_mahalanobis"]) == (0.75, 0.25)
    assert "auroc_relative_mahalanobis" not in found
    assert "auroc_mahalanobis" not in summary(sides[0], targets, sides[1])
    assert METRICS["auroc_mahalanobis"].title == "AUROC dist."

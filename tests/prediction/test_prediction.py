"""`Prediction` against hand-computed cases, torch.distributions and scipy."""

import math

import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import Categorical

from bloblora import Prediction

LN2 = math.log(2)


def prediction(*draws) -> Prediction:
    """From probabilities, (S, n, C)."""
    return Prediction(torch.tensor(draws, dtype=torch.float64).log().float(), len(draws))


@pytest.mark.parametrize(
    ("draws", "total", "aleatoric", "epistemic"),
    [
        ([[[1.0, 0.0]], [[0.0, 1.0]]], LN2, 0.0, LN2),  # sure draws that contradict each other
        ([[[0.5, 0.5]], [[0.5, 0.5]]], LN2, LN2, 0.0),  # draws that agree on not knowing
        ([[[1.0, 0.0]], [[0.5, 0.5]]], 2 * LN2 - 0.75 * math.log(3), LN2 / 2, 1.5 * LN2 - 0.75 * math.log(3)),
        ([[[0.25, 0.25, 0.25, 0.25]]], 2 * LN2, 2 * LN2, 0.0),
    ],
)
def test_by_hand(draws, total, aleatoric, epistemic):
    found = prediction(*draws)
    assert found.predictive_entropy.item() == pytest.approx(total, abs=1e-6)
    assert found.expected_entropy.item() == pytest.approx(aleatoric, abs=1e-6)
    assert found.mutual_information.item() == pytest.approx(epistemic, abs=1e-6)


def test_against_libraries():
    logits = torch.randn(7, 5, 4) * 3
    found = Prediction(logits.log_softmax(-1), 7)
    probabilities = scipy.special.softmax(logits.double().numpy(), axis=-1)
    mean = torch.tensor(probabilities.mean(0))
    torch.testing.assert_close(found.draw_probabilities.double(), torch.tensor(probabilities), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.probabilities.double(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.log_probabilities.double(), mean.log(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.confidence.double(), mean.max(-1).values, rtol=1e-5, atol=1e-7)
    assert found.labels.tolist() == mean.argmax(-1).tolist()
    total = torch.tensor(scipy.stats.entropy(mean.numpy(), axis=-1))
    torch.testing.assert_close(found.predictive_entropy.double(), total, rtol=1e-5, atol=1e-6)
    aleatoric = Categorical(logits=logits).entropy().mean(0)
    torch.testing.assert_close(found.expected_entropy, aleatoric, rtol=1e-5, atol=1e-6)
    # The mutual information is the mean KL of a draw from the mean.
    epistemic = torch.tensor(scipy.stats.entropy(probabilities, mean.numpy()[None], axis=-1).mean(0))
    torch.testing.assert_close(found.mutual_information.double(), epistemic, rtol=1e-4, atol=1e-6)


def test_mutual_information_is_never_negative():
    """In float32 the difference of equal entropies can come out below 0."""
    logits = torch.randn(1, 500, 5).expand(10, -1, -1)
    found = Prediction(logits.log_softmax(-1), 10)
    assert (found.predictive_entropy - found.expected_entropy).min() < 0
    assert found.mutual_information.min() == 0
    assert found.mutual_information.max() < 1e-5


def test_tiny_probabilities_are_averaged_in_log_space():
    """exp(-200) is 0 in float32; the mean's logarithm is not."""
    draws = torch.tensor([[[0.0, -200.0]], [[0.0, -201.0]]])
    expected = scipy.special.logsumexp([-200.0, -201.0]) - LN2
    assert draws.exp()[..., 1].sum() == 0
    found = Prediction(draws, 2)
    assert found.log_probabilities[0, 1].item() == pytest.approx(expected, rel=1e-6)
    assert found.mutual_information.isfinite().all()


def test_classes_that_an_input_lacks():
    draws = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.3, 0.5]]).log().expand(3, -1, -1)
    found = Prediction(draws, 3)
    assert found.probabilities[0, 2] == 0
    expected = [-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)), -(0.2 * math.log(0.2) + 0.3 * math.log(0.3)) + LN2 / 2]
    for entropy in (found.predictive_entropy, found.expected_entropy):
        assert entropy.tolist() == pytest.approx(expected, abs=1e-6)

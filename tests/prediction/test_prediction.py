"""`Prediction` against hand-computed cases, torch.distributions and scipy."""

import math

import numpy as np
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
        ([[[1.0, 0.0]], [[0.5, 0.5]]], 2 * LN2 - 0.75 * math.log(3), LN2 / 2, 3 * LN2 - 1.5 * math.log(3)),
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
    # The mutual information of 7 draws is the mean KL of a draw from the mean, and 1/7 of it is missing.
    epistemic = torch.tensor(scipy.stats.entropy(probabilities, mean.numpy()[None], axis=-1).mean(0)) * 7 / 6
    torch.testing.assert_close(found.mutual_information.double(), epistemic, rtol=1e-4, atol=1e-6)


def test_mutual_information_is_never_negative():
    """In float32 the difference of equal entropies can come out below 0."""
    logits = torch.randn(1, 500, 5).expand(10, -1, -1)
    found = Prediction(logits.log_softmax(-1), 10)
    assert (found.predictive_entropy - found.expected_entropy).min() < 0
    assert found.mutual_information.min() == 0
    assert found.mutual_information.max() < 1e-5


@pytest.mark.parametrize(("draws", "tolerance"), [(2, 0.04), (3, 0.03), (5, 0.02), (10, 0.01)])
def test_mutual_information_against_the_closed_form_of_a_dirichlet(draws, tolerance):
    """Of p ~ Dirichlet(a): H[a/A] - (digamma(A + 1) - sum of a_c/A digamma(a_c + 1)), within 4 standard errors too."""
    a = np.array([6.0, 3.0, 1.0]) * 2
    share, total = a / a.sum(), a.sum()
    aleatoric = scipy.special.digamma(total + 1) - share @ scipy.special.digamma(a + 1)
    truth = scipy.stats.entropy(share) - aleatoric
    probabilities = np.random.default_rng(draws).dirichlet(a, (draws, 20_000))
    found = Prediction(torch.tensor(probabilities).log(), draws)
    error = 4 * found.mutual_information.std().item() / 20_000**0.5
    assert found.mutual_information.mean().item() == pytest.approx(truth, abs=tolerance * truth + error)
    plug_in = (found.predictive_entropy - found.expected_entropy).mean().item()
    assert plug_in == pytest.approx((1 - 1 / draws) * truth, abs=tolerance * truth + error)


def test_mutual_information_of_rows_with_different_numbers_of_draws():
    """Each has its own factor, so a row of 2 draws is no less uncertain on average than one of 10; one draw gives 0."""
    probabilities = np.random.default_rng(0).dirichlet([12, 6, 2], (10, 6000))
    log_probs = torch.tensor(probabilities).log()
    log_probs[2:, :3000] = log_probs[1:, 3000:3001] = -math.inf
    found = Prediction(log_probs, 10)
    few, many = found.mutual_information[:3000], found.mutual_information[3001:]
    error = (few.var() / 3000 + many.var() / 2999).sqrt().item()
    assert few.mean().item() == pytest.approx(many.mean().item(), abs=4 * error)
    plug_in = found.predictive_entropy - found.expected_entropy
    assert plug_in[:3000].mean() < 0.6 * plug_in[3001:].mean()
    assert found.mutual_information[3000] == 0


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

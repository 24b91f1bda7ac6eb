"""What makes an example's squared gradient that of labels which the model expects."""

import pytest
import torch

from bloblora.tasks.generation import TextGeneration
from bloblora.tasks.likelihood import Bernoulli, Categorical, Gaussian, Text, mean_nll


@pytest.mark.parametrize("likelihood", [Categorical(), Categorical(weights=(1.0, 2.0, 4.0)), Bernoulli()])
def test_it_is_the_expectation_over_the_models_labels(likelihood):
    """Exactly, by a sum over all labels; the weight of a class is in a gradient once, so in its square twice."""
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    bernoulli = isinstance(likelihood, Bernoulli)
    labels = torch.cartesian_prod(*[torch.arange(2.0).double()] * 3) if bernoulli else torch.arange(3)
    unweighted = likelihood if bernoulli else Categorical()
    squares, probabilities = [], []
    for label in labels:
        nll = -unweighted.log_prob(logits, label[None])
        squares.append(torch.autograd.grad(nll.sum(), logits)[0].square().sum())
        probabilities.append((-nll).exp().detach())
    expected = sum(square * probability for square, probability in zip(squares, probabilities, strict=True))
    for label in labels:
        gradient = torch.autograd.grad(-likelihood.log_prob(logits, label[None]).sum(), logits)[0]
        factor = likelihood.expected_square(logits.detach(), label[None])
        weight = likelihood.weights[label] if getattr(likelihood, "weights", ()) else 1
        torch.testing.assert_close((factor * gradient.square().sum()).double(), weight * expected, rtol=1e-5, atol=1e-8)


def test_choices_that_a_question_lacks_count_nothing():
    logits, label = torch.tensor([[0.5, -0.5], [0.0, 0.0]]), torch.tensor([0, 1])
    wider = torch.cat([logits, torch.full((2, 1), -torch.inf)], dim=-1)
    torch.testing.assert_close(
        Categorical().expected_square(wider, label), Categorical().expected_square(logits, label)
    )


def test_it_is_finite_where_an_example_is_fitted_exactly():
    assert Categorical().expected_square(torch.tensor([[200.0, 0.0]]), torch.tensor([0])).isfinite().all()


def test_smoothed_labels_have_other_gradients():
    """Whose squares are brought to the same expectation: that of labels from the model, which aren't smoothed."""
    logits = torch.tensor([[0.5, -0.5, 1.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    label, p = torch.tensor([1]), logits.detach().softmax(-1)
    nll = mean_nll(Categorical(), logits, label, 0.3)
    gradient = torch.autograd.grad(nll, logits)[0]
    factor = Categorical().expected_square(logits.detach(), label, 0.3)
    torch.testing.assert_close((factor * gradient.square().sum()).double(), (p * (1 - p)).sum(-1), rtol=1e-5, atol=0)


def test_not_every_likelihood_says():
    """Of a text only its own tokens were seen, and a number's variance is an output too."""
    assert TextGeneration.family is Text
    assert [family.expects for family in (Categorical, Bernoulli, Gaussian, Text)] == [True, True, False, False]
    with pytest.raises(NotImplementedError):
        Gaussian().expected_square(torch.zeros(2, 2), torch.zeros(2))

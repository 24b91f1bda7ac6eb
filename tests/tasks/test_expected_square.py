"""What makes an example's squared gradient that of labels which the model expects."""

import pytest
import torch

from bloblora.tasks.generation import TextGeneration
from bloblora.tasks.likelihood import Bernoulli, Categorical, Gaussian, Text


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
        weight = likelihood.weight(label[None])
        torch.testing.assert_close((factor * gradient.square().sum()).double(), weight * expected, rtol=1e-5, atol=1e-8)


def test_choices_that_a_question_lacks_count_nothing():
    logits, label = torch.tensor([[0.5, -0.5], [0.0, 0.0]]), torch.tensor([0, 1])
    wider = torch.cat([logits, torch.full((2, 1), -torch.inf)], dim=-1)
    torch.testing.assert_close(
        Categorical().expected_square(wider, label), Categorical().expected_square(logits, label)
    )


def test_it_is_finite_where_an_example_is_fitted_exactly():
    assert Categorical().expected_square(torch.tensor([[200.0, 0.0]]), torch.tensor([0])).isfinite().all()


def test_where_a_likelihood_does_not_say_it_is_1():
    assert Gaussian().expected_square(torch.zeros(2, 2), torch.zeros(2)).tolist() == [1.0, 1.0]


def test_a_text_is_told_from_no_answer():
    logits = torch.tensor([[-30.0, -1e-13], [-0.1, -2.4]])
    assert Text().expected_square(logits, torch.zeros(2, dtype=torch.long)).tolist() == [1.0, 1.0]
    assert TextGeneration.family is Text

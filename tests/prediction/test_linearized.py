"""The linearized predictive against Monte Carlo where the model is nearly linear, and against numerical integrals."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from bloblora import BlobConfig, bayesianize, find_posterior, predict
from bloblora.adapter import debayesianize
from bloblora.prediction import Linearized, WeightDraws
from bloblora.prediction.approximations import normal_quantiles
from bloblora.prediction.forward import BatchForward
from tests.prediction.conftest import TASKS


def narrow(case, factors="A"):
    """The case with a posterior so narrow that its model is linear within it."""
    debayesianize(case.model)
    bayesianize(case.model, BlobConfig(init_std=0.0025, factors=factors))
    return case, find_posterior(case.model.eval())


def log_odds(log_probs):
    return log_probs - (-log_probs.exp()).log1p()


@pytest.mark.parametrize("name", TASKS)
def test_the_standard_deviation_of_many_draws(name, case_of):
    """400 draws: their standard deviation has a relative standard error of 1/√800, 3.5 %."""
    case, posterior = narrow(case_of(name))
    answer = predict(case.model, case.examples, 0, task=case.task).labels
    draws = predict(case.model, case.examples, 400, task=case.task).log_probs.double()
    monte_carlo = log_odds(draws.gather(-1, answer.expand(400, -1)[..., None]).squeeze(-1)).std(0)
    with torch.no_grad():
        batch = {k: v for k, v in case.task.collate(case.examples).items() if k != "labels"}
        _, std = Linearized(posterior).moments(BatchForward(case.model, batch, case.task))
    assert monte_carlo.min() > 0
    torch.testing.assert_close(std.double(), monte_carlo, rtol=4 * 0.035, atol=0)


def test_both_factors(case_of):
    case, posterior = narrow(case_of("classification"), "AB")
    draws = predict(case.model, case.examples, 2000, task=case.task).probabilities
    found = predict(case.model, case.examples, 20, task=case.task, sampler=Linearized(posterior)).probabilities
    mean = predict(case.model, case.examples, 0, task=case.task).probabilities
    assert (found - draws).abs().max() < 0.3 * (mean - draws).abs().max() + 2e-3


@pytest.mark.parametrize("number", [2, 10, 50])
def test_probabilities_against_an_integral(number, case_of):
    """∫ sigmoid(m + s·z) N(z) dz of the answer; the other classes keep their proportions."""
    case = case_of("classification")
    sampler = Linearized(find_posterior(case.model))
    found = predict(case.model, case.examples, number, task=case.task, sampler=sampler)
    with torch.no_grad():
        batch = case.task.collate(case.examples)
        logits, std = sampler.moments(BatchForward(case.model, batch, case.task))
    for row, (p, s) in enumerate(zip(logits.double().softmax(-1), std.double().tolist(), strict=True)):
        answer = int(p.argmax())
        m = log_odds(p.log())[answer].item()
        expected = quad(lambda z, m=m, s=s: norm.pdf(z) / (1 + math.exp(-m - s * z)), -8, 8)[0]
        assert found.probabilities[row, answer].item() == pytest.approx(expected, abs=0.1 / number)
        others = [i for i in range(3) if i != answer]
        torch.testing.assert_close(
            found.probabilities[row, others].double() / (1 - found.probabilities[row, answer].double()),
            p[others] / (1 - p[answer]),
            rtol=1e-4,
            atol=1e-6,
        )


def test_one_forward_whatever_n_and_no_seed(case_of):
    case = case_of("choice_text")
    sampler = Linearized(find_posterior(case.model))
    calls = []
    hook = case.model.register_forward_hook(lambda *_: calls.append(1))
    first = predict(case.model, case.examples, 30, 0, task=case.task, sampler=sampler)
    hook.remove()
    assert len(calls) == 1
    again = predict(case.model, case.examples, 30, 1, task=case.task, sampler=sampler, batch_size=1)
    torch.testing.assert_close(first.probabilities, again.probabilities, rtol=1e-4, atol=1e-5)
    assert first.mutual_information.min() >= 0
    assert not any(p.grad is not None for p in case.model.parameters())


def test_the_mean(case_of):
    case = case_of("classification")
    posterior = find_posterior(case.model)
    of = [
        predict(case.model, case.examples, 0, task=case.task, sampler=sampler).probabilities
        for sampler in (Linearized(posterior), WeightDraws(posterior))
    ]
    assert torch.equal(*of)


@pytest.mark.parametrize("number", [1, 2, 7, 100])
def test_quantiles(number):
    values = torch.tensor(normal_quantiles(number), dtype=torch.float64)
    assert values.mean().abs() < 1e-12
    assert (values**2).mean().item() == pytest.approx(float(number > 1), abs=1e-12)

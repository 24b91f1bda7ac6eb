"""The sequential test keeps its promise, and saves draws."""

import math

import pytest
import torch

from bloblora import predict
from bloblora.prediction import Prediction, StoppingRule


def draws(num_inputs, num_draws, spread, seed=0):
    """Log-probabilities of three classes whose logits are normal over draws, (S, n, 3)."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(num_inputs, 3, generator=generator)
    noise = torch.randn(num_draws, num_inputs, 3, generator=generator)
    return (centre + spread * noise).log_softmax(-1)


def mirrored_draws(num_inputs, num_draws, spread, seed=0):
    """The same in pairs about the mean, with a curvature that both of a pair share."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(num_inputs, 3, generator=generator)
    noise = torch.randn(num_draws // 2, num_inputs, 3, generator=generator)
    even, odd = spread * (noise.square() - 1) / 2, spread * noise
    return (centre + torch.stack([even + odd, even - odd], 1).flatten(0, 1)).log_softmax(-1)


def stopped(log_probs, rule):
    """The draws that the rule asks for; the others are -inf."""
    kept, total = log_probs.clone(), len(log_probs)
    left = torch.ones(log_probs.shape[1], dtype=torch.bool)
    for look in rule.looks_before(total):
        left &= ~rule.settled(log_probs[:look], total)
        kept[look:, ~left] = -math.inf
    return Prediction(kept, total)


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("error", [0.01, 0.1])
def test_the_answer_of_all_draws_but_for_the_stated_share(spread, error):
    """4 standard errors: of 20,000 inputs."""
    size = 20_000
    rule = StoppingRule(error=error, tolerance=1.0)
    log_probs = draws(size, 10, spread)
    found, everything = stopped(log_probs, rule), Prediction(log_probs, 10)
    wrong = (found.labels != everything.labels).double().mean().item()
    assert wrong < error + 4 * math.sqrt(error * (1 - error) / size)
    assert found.num_draws.double().mean() < 9.5


@pytest.mark.parametrize("num_samples", [4, 10])
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_mirrored_draws_err_less_than_stated(spread, num_samples):
    rule = StoppingRule(error=0.2, tolerance=1.0, looks=(2, 4, 6))
    log_probs = mirrored_draws(20_000, num_samples, spread)
    found, everything = stopped(log_probs, rule), Prediction(log_probs, num_samples)
    assert (found.labels != everything.labels).double().mean() < 0.05
    assert found.num_draws.double().mean() < 0.9 * num_samples


def test_only_looks_that_can_be_taken_share_the_error():
    log_probs = draws(1000, 2, 0.3)
    one, more = (StoppingRule(error=0.1, looks=looks) for looks in ((2,), (2, 4, 6)))
    assert torch.equal(one.settled(log_probs, 4), more.settled(log_probs, 4))
    assert one.settled(log_probs, 10).sum() > more.settled(log_probs, 10).sum()


def test_without_the_quantile_the_promise_breaks():
    class Careless(StoppingRule):
        def _half_width(self, x, num_samples):
            return super()._half_width(x, num_samples) * 0.02

    log_probs = draws(20_000, 10, 1.0)
    wrong = stopped(log_probs, Careless(error=0.01, tolerance=1.0)).labels != Prediction(log_probs, 10).labels
    assert wrong.double().mean() > 0.02


@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_the_confidence_of_all_draws_within_the_tolerance(spread):
    rule = StoppingRule(error=0.05, tolerance=0.05)
    log_probs = draws(20_000, 10, spread)
    found, everything = stopped(log_probs, rule), Prediction(log_probs, 10)
    off = (found.confidence - everything.confidence).abs() > 0.05
    assert off.double().mean() < 0.05


def test_a_hand_computed_interval():
    """Margins 0.2 and 0.4 of two draws: σ̂ = 0.1√2, t(0.95; 1) = 6.3138 for one look, √(1/2 − 1/10) = 0.6325."""
    log_probs = torch.tensor([[[0.6, 0.4]], [[0.7, 0.3]]]).log()
    margin = 6.3138 * 0.1 * math.sqrt(2) * math.sqrt(0.4)
    assert margin > 0.3  # so it isn't settled
    assert not StoppingRule(error=0.1, tolerance=1.0, looks=(2,)).settled(log_probs, 10)
    # with t(0.75; 1) = 1 the half-width is 0.0894 for the margin, 0.0447 for the confidence
    assert StoppingRule(error=0.5, tolerance=0.0448, looks=(2,)).settled(log_probs, 10)
    assert not StoppingRule(error=0.5, tolerance=0.0446, looks=(2,)).settled(log_probs, 10)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_predict_stops(batch_size, case_of):
    """The draws that are made are those of a prediction without the rule, and all statistics are of them alone."""
    case = case_of("choice_letter")
    everything = predict(case.model, case.examples, 8, task=case.task)
    always = StoppingRule(error=0.999, tolerance=1.0, looks=(2, 3))
    found = predict(case.model, case.examples, 8, task=case.task, stop=always, batch_size=batch_size)
    expected = stopped(everything.log_probs, always)
    assert found.num_draws.tolist() == expected.num_draws.tolist()
    assert found.num_draws.min() < 8
    made = found.log_probs.isfinite().any(-1)
    size = len(found.log_probs)
    torch.testing.assert_close(found.log_probs[made], everything.log_probs[:size][made], rtol=0, atol=1e-4)
    row = int(found.num_draws.argmin())
    alone = Prediction(everything.log_probs[: int(found.num_draws[row]), [row]], 8)
    for name in ("probabilities", "predictive_entropy", "expected_entropy", "mutual_information"):
        torch.testing.assert_close(getattr(found, name)[[row]], getattr(alone, name), rtol=0, atol=1e-5)


def test_a_plain_model_and_the_mean_have_nothing_to_stop(case_of):
    case = case_of("choice_letter")
    assert predict(case.model, case.examples, 0, task=case.task, stop=StoppingRule()).num_draws.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(error=0.0), r"error must be in \(0, 1\), got 0.0"),
        (dict(tolerance=2.0), r"tolerance must be in \(0, 1\], got 2.0"),
        (dict(looks=(1, 2)), r"looks must be rising numbers of draws, 2 or more, got \(1, 2\)"),
        (dict(looks=(3, 2)), "looks must be rising"),
        (dict(looks=()), "looks must be rising"),
    ],
)
def test_clear_errors(options, message):
    with pytest.raises(ValueError, match=message):
        StoppingRule(**options)

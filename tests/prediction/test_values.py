"""Predictions of numbers: densities, quantiles and scores against other libraries, and a posterior in closed form."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch.distributions import Categorical, MixtureSameFamily, Normal
from transformers import LlamaConfig, LlamaForSequenceClassification

from bloblora import BlobConfig, bayesianize, predict
from bloblora.evaluation import example_scores, metrics, summary
from bloblora.prediction import ValuePrediction, fit_temperature
from bloblora.tasks import Gaussian, Regression, encode_all
from tests.tasks.conftest import tokenizer, with_lora

__all__ = ["tokenizer"]

CENTER, SCALE = 50.0, 20.0


@pytest.fixture
def prediction():
    torch.manual_seed(4)
    means, precisions = torch.randn(3, 5), torch.rand(3, 5) * 4 + 0.3
    return ValuePrediction(Gaussian.of(means, precisions), 3, Gaussian(CENTER, SCALE))


def mixture(prediction):
    """The same by torch, in the units of the data."""
    means, stds = prediction.moments
    return MixtureSameFamily(Categorical(torch.full((5, 3), 1 / 3, dtype=torch.double)), Normal(means.T, stds.T))


def test_the_predictive_distribution_is_the_mixture_of_the_draws(prediction):
    theirs, values = mixture(prediction), torch.tensor([10.0, 45.0, 50.0, 61.5, 200.0])
    torch.testing.assert_close(prediction.mean, theirs.mean)
    torch.testing.assert_close(prediction.std, theirs.variance.sqrt())
    parts = prediction.aleatoric_std.square() + prediction.epistemic_std.square()
    torch.testing.assert_close(parts, theirs.variance)
    torch.testing.assert_close(prediction.log_prob(values), theirs.log_prob(values.double()) + math.log(SCALE))
    torch.testing.assert_close(prediction.cdf(values), theirs.cdf(values.double()))
    for share in (0.001, 0.05, 0.5, 0.999):
        torch.testing.assert_close(theirs.cdf(prediction.quantile(share)), torch.full((5,), share).double())
    low, high = prediction.interval(0.8).unbind(-1)
    torch.testing.assert_close(theirs.cdf(high) - theirs.cdf(low), torch.full((5,), 0.8).double())


def test_crps_is_the_integral_over_the_squared_difference_of_distributions(prediction):
    values = torch.tensor([10.0, 45.0, 50.0, 61.5, 80.0]).double()
    theirs = mixture(prediction)

    def difference(x: float, i: int) -> float:
        return (theirs.cdf(torch.tensor(x).double())[i] - float(x >= values[i])).item() ** 2

    found = example_scores(prediction, values)["crps"]
    for i, value in enumerate(values.tolist()):
        expected = sum(quad(difference, *ends, (i,))[0] for ends in ((-150, value), (value, 250)))
        assert found[i].item() == pytest.approx(expected, rel=1e-6)


def test_metrics_of_a_case_by_hand():
    """One draw N(50, 20²) for both: errors of 10 and 40, the second outside of 50 ± 1.645 · 20."""
    prediction = ValuePrediction(Gaussian.of(torch.zeros(1, 2), torch.ones(1, 2)), 0, Gaussian(CENTER, SCALE))
    found = summary(prediction, torch.tensor([60.0, 90.0]))
    nll = (0.5**2 + 2**2) / 4 + math.log(2 * math.pi) / 2
    expected = {"nll": nll, "rmse": math.sqrt((100 + 1600) / 2), "mae": 25, "interval_coverage": 0.5}
    expected |= {"interval_width": 2 * 1.6448536 * SCALE, "num_examples": 2, "num_samples": 0, "num_draws": 1}
    assert found.pop("crps") > 0
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_temperature_is_a_factor_of_the_variance(prediction):
    logits, values = prediction.logits, torch.randn(5)
    mean, variance = Gaussian.moments(logits / 2.5)
    expected_mean, expected_variance = Gaussian.moments(logits)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, 2.5 * expected_variance)
    theirs = Normal(mean, variance.sqrt()).log_prob(values)
    torch.testing.assert_close(Gaussian().log_prob(logits / 2.5, values), theirs)


@pytest.mark.parametrize("count", [10, 4000])
def test_the_temperature_is_the_most_probable_one(count):
    """Of a variance of 1/9 where it is 1; log T has a standard normal prior."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    too_sure = Gaussian.of(torch.zeros(1, count), torch.full((1, count), 9.0))
    fitted = fit_temperature([too_sure], [values], Gaussian())
    # the derivative of n/2 log T + Σ 9 y² / (2 T) + (log T)² / 2 with respect to log T
    slope = count / 2 - 9 * values.square().sum().item() / (2 * fitted) + math.log(fitted)
    assert slope == pytest.approx(0, abs=1e-4 * count)


def test_draws_of_a_linear_head_have_the_known_gaussian_predictive(tokenizer):
    """With a Bayesian LoRA on the head alone and B = (b, 0), the mean is W h + s·b·A h with A ~ N(M, Ω²): normal."""
    torch.manual_seed(1)
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0, num_labels=2, initializer_range=0.2)
    model = with_lora(LlamaForSequenceClassification(config).eval(), "score")
    posterior = bayesianize(model, BlobConfig(init_std=0.3))
    layer = model.base_model.model.score
    with torch.no_grad():
        layer.lora_B["default"].weight[1] = 0
    task = Regression(pad_token_id=0, value_mean=CENTER, value_std=SCALE)
    texts = ["My card was charged twice", "What?", "Which gas is iron?"]
    examples = encode_all(task, [{"text": text, "value": 60.0 + i} for i, text in enumerate(texts)], tokenizer)
    found = predict(model.eval(), examples, 4000, task=task)
    assert isinstance(found, ValuePrediction)

    hidden = []
    handle = layer.base_layer.register_forward_pre_hook(lambda _, x: hidden.append(x[0][0, -1]))
    with torch.no_grad(), posterior.mean():
        logits = torch.cat([task.logits(model, task.collate([example])) for example in examples])
    handle.remove()
    mean, noise = Gaussian.moments(logits.double())
    (std,) = posterior.named_stds().values()
    b = layer.lora_B["default"].weight[0] * layer.scaling["default"]
    spread = torch.stack([(b[:, None] * std * h).square().sum().sqrt() for h in hidden]).double()
    deviation = SCALE * spread / math.sqrt(4000)
    assert ((found.mean - (CENTER + SCALE * mean)).abs() < 4 * deviation).all()
    torch.testing.assert_close(found.epistemic_std, SCALE * spread, rtol=0.05, atol=0)
    torch.testing.assert_close(found.aleatoric_std, SCALE * noise.sqrt())
    targets = torch.tensor([60.0, 61.0, 62.0])
    exact = Normal(mean, (noise + spread.square()).sqrt()).log_prob((targets.double() - CENTER) / SCALE)
    torch.testing.assert_close(found.log_prob(targets), exact, rtol=0.05, atol=0.05)


def test_what_needs_classes_says_so(prediction):
    with pytest.raises(TypeError, match="a gaussian prediction has no classes"):
        _ = prediction.confidence
    with pytest.raises(ValueError, match=r"targets must be \(5,\), finite numbers"):
        metrics(prediction, torch.tensor([1.0, 2.0]))

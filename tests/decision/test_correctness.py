"""Maps to the probability of being right, against closed forms, scikit-learn and simulation."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bloblora.decision import MAPS, Correctness, CorrectnessError, fit_correctness
from bloblora.evaluation import confidence_floor, ece_floor


def simulated(n=2000, seed=0):
    """log c, uniform in c, and texts that are right with probability c²; and a score that says nothing."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.rand(n, generator=generator).double().clamp(0.01, 0.99)
    right = torch.rand(n, generator=generator) < c**2
    return {"log_probability": c.log(), "predictive_entropy": torch.rand(n, generator=generator)}, right


@pytest.mark.parametrize("kind", MAPS)
def test_each_map_finds_the_probability(kind):
    scores, right = simulated()
    found = fit_correctness({"log_probability": scores["log_probability"]}, right, maps=[kind])
    fresh, again = simulated(seed=1)
    p, truth = found.probabilities(fresh), fresh["log_probability"].exp() ** 2
    assert (p - truth).abs().mean() < 0.05  # the standard error of a share of 2,000 in ten parts is 0.035
    nll = -torch.where(again, p, 1 - p).log().mean().item()
    assert found.metrics["nll"] == pytest.approx(nll, abs=0.04)
    assert found.metrics["ece"] < found.metrics["ece_floor"] + 6 * found.metrics["ece_floor_std"]
    assert found.metrics["brier"] == pytest.approx((p - again.double()).square().mean().item(), abs=0.02)


def test_a_score_that_is_not_there_is_named():
    fitted = Correctness("platt", ("p_true", "agreement"), {"weights": [1.0, 1.0], "intercept": 0.0}, 20, 10, {})
    with pytest.raises(CorrectnessError, match="needs p_true, agreement; ask for them with draws and p_true"):
        fitted.probabilities({"log_probability": torch.zeros(1)})


def test_a_map_of_long_texts():
    """Of -1,500 to -800 nats e^s is 0 in float64; here the more probable half is right."""
    scores, right = {"sequence_log_probability": torch.linspace(-1500, -800, 200)}, torch.arange(200) >= 100
    found = fit_correctness(scores, right, maps=["isotonic"])
    assert found.metrics["auroc"] > 0.95
    p = found.probabilities(scores)
    assert p[:98].max() < 0.05
    assert p[102:].min() > 0.95


def test_the_choice_leaves_out_what_says_nothing():
    scores, right = simulated()
    found = fit_correctness(scores, right)
    assert "log_probability" in found.scores
    assert found.metrics["auroc"] > 0.8
    noise = fit_correctness({"predictive_entropy": scores["predictive_entropy"]}, right)
    assert noise.metrics["auroc"] == pytest.approx(0.5, abs=0.05)
    assert noise.probabilities(scores).std() < 0.1
    constant = scores | {"mutual_information": torch.zeros(len(right))}
    assert fit_correctness(constant, right) == found


def test_platt_over_several_is_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator).double()
    right = torch.rand(300, generator=generator) < (x[:, 0] - x[:, 1]).sigmoid()
    scores = {"log_probability": x[:, 0], "predictive_entropy": x[:, 1]}
    found = fit_correctness(scores, right, maps=["platt"])
    assert found.scores == ("log_probability", "predictive_entropy")
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    expected = LogisticRegression().fit(z, right.numpy()).predict_proba(z)[:, 1]
    assert found.probabilities(scores).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_probabilities_by_hand():
    given = {"num_examples": 8, "num_right": 4, "metrics": {}}
    beta = Correctness("beta", ("agreement",), {"weights": [2.0, 1.0], "intercept": 0.5}, **given)
    c = torch.tensor([0.25, 0.5, 1.0])
    expected = [1 / (1 + math.exp(-(0.5 + 2 * math.log(p) - math.log(1 - p)))) for p in (0.25, 0.5)]
    # by the rule of succession nothing is above (8 + 1) / (8 + 2)
    assert beta.probabilities({"agreement": c}).tolist() == pytest.approx([*map(lambda p: max(p, 0.1), expected), 0.9])
    corners = {"log_confidence": [-3.0, -1.0], "probability": [0.3, 0.7]}
    isotonic = Correctness("isotonic", ("predictive_entropy",), corners, **given)
    entropies = torch.tensor([4.0, 2.0, 0.5])
    assert isotonic.probabilities({"predictive_entropy": entropies}).tolist() == pytest.approx([0.3, 0.5, 0.7])
    assert Correctness.from_dict(isotonic.to_dict()) == isotonic


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "step"},
        {"scores": []},
        {"scores": ["loudness"]},
        {"num_right": 8},
        {"parameters": {"weights": [1.0, 2.0], "intercept": 0.0}},
        {"parameters": {"weights": [math.nan], "intercept": 0.0}},
        {"parameters": {}},
        {"kind": "isotonic", "parameters": {"confidence": [0.2, 0.6], "probability": [0.3, 0.7]}},  # of c itself
        {"more": 1},
    ],
)
def test_what_is_no_map(change):
    values = {"kind": "platt", "scores": ["agreement"], "parameters": {"weights": [1.0], "intercept": 0.0}}
    values |= {"num_examples": 8, "num_right": 4, "metrics": {}}
    assert Correctness.from_dict(values).to_dict() == values
    with pytest.raises(CorrectnessError):
        Correctness.from_dict(values | change)


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        ({"agreement": torch.rand(20)}, torch.ones(20).bool(), "of 20 texts 20 are right and 0 wrong"),
        ({"agreement": torch.ones(20)}, torch.arange(20) < 10, "all 20 texts have the same"),
        ({"loudness": torch.rand(20)}, torch.arange(20) < 10, "scores must be among log_probability"),
        ({"agreement": torch.full((20,), math.nan)}, torch.arange(20) < 10, "agreement must be finite"),
    ],
)
def test_texts_of_which_there_is_no_map(scores, right, message):
    with pytest.raises(CorrectnessError, match=message):
        fit_correctness(scores, right)


def test_the_floor_of_confidences_is_that_of_their_predictions():
    confidence = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() / 2 + 0.5
    log_probs = torch.stack([confidence, 1 - confidence], dim=-1).log()
    assert confidence_floor(confidence) == ece_floor(log_probs, torch.zeros(50).long())

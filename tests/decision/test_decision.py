"""The rules together: on predictions with several draws, to JSON and back, and what became of the promises."""

import json
import math

import pytest
import torch

from bloblora.decision import Decision, PromiseError, check_promises, fit_decision
from bloblora.prediction import Prediction
from tests.decision.conftest import truths

OPTIONS = {"risk": 0.3, "coverage": 0.8, "false_alarm": 0.1}


def prediction(n=400, seed=0, concentration=0.2):
    """Draws that scatter around the truth."""
    probabilities, labels = truths(n, 4, 1, seed, concentration)
    noise = torch.randn(3, n, 4, generator=torch.Generator().manual_seed(seed)) / 2
    return Prediction((probabilities[0].clamp_min(1e-9).log() + noise).log_softmax(-1).float(), 3), labels[0]


def test_decisions_are_of_the_averaged_probabilities():
    inside, targets = prediction()
    decision = fit_decision(inside, targets, **OPTIONS, score="mutual_information")
    new, _ = prediction(seed=1)
    decided = decision.decide(new)
    mean = new.draw_probabilities.mean(0)
    assert torch.equal(decided.answers, mean.amax(-1) > decision.answering.threshold)
    expected = (1 - mean <= decision.label_sets.threshold) | (mean == mean.amax(-1, keepdim=True))
    assert torch.equal(decided.label_sets, expected)
    assert torch.equal(decided.out_of_scope, new.mutual_information > decision.scope.threshold)


@pytest.mark.parametrize("kind", ["lac", "aps", "raps"])
def test_json_and_back(kind):
    inside, targets = prediction()
    decision = fit_decision(inside, targets, **OPTIONS, kind=kind)
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
    assert list(decision.promises) == ["answering", "label_sets", "scope"]
    with pytest.raises(ValueError, match="decision: answering: field 'risk' is missing"):
        Decision.from_dict({"answering": {}, "label_sets": {}})
    with pytest.raises(ValueError, match="at least one of answering, label_sets, scope, answer_sets"):
        Decision.from_dict({})


def test_a_rule_that_cannot_be_promised_is_left_out_and_the_others_are_as_ever():
    inside, targets = prediction()
    whole = fit_decision(inside, targets, **OPTIONS)
    decision = fit_decision(inside, targets, **OPTIONS | {"risk": 0.001})
    assert (decision.answering, decision.label_sets, decision.scope) == (None, whole.label_sets, whole.scope)
    assert list(decision.promises) == ["label_sets", "scope"]
    assert "risk 0.001 with probability 0.95 needs at least" in decision.refused["answering"]
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
    decided = decision.decide(inside)
    assert decided.answers is None
    assert torch.equal(decided.label_sets, whole.decide(inside).label_sets)
    kept = whole.realized(inside, targets, inside)
    del kept["answered"], kept["selective_risk"]
    assert decision.realized(inside, targets, inside) == kept
    few = Prediction(inside.log_probs[:, :20], 3)
    with pytest.raises(PromiseError, match=r"(?s)risk 0\.01 .*\ncoverage 0\.99 needs.*\nfalse_alarm 0\.01 needs"):
        fit_decision(few, targets[:20], risk=0.01, coverage=0.99, false_alarm=0.01)


def test_realized_by_hand():
    inside, targets = prediction()
    decision = fit_decision(inside, targets, **OPTIONS)
    new, right = prediction(seed=1)
    far, _ = prediction(seed=2, concentration=50)
    decided, result = decision.decide(new), decision.realized(new, right, far)
    answered = [i for i in range(400) if decided.answers[i]]
    assert 0 < len(answered) < 400
    assert result["answered"] == len(answered) / 400
    assert result["selective_risk"] == sum(int(new.labels[i] != right[i]) for i in answered) / len(answered)
    assert result["set_coverage"] == sum(bool(decided.label_sets[i, right[i]]) for i in range(400)) / 400
    assert result["set_size"] == pytest.approx(sum(map(int, decided.label_sets.flatten())) / 400)
    assert result["false_alarm"] == sum(map(int, decided.out_of_scope)) / 400
    assert result["detection"] > result["false_alarm"]
    # on their own records the rules keep what they promise
    own = decision.realized(inside, targets)
    assert own["selective_risk"] <= 0.3
    assert own["set_coverage"] >= 0.8
    assert own["false_alarm"] <= 0.1
    assert "detection" not in own


def test_nothing_is_answered_where_nothing_is_sure():
    inside, targets = prediction()
    decision = fit_decision(inside, targets, **OPTIONS)
    unsure = Prediction(torch.full((1, 5, 4), math.log(0.25)), 0)
    result = decision.realized(unsure, torch.zeros(5, dtype=torch.long))
    assert (result["answered"], result["selective_risk"]) == (0, 0)


def test_mutual_information_needs_draws():
    inside, targets = prediction()
    point = Prediction(inside.log_probs[:1], 0)
    with pytest.raises(ValueError, match="mutual_information is not defined for a single draw; take"):
        fit_decision(point, targets, **OPTIONS, score="mutual_information")


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (8, {}, r"(?s)risk 0\.05 with probability 0\.95 needs at least 93 .*coverage 0\.9 needs .*false_alarm 0\.05"),
        (93, {"level": 95}, r"confidence level must be in \(0, 1\), got 95"),
        (8, {"coverage": 90}, r"coverage must be in \(0, 1\), got 90"),
    ],
)
def test_what_is_hopeless_is_known_before_any_prediction(n, options, message):
    check_promises(93)
    check_promises(19, coverage=0.99)  # enough for one of them
    with pytest.raises(ValueError, match=message):
        check_promises(n, **options)


WRITTEN = {  # by bloblora 0.1
    "answering": {
        "risk": 0.3,
        "level": 0.95,
        "threshold": 0.41,
        "num_answered": 61,
        "num_wrong": 9,
        "num_examples": 99,
    },
    "label_sets": {
        "kind": "raps",
        "coverage": 0.8,
        "threshold": 1.2,
        "num_examples": 99,
        "penalty": 0.01,
        "free_ranks": 5,
    },
    "scope": {"score": "predictive_entropy", "false_alarm": 0.1, "threshold": 1.1, "num_examples": 99},
}


def changed(rule, **values):
    return WRITTEN | {rule: {k: v for k, v in (WRITTEN[rule] | values).items() if v is not None}}


def test_a_file_of_before_is_read_and_a_missing_key_is_its_default():
    assert Decision.from_dict(WRITTEN).to_dict() == changed("answering", score="confidence")
    older = changed("label_sets", penalty=None, free_ranks=None)
    assert Decision.from_dict(older) == Decision.from_dict(WRITTEN)


@pytest.mark.parametrize(
    ("rule", "values", "message"),
    [
        ("answering", {"risk": 5}, r"risk must be in \(0, 1\), got 5"),
        ("answering", {"threshold": math.nan}, "threshold must be a number, got nan"),
        ("answering", {"num_wrong": -1}, "num_wrong must be a number of 0 or more, got -1"),
        ("label_sets", {"kind": "top"}, "label_sets: field 'kind' must be Literal.*, got 'top'"),
        ("label_sets", {"threshold": "1"}, "label_sets: field 'threshold' must be float, got '1'"),
        ("scope", {"score": "labels"}, "scope: field 'score' must be Literal.*, got 'labels'"),
        ("scope", {"false_alarm": 0}, r"false_alarm must be in \(0, 1\), got 0"),
        ("scope", {"threshold": None}, "scope: field 'threshold' is missing"),
        ("scope", {"sharpness": 1}, "scope: unknown field 'sharpness'"),
    ],
)
def test_what_is_stored_is_checked(rule, values, message):
    with pytest.raises(ValueError, match=message):
        Decision.from_dict(changed(rule, **values))

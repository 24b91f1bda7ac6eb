"""Class weights and label smoothing: the loss beside torch's, and the population whose probabilities are learnt."""

import math

import pytest
import torch
from torch.nn import functional as F

from bloblora import runs
from bloblora.cli import main
from bloblora.evaluation import metrics
from bloblora.prediction import TagsPrediction
from bloblora.tasks import Categorical, TaskError, build_task, task_from_dict
from bloblora.tasks.likelihood import mean_nll
from tests.tasks.conftest import tokenizer
from tests.tiny_base import write_jsonl

__all__ = ["tokenizer"]

RECORDS = [{"text": "gas", "label": "a"}] * 6 + [{"text": "gas", "label": "b"}] * 2


def test_balanced_is_what_scikit_learn_calls_so(tokenizer):
    task = build_task("classification", RECORDS, tokenizer, class_weights="balanced")
    assert task.class_weights == pytest.approx((8 / (2 * 6), 8 / (2 * 2)))
    assert task_from_dict(task.to_dict()) == task
    for wrong in ("balance", (1.0,), (1.0, -1.0)):
        with pytest.raises(
            TaskError, match=r"class_weights: .* it must be none, balanced, or a number above 0 a label"
        ):
            build_task("classification", RECORDS, tokenizer, class_weights=wrong)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_torchs_but_for_the_sum_of_the_weights(smoothing):
    """torch divides by the batch's own sum of weights; here a record counts the same in every batch."""
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(7, 3), torch.randint(3, (7,)), (0.5, 1.0, 3.0)
    found = mean_nll(Categorical(weights), logits, labels, smoothing)
    alike = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, (alike * torch.tensor(weights)[labels]).mean())
    if not smoothing:
        theirs = F.cross_entropy(logits, labels, torch.tensor(weights), reduction="sum")
        torch.testing.assert_close(found, theirs / 7)
    draws = torch.randn(4, 7, 3)
    averaged = draws.softmax(-1).mean(0)[torch.arange(7), labels].log()
    torch.testing.assert_close(Categorical(weights).averaged(draws, labels), averaged * torch.tensor(weights)[labels])


def test_words_count_by_their_tags(tokenizer):
    """Four words of O and one of B: 5 / (2 · 4) and 5 / 2; of a record weight times NLL is summed."""
    data = [{"tokens": ["a", "b"], "tags": ["O", "B"]}, {"tokens": ["a", "b", "c"], "tags": ["O", "O", "O"]}]
    task = build_task("auto", data, tokenizer, class_weights="balanced")
    assert dict(zip(task.labels, task.class_weights, strict=True)) == pytest.approx({"B": 2.5, "O": 0.625})
    assert task_from_dict(task.to_dict()) == task
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 2), task.likelihood.stacked([task.target(record) for record in data])
    logits[0, 2] = -torch.inf
    flat, weights = logits.flatten(1), torch.tensor(task.class_weights)
    there = labels != -100
    for smoothing in (0.0, 0.2):
        each = F.cross_entropy(logits[there], labels[there], reduction="none", label_smoothing=smoothing)
        expected = (each * weights[labels[there]]).sum() / 2
        torch.testing.assert_close(mean_nll(task.likelihood, flat, labels, smoothing), expected)
    plain = metrics(TagsPrediction(task.likelihood.normalized(flat)[None], 1, task.likelihood), labels)
    assert plain["nll"] == pytest.approx(F.cross_entropy(logits[there], labels[there], reduction="sum").item() / 2)
    tags = [[0, 1], [1, 1, 1]]
    assert task.likelihood.guess(tags, tags) == pytest.approx(5 * math.log(2) / 2)


def test_the_constant_guess_is_the_weighted_shares():
    """Of 6 and 2 records with balanced weights: log 2 times the mean weight."""
    labels = [0] * 6 + [1] * 2
    assert Categorical((8 / 12, 8 / 4)).guess(labels, labels) == pytest.approx(math.log(2))
    expected = -(6 * math.log(0.75) + 2 * math.log(0.25)) / 8
    assert Categorical().guess(labels, labels) == pytest.approx(expected)


def test_balanced_probabilities_of_texts_that_are_alike_are_equal(base, tmp_path):
    """The inputs tell nothing, so that what is learnt are the labels' shares: 3 to 1, and 1 to 1 where balanced."""
    for weights, share in (("none", 0.75), ("balanced", 0.5)):
        output = tmp_path / weights
        options = ["--steps", "150", "--batch-size", "8", "--learning-rate", "0.01", "--method", "lora", "--r", "2"]
        data = ["--data", str(write_jsonl(tmp_path / "data.jsonl", RECORDS)), "--validation", "0"]
        main(["train", *data, *options, "--model", str(base), "--output", str(output), "--class-weights", weights])
        (found,) = runs.load_run(output).predict(["gas"], 0).probabilities[:, 0].tolist()
        assert found == pytest.approx(share, abs=0.02)


def test_a_task_without_fixed_classes_says_whose_option_it_is(tmp_path):
    message = r"no option 'class_weights'.*is of classification, token_classification"
    for task, record in (("regression", {"text": "a", "value": 1.0}), ("reward", {"chosen": "a", "rejected": "b"})):
        options = {"data": [record] * 4, "output": str(tmp_path), "class_weights": "balanced"}
        with pytest.raises(runs.RunError, match=message):
            runs.RunConfig.of(**options, task=task)
        config = runs.RunConfig.of(**options)
        with pytest.raises(runs.RunError, match=message):
            runs.train(config, progress=False)


def test_methods_with_another_loss_refuse_weights(tmp_path, base):
    options = dict(data=RECORDS, output=str(tmp_path / "run"), model=str(base), class_weights="balanced")
    config = runs.RunConfig.of(**options, method="laplace-lora")
    with pytest.raises(runs.RunError, match="class_weights: method 'laplace-lora' weighs all records alike"):
        runs.train(config, progress=False)

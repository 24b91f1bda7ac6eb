"""Class weights and label smoothing: the loss beside torch's, and the population whose probabilities are learnt."""

import math

import pytest
import torch
from torch.nn import functional as F

from bloblora import runs
from bloblora.cli import main
from bloblora.tasks import Categorical, TaskError, build_task, task_from_dict
from bloblora.training.trainer import _mean_nll
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
    found = _mean_nll(Categorical(weights), logits, labels, smoothing)
    alike = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, (alike * torch.tensor(weights)[labels]).mean())
    if not smoothing:
        theirs = F.cross_entropy(logits, labels, torch.tensor(weights), reduction="sum")
        torch.testing.assert_close(found, theirs / 7)
    draws = torch.randn(4, 7, 3)
    averaged = draws.softmax(-1).mean(0)[torch.arange(7), labels].log()
    torch.testing.assert_close(Categorical(weights).averaged(draws, labels), averaged * torch.tensor(weights)[labels])


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


def test_methods_with_another_loss_refuse_weights(tmp_path, base):
    for method in ("vbll", "laplace-lora"):
        config = runs.RunConfig.of(
            data=RECORDS, output=str(tmp_path / "run"), model=str(base), method=method, class_weights="balanced"
        )
        with pytest.raises(runs.RunError, match=f"class_weights: method '{method}' weighs all records alike"):
            runs.train(config, progress=False)

"""Values of texts: from records to standardized labels, what is taken for a number, and the head's outputs."""

import math

import pytest
import torch
from torch.distributions import Normal

from bloblora.data import DataError, as_records, read_records
from bloblora.tasks import Gaussian, Regression, TaskError, build_task, encode_all, task_from_dict
from tests.prediction.conftest import tiny_classifier

RECORDS = [{"text": "What gas?", "value": 3}, {"text": "My card", "value": 5.5}, {"text": "sand", "value": -1.0}]


def labelled(*labels):
    return [{"text": "What gas?", "label": label} for label in labels]


def test_values_are_standardized_by_the_training_values(tokenizer):
    task = build_task("auto", RECORDS, tokenizer)
    assert task.name == "regression"
    assert (task.value_mean, task.value_std) == pytest.approx((2.5, math.sqrt((0.25 + 9 + 12.25) / 3)))
    labels = [example["label"] for example in encode_all(task, RECORDS, tokenizer)]
    assert sum(labels) == pytest.approx(0)
    assert sum(label**2 for label in labels) == pytest.approx(3)
    assert task.likelihood.targets(labels).tolist() == pytest.approx([3, 5.5, -1])
    assert task_from_dict(task.to_dict()) == task
    batch = task.collate(encode_all(task, RECORDS, tokenizer))
    assert batch["labels"].dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (("1.5", "2", "-0.25"), "regression"),
        (("1", "2", "3"), "classification"),
        (("1.5", "two"), "classification"),
        (("nan", "1.5"), "classification"),
    ],
)
def test_labels_are_numbers_where_some_have_fractions(labels, name, tokenizer):
    task = build_task("auto", labelled(*labels), tokenizer)
    assert task.name == name
    assert (task.assumed(labelled(*labels)) is None) == (name == "classification" and labels[0] != "1")


def test_whole_numbers_are_values_where_that_is_asked_for(tokenizer):
    task = build_task("regression", labelled("1", "2", "6"), tokenizer)
    assert task.value_mean == 3
    with pytest.raises(TaskError, match="field 'label': 'two' is no number"):
        task.target({"text": "a", "label": "two"})


def test_columns_with_numbers(tmp_path):
    """A value column is found by its name, unless there is a label; it may be given; a cell may be empty."""

    def read(content, **options):
        from bloblora.data import ReadingOptions

        file = tmp_path / "data.csv"
        file.write_text(content)
        return read_records(file, ReadingOptions(**options), require_labels=False)

    text = [{"text": "a", "value": 3.5}, {"text": "b", "value": -2.0}]
    assert read("text,value\na,3.5\nb,-2\n") == text
    assert [record["value"] for record in read("sentence,Rating\na,3.5\nb,-2\n")] == [3.5, -2]
    assert "value" not in read("text,label,score\na,x,3.5\n")[0]
    assert read("text,label,score\na,x,3.5\n", value_column="score")[0]["value"] == 3.5
    assert read("text,value\na,\n") == [{"text": "a", "value": None}]
    with pytest.raises(DataError, match="field 'value': '3,5' must be a finite number"):
        read('text,value\na,"3,5"\n')
    for wrong in (math.inf, True, [1], "1e400"):
        with pytest.raises(DataError, match="must be a finite number"):
            as_records([{"text": "a", "value": wrong}])
    with pytest.raises(DataError, match="field 'value': missing"):
        as_records([{"text": "a", "value": math.nan}, {"text": "a", "value": None}], require_labels=True)


def test_the_head_says_mean_and_precision(tokenizer):
    task = Regression(pad_token_id=0, value_mean=0.0, value_std=1.0)
    batch = task.collate(encode_all(task, RECORDS, tokenizer))
    model = tiny_classifier()
    with pytest.raises(TaskError, match="the outputs mean, noise; load a sequence classification model with num_lab"):
        task.logits(model, batch)
    model.score, model.config.num_labels, model.num_labels = torch.nn.Linear(32, 2), 2, 2
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mean, raw = model(**inputs).logits.unbind(-1)
    logits = task.logits(model, batch)
    expected = Normal(mean, (torch.log1p((math.e - 1) * raw.exp()) + 1e-4).rsqrt())
    torch.testing.assert_close(
        task.likelihood.log_prob(logits, batch["labels"]), expected.log_prob(batch["labels"]), rtol=1e-4, atol=1e-4
    )


def test_the_constant_guess_is_the_fitted_normal():
    seen, labels = [0.0, 2.0, 4.0], [1.0, 5.0]
    expected = -Normal(2.0, math.sqrt(8 / 3)).log_prob(torch.tensor(labels)).mean().item()
    assert Gaussian().guess(seen, labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"text": "a", "value": 2}] * 3, {}, "field 'value': all are 2; there must be at least 2 different ones"),
        ([{"text": "a"}, {"text": "b", "value": 2}], {}, "record 1: field 'value': missing"),
        (RECORDS, {"labels": ["a"]}, "regression has no option 'labels'"),
    ],
)
def test_errors_before_a_tokenizer_is_needed(records, options, message):
    with pytest.raises(TaskError, match=message):
        Regression.check(records, **options)


def test_options_out_of_range(tokenizer):
    with pytest.raises(TaskError, match="value_std: 0; it must be above 0"):
        build_task("regression", RECORDS, tokenizer, value_std=0)

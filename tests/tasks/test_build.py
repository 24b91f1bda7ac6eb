import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from bloblora.data import MappedRows, write_rows
from bloblora.tasks import TaskError, build_task, encode_all, task_from_dict

from .conftest import tiny_causal

TEXTS = [{"text": "My card", "label": "card"}, {"text": "the air", "label": "air"}]


def test_auto(questions, blanks, tokenizer):
    assert build_task("auto", TEXTS, tokenizer).name == "classification"
    assert build_task("auto", questions, tokenizer).name == "choice_text"
    assert build_task("auto", blanks, tokenizer).name == "blank"
    assert build_task("auto", blanks + questions, tokenizer).name == "choice_text"
    with pytest.raises(TaskError, match="'auto' needs records that all have"):
        build_task("auto", TEXTS + questions, tokenizer)


@pytest.mark.parametrize("name", ["classification", "choice_text", "choice_letter", "blank"])
def test_round_trip_through_json(name, tokenizer):
    task = build_task(name, TEXTS, tokenizer, max_length=77)
    assert task.name == name
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_options_come_from_the_tokenizer(tokenizer, questions, caplog, monkeypatch):
    task = build_task("choice_letter", questions, tokenizer)
    assert (task.pad_token_id, task.max_length) == (tokenizer.pad_token_id, 1024)
    monkeypatch.setattr(tokenizer, "model_max_length", 512)
    assert build_task("choice_letter", questions, tokenizer).max_length == 512
    assert not caplog.records
    assert build_task("choice_letter", questions, tokenizer, max_length=600).max_length == 600
    assert caplog.messages == ["max_length=600 is above the model's own limit, 512 tokens"]


def test_wrong_names_and_options(tokenizer, questions):
    with pytest.raises(TaskError, match="'choices' is not one of regression, multi_label, classification"):
        build_task("choices", questions, tokenizer)
    with pytest.raises(TaskError, match="no option 'normalization', which is of choice_text; it has pad_token_id"):
        build_task("choice_letter", questions, tokenizer, normalization="sum")
    with pytest.raises(TaskError, match="task 'blank': unknown field 'labels'"):
        task_from_dict({"name": "blank", "pad_token_id": 0, "labels": ["a", "b"]})
    with pytest.raises(TaskError, match=r"labels must be at least 2, all different, got \[\]"):
        task_from_dict({"name": "classification", "pad_token_id": 0})
    with pytest.raises(TaskError, match=r"'blank': .*pad_token_id"):
        task_from_dict({"name": "blank"})
    with pytest.raises(TaskError, match="None is not one of"):
        task_from_dict({})


def test_all_problems_at_once(questions, tokenizer):
    task = build_task("choice_text", questions, tokenizer)
    records = [questions[0] | {"answer": 9}, questions[1], {"question": "What?"}]
    with pytest.raises(TaskError) as caught:
        encode_all(task, records, tokenizer)
    assert caught.value.problems == (
        "record 1: field 'answer': 9 is not an index into 3 choices (0..2)",
        "record 3: field 'choices': missing; it must be a list of at least 2 texts",
    )


def test_records_of_a_selection_have_the_numbers_of_their_file(questions, tokenizer, tmp_path):
    task = build_task("choice_text", questions, tokenizer)
    write_rows(file := tmp_path / "records.arrow", [*questions, questions[0] | {"answer": 9}])
    selected = MappedRows(file).select([0, len(questions)])
    with pytest.raises(TaskError, match=f"^record {len(questions) + 1}: field 'answer': 9 is not an index"):
        encode_all(task, selected, tokenizer)


def test_encoded_examples_are_json(questions, tokenizer):
    for name in ("choice_text", "choice_letter"):
        examples = encode_all(build_task(name, questions, tokenizer), questions, tokenizer, progress=True)
        assert json.loads(json.dumps(examples)) == examples


@pytest.mark.parametrize("name", ["choice_text", "choice_letter"])
def test_batches_go_through_the_trainer(name, questions, tokenizer, tmp_path):
    task = build_task(name, questions, tokenizer)

    class TaskTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return cross_entropy(task.logits(model, inputs), inputs["labels"])

    options = dict(max_steps=30, per_device_train_batch_size=3, learning_rate=0.01, lr_scheduler_type="constant")
    quiet = dict(report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False)
    trainer = TaskTrainer(
        model=tiny_causal(),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options, **quiet),
        train_dataset=encode_all(task, questions, tokenizer),
        data_collator=task.collate,
    )
    trainer.train()
    batch = task.collate(trainer.train_dataset)
    with torch.no_grad():
        assert task.logits(trainer.model.eval(), batch).argmax(1).tolist() == [0, 1, 0]

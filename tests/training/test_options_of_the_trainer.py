"""Options of the Trainer that change its loss, against the Trainer itself."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from bloblora import BlobTrainer, bayesianize, find_posterior
from tests.conftest import tiny_llama

from .conftest import TASK, arguments, assert_close, assert_equal, classifier, examples, logs, trainable
from .test_plain import language_model

WEIGHTS = torch.tensor([3.0, 1.0, 0.2])
OPTIONS = dict(max_steps=1, train_sampling_strategy="sequential")


def weighted(outputs, labels, num_items_in_batch=None):
    """Classes have weights; a sum over the step's examples over their number."""
    return F.cross_entropy(outputs["logits"], labels, WEIGHTS, reduction="sum") / num_items_in_batch


def uneven_texts():
    """Of 8 texts the first four have fewer label tokens."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 97, (7,), generator=generator) for _ in range(8)]
    return [
        {"input_ids": row, "labels": torch.where(torch.arange(7) < (5 if i < 4 else 0), -100, row)}
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("option", ["plain", "smoothed", "weighted"])
@pytest.mark.parametrize("task", [None, TASK], ids=["model's loss", "task"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_plain_lora_is_trained_as_by_the_trainer(option, task, accumulation, tmp_path):
    """In one batch: with accumulation the Trainer multiplies the mean loss of such a model by the number of parts."""
    given = OPTIONS | ({"label_smoothing_factor": 0.3} if option == "smoothed" else {})
    parts = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    extra = {"compute_loss_func": weighted} if option == "weighted" else {}
    found, expected = classifier(bayesian=False), classifier(bayesian=False)
    data = {"train_dataset": examples(8), "data_collator": TASK.collate, **extra}
    trainer = BlobTrainer(found, arguments(tmp_path, **given, **parts), task=task, **data)
    trainer.train()
    same = {name: getattr(trainer.args, name) for name in (*given, "learning_rate", "max_grad_norm", "logging_steps")}
    same["per_device_train_batch_size"] = 8
    own = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", **same)
    reference = Trainer(expected, own, **data)
    reference.train()
    assert logs(trainer, "loss")[0] == pytest.approx(logs(reference, "loss")[0], rel=1e-5)
    assert_close(trainable(found), trainable(expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_accumulated_language_model_is_the_large_batch(smoothing, tmp_path):
    """Label tokens are counted over the whole step."""
    after = []
    for accumulation in (1, 4):
        model = language_model(True)
        given = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
        trainer = BlobTrainer(
            model,
            arguments(tmp_path, **given, **OPTIONS, label_smoothing_factor=smoothing, optim="sgd"),
            train_dataset=uneven_texts(),
        )
        with trainer.posterior.mean():
            trainer.train()
        after.append(trainable(model))
    assert_close(*after)


def test_smoothing_is_over_the_choices_that_a_question_has(tmp_path):
    logits = torch.tensor([[1.0, 0.0, -torch.inf], [0.5, 0.2, 0.1]])

    class Questions:
        def length(self, example):
            return 1

        def logits(self, model, batch):
            return logits + 0 * next(p for p in model.parameters() if p.requires_grad).sum()

    options = arguments(tmp_path, label_smoothing_factor=0.3)
    trainer = BlobTrainer(classifier(bayesian=False), options, task=Questions(), train_dataset=[])
    loss = trainer.compute_loss(trainer.model.train(), {"labels": torch.tensor([1, 2])})
    first, second = logits[0, :2].log_softmax(-1), logits[1].log_softmax(-1)
    expected = -(0.7 * first[1] + 0.3 * first.mean() + 0.7 * second[2] + 0.3 * second.mean()) / 2
    torch.testing.assert_close(loss, expected)


def test_a_batch_without_labels_is_named(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in examples(4)]
    trainer = BlobTrainer(classifier(), arguments(tmp_path), task=TASK, train_dataset=data, data_collator=TASK.collate)
    with pytest.raises(ValueError, match="train_dataset: a batch of input_ids, attention_mask has no labels"):
        trainer.train()


@pytest.mark.parametrize("named", ["default", "words"])
def test_the_best_checkpoint_comes_back_whole(named, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=named)
    bayesianize(model)
    trainer = BlobTrainer(
        model,
        arguments(
            tmp_path,
            learning_rate=0.5,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,  # the first one
        ),
        train_dataset=uneven_texts(),
        eval_dataset=uneven_texts()[:4],
    )
    seen = {}
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *a, **k: (
        seen.update({trainer.state.global_step: trainable(model)}) or save(*a, **k)
    )
    trainer.train()
    assert trainer.state.best_global_step < 3
    assert_equal(trainable(find_posterior(model, named).model), seen[trainer.state.best_global_step])


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_optimizers_that_have_another_epsilon_or_none(optim, tmp_path):
    model = classifier()
    before = trainable(model)
    BlobTrainer(
        model, arguments(tmp_path, optim=optim), task=TASK, train_dataset=examples(8), data_collator=TASK.collate
    ).train()
    assert all((after != before[name]).any() for name, after in trainable(model).items())

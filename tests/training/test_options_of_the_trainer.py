"""Options of the Trainer that change its loss, against the Trainer itself."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from bloblora import BlobConfig, BlobTrainer, bayesianize, find_posterior
from tests.conftest import tiny_llama

from .conftest import (
    PAPERS,
    TASK,
    arguments,
    assert_close,
    assert_equal,
    classifier,
    examples,
    logs,
    make_trainer,
    trainable,
)
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


class Rates(TrainerCallback):
    """The learning rates with which a training starts."""

    def on_train_begin(self, args, state, control, optimizer, **_):
        self.seen = [group["initial_lr"] for group in optimizer.param_groups]


def test_an_optimizer_that_is_given_keeps_its_rates(tmp_path):
    model, rates = classifier(), Rates()
    stds = find_posterior(model).parameters()[1]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not std for std in stds)]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": stds, "lr": 0.07}], weight_decay=0)
    options = arguments(tmp_path, std_learning_rate="auto", max_steps=1)
    data = {"train_dataset": examples(4), "data_collator": TASK.collate, "callbacks": [rates]}
    BlobTrainer(model, options, task=TASK, optimizers=(optimizer, None), **data).train()
    assert rates.seen == [1e-3, 0.07]


def test_the_automatic_rate_is_that_of_each_training(tmp_path):
    rates = Rates()
    trainer = make_trainer(tmp_path, std_learning_rate="auto", max_steps=1, callbacks=[rates])
    for steps in (1, 100):
        trainer.args.max_steps = steps
        trainer.train()
        assert rates.seen[-1] == trainer.automatic()["std_learning_rate"] == min(0.3, 16 / steps)


def test_an_optimizer_that_counts_its_steps_elsewhere_has_no_drift(tmp_path):
    class Signs(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for parameter in group["params"]:
                    self.state[parameter] = {"exp_avg_sq": parameter.grad.square()}
                    parameter -= group["lr"] * parameter.grad.sign()

    data = {"train_dataset": examples(8), "data_collator": TASK.collate}
    given = (Signs, {"defaults": {"lr": 0.01}})
    trainer = BlobTrainer(classifier(), arguments(tmp_path), task=TASK, optimizer_cls_and_kwargs=given, **data)
    trainer.train()
    assert len(logs(trainer, "loss")) == 3
    assert logs(trainer, "drift_mean") == []


@pytest.mark.parametrize("trained_before", [True, False])
def test_the_posterior_is_that_of_the_adapter_which_is_active_when_training_starts(tmp_path, trained_before):
    model = classifier()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]))
    trainer = make_trainer(tmp_path, model)
    if trained_before:
        trainer.train()
    model.set_adapter("second")
    bayesianize(model, BlobConfig(**PAPERS))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert trainer.posterior.adapter_name == "second"
    assert {name for name, p in model.named_parameters() if (p != before[name]).any()} == trainable(model).keys()
    assert logs(trainer, "kl")[-1] == pytest.approx(find_posterior(model, "second").kl().item(), rel=1e-5)


def test_a_model_that_becomes_bayesian_after_its_trainer_was_made(tmp_path):
    model = classifier(bayesian=False)
    trainer = make_trainer(tmp_path, model)
    bayesianize(model, BlobConfig(**PAPERS))
    trainer.train()
    assert len(logs(trainer, "kl")) == 3


def test_a_log_leaves_out_the_attempts_with_too_large_a_batch(tmp_path):
    class Small(BlobTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 2 and self.state.global_step:
                raise RuntimeError("CUDA out of memory.")
            losses.append(super().training_step(model, inputs, *args, **kwargs).item())
            return torch.tensor(losses[-1])

    losses: list[float] = []
    options = arguments(tmp_path, auto_find_batch_size=True, logging_steps=2, max_steps=2)
    trainer = Small(classifier(), options, task=TASK, train_dataset=examples(12), data_collator=TASK.collate)
    trainer.train()
    assert len(losses) > 2
    assert logs(trainer, "nll") == pytest.approx([sum(losses[-2:]) / 2])

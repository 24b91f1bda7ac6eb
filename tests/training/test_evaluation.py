"""The Trainer's evaluation, against averages made by hand."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, TrainerCallback

from bloblora import BlobTrainer, find_posterior

from .conftest import TASK, arguments, assert_equal, classifier, examples, logs, make_trainer, trainable
from .test_plain import language_model, texts

EVERY_STEP = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)


def loss_by_hand(model, data, num_samples, seed):
    """-log of the probability of the label, averaged over draws, over all examples at once."""
    batch = TASK.collate(data)
    generator = torch.Generator().manual_seed(seed)
    posterior = find_posterior(model)
    model.eval()
    contexts = (posterior.draw(generator) for _ in range(num_samples)) if num_samples else [posterior.mean()]
    probabilities = []
    for context in contexts:
        with context, torch.no_grad():
            probabilities.append(model(batch["input_ids"], batch["attention_mask"]).logits.softmax(-1))
    mean = torch.stack(probabilities).mean(0)
    return -mean[torch.arange(len(data)), batch["labels"]].log().mean().item()


@pytest.mark.parametrize("num_samples", [0, 3])
def test_evaluation_while_training(tmp_path, num_samples):
    data = examples(10)  # the last batch has two
    model = classifier(init_std=0.36)
    trainer = make_trainer(tmp_path, model, eval_dataset=data, eval_num_samples=num_samples, seed=5, **EVERY_STEP)
    trainer.compute_metrics = lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}
    trainer.train()
    assert len(logs(trainer, "eval_loss")) == 3
    assert logs(trainer, "eval_loss")[-1] == pytest.approx(loss_by_hand(model, data, num_samples, 5), rel=1e-4)
    assert 0 <= logs(trainer, "eval_accuracy")[-1] <= 1
    assert model.training is False
    assert loss_by_hand(model, data, 0, 5) != pytest.approx(loss_by_hand(model, data, 3, 5), rel=1e-3)


def test_evaluation_does_not_enter_the_logs_of_training(tmp_path):
    """Without noise; evaluating a model by its own loss goes through the same function as training it."""
    rows = {}
    for evaluate in (False, True):
        trainer = BlobTrainer(
            language_model(True),
            arguments(tmp_path, **(EVERY_STEP if evaluate else {})),
            train_dataset=texts(12),
            eval_dataset=texts(30)[12:],
        )
        with trainer.posterior.mean():
            trainer.train()
        rows[evaluate] = {key: logs(trainer, key) for key in ("loss", "nll", "kl", "elbo")}
    assert rows[True] == rows[False]


def test_evaluation_without_a_task_is_the_models_own_loss(tmp_path):
    model = language_model(True)
    trainer = BlobTrainer(model, arguments(tmp_path), train_dataset=texts(4), eval_dataset=texts(8))
    loss = trainer.evaluate()["eval_loss"]
    ids = torch.stack([row["input_ids"] for row in texts(8)])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)  # and no KL


def test_draws_need_a_task(tmp_path):
    with pytest.raises(ValueError, match="eval_num_samples is 3; without a task it must be 0"):
        BlobTrainer(language_model(True), arguments(tmp_path, eval_num_samples=3), train_dataset=texts(4))


class Weights(TrainerCallback):
    """What is trained, after each step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model, **_):
        self.at[state.global_step] = trainable(model)


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def trainer_of(folder, with_task, callbacks=(), **overrides):
    """A trainer whose validation labels contradict those of training, so that an early step is the best."""
    wrong = [{**row, "label": (row["label"] + 1) % 3} for row in examples(10)]
    options = dict(max_steps=8, learning_rate=0.02, load_best_model_at_end=True, save_strategy="steps", save_steps=1)
    kwargs = dict(
        task=TASK if with_task else None,
        train_dataset=examples(12),
        eval_dataset=wrong,
        data_collator=TASK.collate,
        callbacks=[*callbacks],
        compute_metrics=accuracy,
    )
    return BlobTrainer(classifier(init_std=0.09), arguments(folder, **{**EVERY_STEP, **options, **overrides}), **kwargs)


@pytest.mark.parametrize("num_samples", [0, 3])
@pytest.mark.parametrize("with_task", [True, False])
def test_the_best_checkpoint_comes_back_with_its_omega(tmp_path, with_task, num_samples):
    weights = Weights()
    trainer = trainer_of(tmp_path, with_task, [weights], eval_num_samples=num_samples)
    trainer.train()
    losses = logs(trainer, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert trainer.state.best_global_step == best < 8
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    found = {name: p.detach() for name, p in trainer.model.named_parameters() if name in weights.at[best]}
    assert_equal(found, weights.at[best])
    omegas = [name for name in found if "std" in name]
    assert omegas
    assert all(not torch.equal(found[name], weights.at[8][name]) for name in omegas)
    trainer.posterior.temperatures = None  # fitted after the last evaluation
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("with_task", [True, False])
def test_patience_ends_the_training(tmp_path, with_task):
    trainer = trainer_of(tmp_path, with_task, [EarlyStoppingCallback(2)])
    trainer.train()
    assert trainer.state.global_step == trainer.state.best_global_step + 2 < 8


def test_another_training_has_patience_again(tmp_path):
    """Such as the next trial of a search, or one from an earlier checkpoint."""
    trainer = trainer_of(tmp_path, True, [EarlyStoppingCallback(2)])
    for checkpoint in (None, None, str(tmp_path / "checkpoint-1")):
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step > 1


@pytest.mark.parametrize("restore", [True, False])
def test_a_training_that_was_stopped_early_is_not_resumed_where_patience_is_restored(tmp_path, restore):
    first = trainer_of(tmp_path, True, [EarlyStoppingCallback(2)])
    first.train()
    end = first.state.global_step
    again = trainer_of(
        tmp_path, True, [EarlyStoppingCallback(2)], restore_callback_states_from_checkpoint=restore, report_to=[]
    )
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{end}"))
    assert (again.state.global_step == end) == restore


@pytest.mark.parametrize("num_samples", [0, 3])
@pytest.mark.parametrize("with_task", [True, False])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_predict_and_evaluate_by_hand(tmp_path, with_task, num_samples, strategy):
    options = dict(eval_num_samples=num_samples, seed=5)
    if with_task:
        options["train_sampling_strategy"] = strategy
    trainer = trainer_of(tmp_path, with_task, **options)
    data = trainer.eval_dataset
    result = trainer.predict(data)
    assert result.label_ids.tolist() == [row["label"] for row in data]
    expected = loss_by_hand(trainer.model, data, num_samples, 5)
    log_probs = torch.as_tensor(result.predictions).log_softmax(-1)  # of N = 0 without a task they are logits
    assert -log_probs[torch.arange(10), result.label_ids].mean().item() == pytest.approx(expected, rel=1e-4)
    right = (log_probs.argmax(-1) == torch.as_tensor(result.label_ids)).double().mean().item()
    for metrics, prefix in ((result.metrics, "test"), (trainer.evaluate(), "eval")):
        assert metrics[f"{prefix}_loss"] == pytest.approx(expected, rel=1e-4)
        assert metrics[f"{prefix}_accuracy"] == pytest.approx(right)


def test_validation_is_in_tensorboard(tmp_path):
    trainer = trainer_of(tmp_path, True, max_steps=2, report_to=["tensorboard"])
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    values = [event.value for event in events.Scalars("eval/loss")]
    assert values == pytest.approx(logs(trainer, "eval_loss"))
    assert [event.step for event in events.Scalars("eval/accuracy")] == [1, 2]

"""The Trainer's evaluation, against averages made by hand."""

import pytest
import torch

from bloblora import BlobTrainer, find_posterior

from .conftest import TASK, arguments, classifier, examples, logs, make_trainer
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
    model = classifier(init_std=0.6)
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

"""Models without a task, without a posterior, and data without a length."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer, default_data_collator

from bloblora import BlobConfig, BlobTrainer, bayesianize

from ..conftest import tiny_llama
from .conftest import TASK, arguments, assert_close, assert_equal, classifier, examples, logs, make_trainer, trainable
from .test_steps import by_hand


def language_model(bayesian: bool, **config):
    torch.manual_seed(2)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if bayesian:
        bayesianize(model, BlobConfig(prior_std=0.2, init_std=0.25, **config))
    return model


def texts(count: int) -> list[dict]:
    ids = torch.randint(3, 97, (count, 7), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_a_plain_lora_trains_as_with_the_trainer(tmp_path):
    results = []
    for cls in (Trainer, BlobTrainer):
        model = language_model(bayesian=False)
        trainer = cls(model, arguments(tmp_path, max_steps=8, weight_decay=0.1), train_dataset=texts(10))
        trainer.train()
        results.append((trainable(model), logs(trainer, "loss"), logs(trainer, "grad_norm")))
    assert_equal(results[1][0], results[0][0])
    assert results[1][1:] == results[0][1:]
    assert logs(trainer, "nll") == logs(trainer, "loss")
    assert logs(trainer, "kl") == logs(trainer, "median_std") == []


@pytest.mark.parametrize("style", ["joint", "paper"])
def test_a_bayesian_language_model_by_its_own_loss(tmp_path, style):
    """Its loss is the cross-entropy of the next token, all tokens of the batch alike."""
    model, expected = (language_model(True, std_parameterization="square") for _ in range(2))
    data = texts(12)
    options = dict(optimizer_style=style, train_sampling_strategy="sequential")
    BlobTrainer(model, arguments(tmp_path, **options), train_dataset=data).train()

    forward = expected.forward
    expected.forward = lambda input_ids: _Next(forward(input_ids).logits)
    batches = [default_data_collator(data[i : i + 4]) for i in (0, 4, 8)]
    batches = [{"input_ids": b["input_ids"], "labels": b["labels"][:, 1:].flatten()} for b in batches]
    by_hand(expected, batches, [1 / 12] * 3, style=style, expects=False)
    assert_close(trainable(model), trainable(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}])
def test_a_classifier_by_its_own_loss_trains_as_with_a_task(tmp_path, options):
    results = []
    for task in (None, TASK):
        torch.manual_seed(5)
        model = classifier(init_std=0.3844)
        given = arguments(tmp_path, train_sampling_strategy="sequential", max_steps=2, **options)
        BlobTrainer(model, given, task=task, train_dataset=examples(12), data_collator=TASK.collate).train()
        results.append(trainable(model))
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


class _Next:
    def __init__(self, logits):
        self.logits = logits[:, :-1].flatten(0, 1)


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield from examples(10)


def test_a_stream_needs_the_size_of_the_data(tmp_path):
    trainer = make_trainer(tmp_path, data=Stream())
    with pytest.raises(ValueError, match="dataset_size is None and the training data has no length"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_stream_of_a_known_size(tmp_path):
    trainer = make_trainer(tmp_path, data=Stream(), dataset_size=10, kl_weighting="reweighted")
    trainer.train()
    assert trainer.state.global_step == 3
    assert logs(trainer, "kl_weight") == pytest.approx([i / 7 for i in (1, 2, 4)])


def test_a_plain_lora_needs_no_size(tmp_path):
    trainer = make_trainer(tmp_path, classifier(bayesian=False), Stream())
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.task is TASK

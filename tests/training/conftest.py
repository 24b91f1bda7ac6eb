"""A tiny Bayesian classifier, its data, and a trainer of it."""

import functools
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from bloblora import BlobConfig, BlobTrainer, bayesianize
from bloblora.tasks import Classification
from bloblora.training import BlobTrainingArguments

from ..conftest import with_lora

PAPERS = dict(prior_std=0.2, init_std=0.0025, std_parameterization="square")
TASK = Classification(labels=("a", "b", "c"), pad_token_id=0)


@functools.cache
def _base_state() -> dict:
    torch.manual_seed(1)
    return _base().state_dict()


def _base() -> LlamaForSequenceClassification:
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, **heads))


def classifier(bayesian: bool = True, seed: int = 7, **config):
    """A LoRA with a trained head; ``seed`` decides where Ω starts."""
    base = _base()
    base.load_state_dict(_base_state())
    model = with_lora(base, modules_to_save=["score"])
    torch.manual_seed(seed)
    if bayesian:
        bayesianize(model, BlobConfig(**{**PAPERS, **config}))
    return model


def examples(count: int) -> list[dict]:
    """Texts of 3 to 12 tokens with a label."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "label": sum(row) % 3} for row in rows]


def arguments(folder: Path, **overrides) -> BlobTrainingArguments:
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.01,
        optimizer_style="joint",
        std_learning_rate=None,
        max_grad_norm=0.0,
        kl_scale=1.0,
        kl_learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return BlobTrainingArguments(**{**defaults, **overrides})


def make_trainer(folder: Path, model=None, data=12, callbacks=(), eval_dataset=None, **overrides) -> BlobTrainer:
    return BlobTrainer(
        classifier() if model is None else model,
        arguments(folder, **overrides),
        task=TASK,
        train_dataset=examples(data) if isinstance(data, int) else data,
        eval_dataset=eval_dataset,
        data_collator=TASK.collate,
        callbacks=list(callbacks),
    )


def trainable(model) -> dict[str, torch.Tensor]:
    """Copies of what is trained: M, Ω, B and the head."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logs(trainer, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


def assert_equal(actual: dict, expected: dict) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def assert_close(actual: dict, expected: dict, **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)

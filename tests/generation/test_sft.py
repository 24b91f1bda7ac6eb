"""A Bayesian model in TRL's SFTTrainer."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset

from bloblora import BlobConfig, BlobTrainer, BlobTrainingArguments, bayesianize
from bloblora.generation import posterior_generate
from tests.tasks.conftest import tiny_causal, with_lora

trl = pytest.importorskip("trl")

RECORDS = [
    {"prompt": "Which gas do plants take?", "completion": " carbon dioxide"},
    {"prompt": "What was charged twice?", "completion": " my card"},
]


class BlobSFTTrainer(BlobTrainer, trl.SFTTrainer):
    """SFTTrainer's data, BlobTrainer's loss."""


@dataclass
class BlobSFTConfig(BlobTrainingArguments, trl.SFTConfig):
    """Arguments of both."""


def trainer_of(model, tokenizer, folder, **options):
    arguments = BlobSFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    return BlobSFTTrainer(model, arguments, train_dataset=Dataset.from_list(RECORDS), processing_class=tokenizer)


def bayesian_model():
    model = with_lora(tiny_causal(), "q_proj", "v_proj", task_type="CAUSAL_LM")
    return model, bayesianize(model, BlobConfig(init_std=0.3))


def answer_tokens(tokenizer):
    return sum(len(tokenizer(record["completion"])["input_ids"]) + 1 for record in RECORDS)


def test_noise_kl_and_completion_loss(tokenizer, tmp_path):
    model, posterior = bayesian_model()
    size = answer_tokens(tokenizer)
    trainer = trainer_of(model, tokenizer, tmp_path, max_steps=3, dataset_size=size)
    batch = next(iter(trainer.get_train_dataloader()))
    assert int((batch["labels"] != -100).sum()) == size
    model.train()
    with torch.no_grad():
        noisy = [trainer.compute_loss(model, dict(batch)).item() for _ in range(2)]
        with posterior.mean():
            fixed = [trainer.compute_loss(model, dict(batch)).item() for _ in range(2)]
    assert noisy[0] != noisy[1]
    assert fixed[0] == fixed[1]
    # the loss at the mean is that of transformers: the mean over the completions' tokens
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, batch["labels"][:, 1:], ignore_index=-100)
    assert fixed[0] == pytest.approx(expected.item(), abs=1e-4)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "kl" in log)
    assert log["kl_weight"] == pytest.approx(1 / size)
    assert log["elbo"] == pytest.approx(-(log["nll"] + log["kl"] / size))


def test_the_kl_alone_moves_the_posterior_to_its_prior(tokenizer, tmp_path):
    model, posterior = bayesian_model()
    before = posterior.kl().item()
    trainer = trainer_of(model, tokenizer, tmp_path, max_steps=5, dataset_size=1, kl_learning_rate=0.5)
    trainer.train()
    assert posterior.kl().item() < 0.5 * before


def test_it_learns_to_answer(tokenizer, tmp_path):
    # Of two examples the KL leaves nothing to learn, and random layers need more than q and v.
    model = with_lora(tiny_causal(), "o_proj", "gate_proj", "up_proj", "down_proj", task_type="CAUSAL_LM")
    bayesianize(model, BlobConfig(init_std=0.01))
    trainer_of(model, tokenizer, tmp_path, max_steps=150, kl_scale=0.0).train()
    inputs = tokenizer([record["prompt"] for record in RECORDS], padding=True, padding_side="left", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = posterior_generate(model, inputs, 0, tokenizer=tokenizer, max_new_tokens=12, do_sample=False)
    assert found.texts == [record["completion"] for record in RECORDS]

"""A Bayesian model in TRL's SFTTrainer."""

import math
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from bloblora import BlobConfig, BlobTrainer, BlobTrainerMixin, BlobTrainingArguments, bayesianize, find_posterior, load
from bloblora.generation import posterior_generate
from bloblora.training import Objective
from tests.tasks.conftest import tiny_causal, with_lora

trl = pytest.importorskip("trl")

RECORDS = [
    {"prompt": "Which gas do plants take?", "completion": " carbon dioxide"},
    {"prompt": "What was charged twice?", "completion": " my card"},
]


class BlobSFTTrainer(BlobTrainerMixin, trl.SFTTrainer):
    """SFTTrainer's data and loss, and the KL."""


@dataclass
class BlobSFTConfig(Objective, trl.SFTConfig):
    """Arguments of both."""

    dataset_size: int | None = None


class Combined(BlobTrainer, trl.SFTTrainer):
    """BlobTrainer has the mixin."""


@dataclass
class CombinedConfig(BlobTrainingArguments, trl.SFTConfig):
    """All of BlobTrainer's arguments, and SFTTrainer's."""


def trainer_of(model, tokenizer, folder, trainer=BlobSFTTrainer, config=BlobSFTConfig, **options):
    arguments = config(
        output_dir=str(folder),
        learning_rate=0.02,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **{"per_device_train_batch_size": 2, "save_strategy": "no", **options},
    )
    return trainer(model, arguments, train_dataset=Dataset.from_list(RECORDS), processing_class=tokenizer)


def bayesian_model(**config):
    model = with_lora(tiny_causal(), "q_proj", "v_proj", task_type="CAUSAL_LM")
    return model, bayesianize(model, BlobConfig(init_std=0.09, **config))


def answer_tokens(tokenizer):
    return sum(len(tokenizer(record["completion"])["input_ids"]) + 1 for record in RECORDS)


def test_noise_kl_and_completion_loss(tokenizer, tmp_path):
    model, posterior = bayesian_model()
    size = answer_tokens(tokenizer)
    trainer = trainer_of(model, tokenizer, tmp_path, max_steps=3, dataset_size=size, kl_scale=1.0)
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


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("style", ["joint", "paper_flow"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_equal_those_of_the_trainer_without_trl(tokenizer, tmp_path, style, accumulation):
    """On the same batches; SFTTrainer has a head of its own, which leaves out the logits without a label."""
    parameterization = "log" if style == "joint" else "square"
    models = [bayesian_model(std_parameterization=parameterization)[0] for _ in range(3)]
    options = dict(max_steps=3, dataset_size=answer_tokens(tokenizer), optimizer_style=style, kl_learning_rate=0.01)
    options |= dict(per_device_train_batch_size=2 // accumulation, gradient_accumulation_steps=accumulation)
    options |= dict(train_sampling_strategy="sequential", max_grad_norm=0.0)
    before = state(models[0])
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    mixed = trainer_of(models[0], tokenizer, tmp_path, **options)
    mixed.train()
    trainer_of(models[1], tokenizer, tmp_path, Combined, CombinedConfig, **options).train()
    arguments = BlobTrainingArguments(
        str(tmp_path), learning_rate=0.02, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **options
    )
    plain = BlobTrainer(models[2], arguments, train_dataset=mixed.train_dataset, data_collator=mixed.data_collator)
    plain.train()
    expected = state(models[2])
    for model in models[:2]:
        for name, found in state(model).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4)
    assert any((found - before[name]).abs().max() > 0.01 for name, found in expected.items())


@pytest.mark.parametrize("option", [{"loss_type": "nll"}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.3}])
def test_losses_are_those_of_the_stock_trainer(tokenizer, tmp_path, option):
    """With accumulation, at the mean and without a KL; each of them is another loss than the plain one."""
    options = dict(max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=1, optim="sgd", **option)
    found, posterior = bayesian_model()
    expected = with_lora(tiny_causal(), "q_proj", "v_proj", task_type="CAUSAL_LM")
    expected.load_state_dict({k: v for k, v in found.state_dict().items() if k in expected.state_dict()})
    ours = trainer_of(found, tokenizer, tmp_path, kl_scale=0.0, dataset_size=10, **options)
    with posterior.mean():
        ours.train()
    reference = trainer_of(expected, tokenizer, tmp_path, trl.SFTTrainer, trl.SFTConfig, **options)
    reference.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (ours, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in state(expected).items():
        torch.testing.assert_close(state(found)[name], weight, rtol=1e-3, atol=1e-5)
    if option != {"loss_type": "nll"}:
        plain = trainer_of(expected, tokenizer, tmp_path, trl.SFTTrainer, trl.SFTConfig)
        batch = next(iter(plain.get_train_dataloader()))
        nll = expected.eval()(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
        assert abs(losses[0] - nll) > 0.05


def test_what_it_saves(tokenizer, tmp_path):
    model, posterior = bayesian_model()
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, dataset_size=10)
    trainer = trainer_of(model, tokenizer, tmp_path / "out", **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "final"):
        loaded = find_posterior(load(tiny_causal(), folder))
        assert loaded.config == posterior.config
        for name, std in posterior.named_std_parameters().items():
            assert torch.equal(loaded.named_std_parameters()[name], std)
            assert torch.equal(loaded.named_means()[name], posterior.named_means()[name])
    weights = state(model)
    resumed, _ = bayesian_model()
    trainer_of(resumed, tokenizer, tmp_path / "out", **options).train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1")
    )
    assert all(torch.equal(found, weights[name]) for name, found in state(resumed).items())


def test_the_kl_alone_moves_the_posterior_to_its_prior(tokenizer, tmp_path):
    model, posterior = bayesian_model()
    before = posterior.kl().item()
    trainer = trainer_of(model, tokenizer, tmp_path, max_steps=5, dataset_size=1, kl_scale=1.0, std_learning_rate=0.5)
    trainer.train()
    assert posterior.kl().item() < 0.5 * before


def test_it_learns_to_answer(tokenizer, tmp_path):
    # Of two examples the KL leaves nothing to learn, and random layers need more than q and v.
    model = with_lora(tiny_causal(), "o_proj", "gate_proj", "up_proj", "down_proj", task_type="CAUSAL_LM")
    bayesianize(model, BlobConfig(init_std=0.0001))
    trainer_of(model, tokenizer, tmp_path, max_steps=150, kl_scale=0.0).train()
    inputs = tokenizer([record["prompt"] for record in RECORDS], padding=True, padding_side="left", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = posterior_generate(model, inputs, 0, tokenizer=tokenizer, max_new_tokens=12, do_sample=False)
    assert found.texts == [record["completion"] for record in RECORDS]


def test_what_would_train_another_posterior_is_said(tokenizer, tmp_path):
    model, _ = bayesian_model()
    with pytest.warns(UserWarning, match=r"BlobSFTTrainer: dataset_size is None, .* by the 2 examples"):
        trainer_of(model, tokenizer, tmp_path, max_steps=1).train()
    arguments = BlobSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match=r"peft_config: .* leave it out, and call .* bayesianize\(model, BlobConfig"):
        BlobSFTTrainer(tiny_causal(), arguments, peft_config=LoraConfig(), train_dataset=Dataset.from_list(RECORDS))


PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " iron"} for r in RECORDS]


class BlobDPOTrainer(BlobTrainerMixin, trl.DPOTrainer):
    """DPOTrainer's data and loss, and the KL."""


@dataclass
class BlobDPOConfig(Objective, trl.DPOConfig):
    """Arguments of both."""

    dataset_size: int | None = None


def preference_trainer(model, tokenizer, folder, **options):
    arguments = BlobDPOConfig(
        str(folder),
        dataset_size=2,
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
        **options,
    )
    return BlobDPOTrainer(model, arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)


def test_preferences(tokenizer, tmp_path):
    """TRL's DPOTrainer has batches of its own; its first loss is log 2, whatever the noise, for B is 0."""
    model = get_peft_model(tiny_causal(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    posterior = bayesianize(model, BlobConfig(init_std=0.09))
    kl = posterior.kl().item()
    trainer = preference_trainer(model, tokenizer, tmp_path, max_steps=2, logging_steps=1)
    trainer.train()
    first, second = [log for log in trainer.state.log_history if "nll" in log]
    assert first["nll"] == pytest.approx(math.log(2), rel=1e-4)
    assert second["nll"] != pytest.approx(math.log(2), rel=1e-4)
    assert second["kl"] < kl


def test_the_reference_of_preferences_has_no_noise(tokenizer, tmp_path):
    """Of an adapter that has an effect it is the posterior mean, before the training and at each of its steps."""
    model, posterior = bayesian_model()
    start = {name: mean.detach().clone() for name, mean in posterior.named_means().items()}
    expected = [
        [mean_log_prob(model, posterior, tokenizer, pair, side) for side in ("chosen", "rejected")] for pair in PAIRS
    ]
    trainer = preference_trainer(
        model, tokenizer, tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=2
    )
    seen = []
    hook = model.register_forward_hook(
        lambda module, args, out: seen.append((module.active_adapter, out.log_probs.sum(1)))
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    with torch.no_grad():
        for _ in range(2):
            trainer.compute_loss(model, dict(batch))
    trainer.train()
    hook.remove()
    reference = [log_probs for name, log_probs in seen if name == "ref"]
    policy = [log_probs for name, log_probs in seen if name == "default"]
    assert len(reference) == len(policy) == 4
    assert not torch.allclose(policy[0], policy[1], atol=1e-3)  # other noise
    wanted = sorted(value for pair in expected for value in pair)
    for log_probs in reference:
        assert sorted(log_probs.tolist()) == pytest.approx(wanted, abs=1e-3)
    # what is trained is the posterior, and the copy stays
    assert any((found - start[name]).abs().max() > 1e-3 for name, found in posterior.named_means().items())
    assert all(p.requires_grad for p in posterior.named_std_parameters().values())
    written = preference_trainer(
        bayesian_model()[0], tokenizer, tmp_path / "before", max_steps=1, precompute_ref_log_probs=True
    )
    written.get_train_dataloader()
    kept = written.train_dataset.to_list()
    found = [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in kept]
    assert found == [pytest.approx(values, abs=1e-3) for values in expected]


@torch.no_grad()
def mean_log_prob(model, posterior, tokenizer, pair, side):
    """log p of a completion and its end under the mean."""
    prompt = tokenizer(pair["prompt"])["input_ids"]
    ids = [*prompt, *tokenizer(pair[side])["input_ids"], tokenizer.eos_token_id]
    with posterior.mean():
        logits = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))

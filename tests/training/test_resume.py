"""A training that was stopped and goes on, against one that was not."""

import functools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, default_data_collator

from bloblora import BlobTrainer, bayesianize, find_posterior
from bloblora.training import last_checkpoint

from ..conftest import tiny_llama
from .conftest import arguments, assert_equal, classifier, examples, logs, make_trainer, trainable

# Ten examples, four a step in two micro-batches: three steps a pass, the last of them with one micro-batch.
OPTIONS = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=8,
    warmup_steps=2,
    lr_scheduler_type="cosine",
    save_strategy="steps",
    save_steps=1,
    kl_weighting="reweighted",
)
STYLES = ("joint", "paper")
SAMPLING = ("random", "group_by_length")


@pytest.fixture(scope="module")
def uninterrupted():
    """(style, sampling) → a folder with a checkpoint a step, the final weights and logs."""
    with tempfile.TemporaryDirectory() as root:

        @functools.cache
        def run(style, sampling):
            folder = Path(root) / style / sampling
            trainer = make_trainer(folder, data=10, optimizer_style=style, train_sampling_strategy=sampling, **OPTIONS)
            trainer.train()
            return folder, trainable(trainer.model), logs(trainer, "elbo")

        yield run


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("step", [1, 3, 5, 8], ids=["middle of pass 1", "end of pass 1", "middle of pass 2", "end"])
def test_a_resumed_training_is_bit_identical(tmp_path, uninterrupted, style, sampling, step):
    folder, weights, elbos = uninterrupted(style, sampling)
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    model = classifier(seed=8)  # another start, so that what is not loaded shows
    trainer = make_trainer(tmp_path, model, 10, optimizer_style=style, train_sampling_strategy=sampling, **OPTIONS)
    torch.manual_seed(123)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert_equal(trainable(model), weights)
    assert logs(trainer, "elbo") == elbos


def test_a_resumed_training_has_the_prior_of_its_start(tmp_path):
    config = dict(prior_mean="start", prior_std="start", std_parameterization="log", init_std=None)
    model, again = classifier(**config), classifier(seed=8, **config)
    trainer = make_trainer(tmp_path, model, 10, **OPTIONS)
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    with torch.no_grad():  # so that a prior that is not loaded shows
        for mean, std in find_posterior(again).named_priors().values():
            mean.zero_()
            std.fill_(1.0)
    resumed = make_trainer(tmp_path, again, 10, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(trainable(again), trainable(model))
    assert logs(resumed, "elbo") == logs(trainer, "elbo")


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_order_of_the_data_changes_with_the_pass(tmp_path, sampling):
    """What makes the middle of the second pass a case of its own."""
    seen = []

    class Batches(TrainerCallback):
        def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
            seen.append(train_dataloader)

    trainer = make_trainer(tmp_path, data=10, callbacks=[Batches()], train_sampling_strategy=sampling)
    trainer.train()
    orders = []
    for epoch in (0, 1, 0):
        seen[0].set_epoch(epoch)
        orders.append([batch["labels"].tolist() for batch in seen[0]])
    assert orders[0] == orders[2] != orders[1]


def test_resuming_a_language_model_with_batches_of_like_length(tmp_path):
    """Without a task the sampler is the Trainer's, whose order is torch's global generator's."""
    data = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9) + i} for i in range(10)]

    def run(folder, **options):
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="words")
        bayesianize(model)
        options = {**OPTIONS, "train_sampling_strategy": "group_by_length", **options}
        trainer = BlobTrainer(
            model, arguments(folder, **options), train_dataset=data, data_collator=default_data_collator
        )
        return model, trainer

    model, trainer = run(tmp_path)
    trainer.train()
    resumed, trainer = run(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal(trainable(resumed), trainable(model))


def test_the_state_of_the_noise_is_not_a_fresh_seed(tmp_path, uninterrupted):
    """Without its generators a resumed run ends elsewhere: so the tests above would notice."""
    folder, weights, _ = uninterrupted("joint", "random")
    shutil.copytree(folder / "checkpoint-5", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "rng_state.pth").unlink()
    trainer = make_trainer(tmp_path, data=10, **OPTIONS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert any(not torch.equal(p, weights[n]) for n, p in trainable(trainer.model).items())


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=f"no complete checkpoint in {tmp_path}"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_best_model_is_loaded_with_its_posterior(tmp_path):
    options = dict(save_strategy="steps", eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=4)
    trainer = make_trainer(
        tmp_path, eval_dataset=examples(12), load_best_model_at_end=True, greater_is_better=True, **options
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"  # the highest loss is the first's
    other = classifier(seed=8)
    make_trainer(tmp_path, other)._load_from_checkpoint(str(best))
    assert_equal(trainable(trainer.model), trainable(other))


TORN = {
    "no state": lambda f: (f / "trainer_state.json").unlink(),
    "empty state": lambda f: (f / "trainer_state.json").write_text(""),
    "half a state": lambda f: os.truncate(f / "trainer_state.json", 100),
    "half the mean": lambda f: os.truncate(f / "adapter_model.safetensors", 1000),
    "half the posterior": lambda f: os.truncate(f / "posterior.safetensors", 1000),
    "no posterior": lambda f: (f / "posterior.safetensors").unlink(),
    "another step's posterior": lambda f: shutil.copy(f.parent / "checkpoint-1" / "posterior.safetensors", f),
    "half an optimizer": lambda f: os.truncate(f / "optimizer.pt", 2000),
    "no optimizer": lambda f: (f / "optimizer.pt").unlink(),
    "half a schedule": lambda f: os.truncate(f / "scheduler.pt", 500),
    "no schedule": lambda f: (f / "scheduler.pt").unlink(),
    "half a generator": lambda f: os.truncate(f / "rng_state.pth", 2000),
    "no generator": lambda f: (f / "rng_state.pth").unlink(),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN.keys())
def test_a_torn_checkpoint_is_passed_over(tmp_path, uninterrupted, tear):
    folder, _, _ = uninterrupted("joint", "random")
    for step in (1, 2, 10):
        shutil.copytree(folder / f"checkpoint-{min(step, 3)}", tmp_path / f"checkpoint-{step}")
    state = tmp_path / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 10}))
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    tear(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_rotation_never_takes_a_torn_checkpoint_for_the_newest(tmp_path, uninterrupted):
    """A torn one of a later step and, by another machine's clock, a later time: the Trainer would keep that alone."""
    folder, _, _ = uninterrupted("joint", "random")
    for step in (4, 7):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-7" / "trainer_state.json").unlink()
    os.utime(tmp_path / "checkpoint-7", (time.time() + 3600,) * 2)
    options = {**OPTIONS, "max_steps": 5, "save_total_limit": 1}
    make_trainer(tmp_path, data=10, **options).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert last_checkpoint(tmp_path).name == "checkpoint-5"


def test_without_a_limit_nothing_is_deleted(tmp_path, uninterrupted):
    folder, _, _ = uninterrupted("joint", "random")
    for step in (4, 7):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-7" / "trainer_state.json").unlink()
    make_trainer(tmp_path, data=10, **{**OPTIONS, "max_steps": 5}).train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-5", "checkpoint-7"}


def test_a_checkpoint_that_is_written_again_does_not_look_complete_meanwhile(tmp_path, uninterrupted):
    folder, _, _ = uninterrupted("joint", "random")
    for step in (4, 5):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    trainer = make_trainer(tmp_path, data=10, **{**OPTIONS, "max_steps": 5})
    seen = []
    save = trainer._save_optimizer_and_scheduler
    trainer._save_optimizer_and_scheduler = lambda output: (seen.append(last_checkpoint(tmp_path).name), save(output))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen == ["checkpoint-4"]
    assert last_checkpoint(tmp_path).name == "checkpoint-5"

"""The objective in other Trainers, and in a loop without one."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

from bloblora import BlobTrainer, BlobTrainerMixin, find_posterior, load
from bloblora.training import Objective
from tests.docs.blocks import blocks_of

from .conftest import TASK, _base, _base_state, arguments, assert_close, assert_equal, classifier, examples, trainable
from .test_plain import language_model, texts
from .test_steps import Gradients, batches, closed_form_kl

OPTIONS = dict(learning_rate=0.01, max_steps=3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True)
OPTIONS |= dict(use_cpu=True, kl_scale=1.0, max_grad_norm=0.0, logging_steps=1, train_sampling_strategy="sequential")


@dataclass
class Arguments(Objective, TrainingArguments):
    """Any Trainer's, with the objective's."""


class Weighted(Trainer):
    """A user's: classes have weights."""

    weights = torch.tensor([3.0, 1.0, 0.2])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["input_ids"], inputs["attention_mask"])
        loss = F.cross_entropy(outputs.logits, inputs["labels"], self.weights)
        return (loss, outputs) if return_outputs else loss


class BayesianWeighted(BlobTrainerMixin, Weighted):
    """The same with a KL."""


@pytest.mark.parametrize("draws", [1, 2])
def test_a_trainer_with_a_loss_of_its_own_keeps_it(tmp_path, draws):
    """Against a loop by hand, with the closed-form KL of torch.distributions."""
    model, expected = classifier(init_std=0.25), classifier(init_std=0.25)
    options = dict(num_weight_draws=draws, std_learning_rate=None, save_strategy="no")
    BayesianWeighted(
        model,
        Arguments(str(tmp_path), **OPTIONS, **options),
        train_dataset=examples(12),
        data_collator=TASK.collate,
    ).train()
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], 0.01, weight_decay=0)
    torch.manual_seed(42)
    torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws the seed of its workers when a pass begins
    for step, batch in enumerate(batches(12)):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 3)
        nll = sum(
            F.cross_entropy(
                expected.train()(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"], Weighted.weights
            )
            for _ in range(draws)
        )
        optimizer.zero_grad()
        (nll / draws + closed_form_kl(find_posterior(expected)) / 12).backward()
        optimizer.step()
    assert_close(trainable(model), trainable(expected), rtol=1e-4, atol=1e-6)


class WeightedBlob(BlobTrainer):
    """The same, as a subclass of `BlobTrainer`."""

    weights, compute_loss = Weighted.weights, Weighted.compute_loss


def test_a_subclass_with_a_loss_of_its_own_is_as_the_mixin(tmp_path):
    """Under a Gaussian head, of which it has draws: its NLL isn't the bounded one of classes."""
    found = []
    for cls in (BayesianWeighted, WeightedBlob):
        model = classifier(factors="auto", head_prior_std="auto", std_parameterization="log", init_std=None)
        data = {"train_dataset": examples(12), "eval_dataset": examples(12), "data_collator": TASK.collate}
        trainer = cls(model, arguments(tmp_path), **data)
        trainer.train()
        found.append((trainable(model), trainer.posterior.temperatures, trainer.evaluate()["eval_loss"]))
    assert_equal(found[1][0], found[0][0])
    assert found[1][1:] == found[0][1:]


def test_squares_of_a_divided_loss_of_a_subclass_are_those_of_the_loss(tmp_path):
    norms = []
    for accumulation in (1, 4):
        model = classifier(
            factors="auto", head_prior_std="auto", std_parameterization="log", init_std=None, std_gradient="fisher"
        )
        options = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=32 // accumulation)
        options |= dict(max_steps=1, kl_scale=0.0, head_kl_scale=0.0, train_sampling_strategy="sequential")
        gradients = Gradients(find_posterior(model))
        data = {"train_dataset": examples(32), "data_collator": TASK.collate, "callbacks": [gradients]}
        WeightedBlob(model, arguments(tmp_path, **options), **data).train()
        norms.append(gradients.seen[0][1].norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


def test_a_plain_lora_trains_as_without_the_mixin(tmp_path):
    results = []
    for cls in (Weighted, BayesianWeighted):
        model = classifier(bayesian=False)
        options = OPTIONS | dict(gradient_accumulation_steps=2, max_steps=4)
        trainer = cls(
            model,
            Arguments(str(tmp_path), **options),
            train_dataset=examples(12),
            eval_dataset=examples(20)[12:],
            data_collator=TASK.collate,
        )
        trainer.train()
        results.append((trainable(model), trainer.evaluate()["eval_loss"]))
    assert_equal(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]


def test_its_checkpoints_hold_the_posterior_and_training_goes_on(tmp_path):
    def trainer_of(model):
        options = OPTIONS | dict(max_steps=4, save_strategy="steps", save_steps=1, optimizer_style="paper_flow")
        return BayesianWeighted(
            model, Arguments(str(tmp_path), **options), train_dataset=examples(12), data_collator=TASK.collate
        )

    model, resumed = classifier(init_std=0.25), classifier(init_std=0.25, seed=8)
    trainer_of(model).train()
    base = _base()
    base.load_state_dict(_base_state())
    loaded = find_posterior(load(base, tmp_path / "checkpoint-4"))
    assert_equal(loaded.named_std_parameters(), find_posterior(model).named_std_parameters())
    trainer_of(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(trainable(resumed), trainable(model))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_log_has_the_nll_of_the_whole_step(tmp_path, accumulation):
    """Of a language model, whose loss the Trainer weighs by the tokens of all micro-batches."""
    data = [{"input_ids": ids, "labels": ids} for ids in (row["input_ids"] for row in texts(8))]
    for row in data[:4]:
        row["labels"] = torch.where(torch.arange(7) < 5, -100, row["labels"])  # fewer tokens in the first micro-batches
    model = language_model(True)
    options = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation, max_steps=1)
    trainer = BlobTrainer(
        model, arguments(tmp_path, train_sampling_strategy="sequential", **options), train_dataset=data
    )
    ids, labels = (torch.stack([row[key] for row in data]) for key in ("input_ids", "labels"))
    with trainer.posterior.mean():
        logits = model(ids).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()
        trainer.train()
    (found,) = (log["nll"] for log in trainer.state.log_history if "nll" in log)
    assert found == pytest.approx(expected, rel=1e-4)


def test_arguments_without_the_objective(tmp_path):
    with pytest.raises(TypeError, match=r"TrainingArguments lacks kl_weighting, .*; give BlobTrainingArguments, or"):
        BlobTrainer(classifier(), TrainingArguments(str(tmp_path)))
    with pytest.raises(TypeError, match="NoneType lacks kl_weighting"):
        BlobTrainer(classifier())
    with pytest.raises(ValueError, match="kl_scale must be a finite number of at least 0, got -1"):
        BayesianWeighted(classifier(), Arguments(str(tmp_path), kl_scale=-1))


def test_the_mixin_stands_first():
    with pytest.raises(
        TypeError, match="Wrong: BlobTrainerMixin stands after a Trainer, which hides it; name it first"
    ):

        class Wrong(Weighted, BlobTrainerMixin):
            pass


def test_the_trainer_of_the_docs_counts_the_nll_once_with_accumulation(tmp_path):
    code = next(block.code for block in blocks_of("docs/training_loop.md") if "class SmoothedTrainer" in block.code)
    ends = []
    for accumulation in (1, 2):
        model, names = classifier(init_std=0.25), {"torch": torch, "__name__": __name__}
        exec(code.split("arguments =")[0], names)
        options = OPTIONS | dict(max_steps=1, gradient_accumulation_steps=accumulation, optim="sgd")
        options |= dict(per_device_train_batch_size=8 // accumulation, save_strategy="no")
        data = {"train_dataset": examples(8), "data_collator": TASK.collate}
        trainer = names["BayesianTrainer"](model, names["BayesianArguments"](str(tmp_path), **options), **data)
        with trainer.posterior.mean():
            trainer.train()
        ends.append(trainable(model))
    assert_close(*ends)


def test_the_loop_of_the_docs_is_what_the_trainer_does(tmp_path, monkeypatch):
    """Bit for bit, but for the order of the data and the schedule of the learning rate, which the docs' loop lacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.utils.data.dataloader.RandomSampler", lambda data, **_: SequentialSampler(data))
    code = next(block.code for block in blocks_of("docs/training_loop.md") if block.language == "python")
    assert len([line for line in code.splitlines() if line and "import" not in line]) == 13
    data, model, expected = texts(24), language_model(True), language_model(True)
    names = {"model": model, "posterior": find_posterior(model), "dataset": data}
    exec(code.replace("for batch", "torch.manual_seed(42)\nfor batch"), names)
    options = dict(
        learning_rate=1e-3, std_learning_rate=0.02, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", per_device_train_batch_size=8,
    )  # fmt: skip
    BlobTrainer(expected, arguments(tmp_path / "trainer", **options), train_dataset=data).train()
    assert_close(trainable(model), trainable(expected), rtol=1e-5, atol=1e-7)
    saved = find_posterior(load(language_model(False).unload(), tmp_path / "adapter"))
    assert_equal(saved.named_std_parameters(), find_posterior(model).named_std_parameters())
    assert isinstance(names["loader"], DataLoader)

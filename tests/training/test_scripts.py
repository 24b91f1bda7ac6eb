"""The scripts that people have: with `BlobTrainer` they work, and what would train no posterior is said."""

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bloblora import BlobConfig, BlobTrainer, BlobTrainingArguments, bayesianize, find_posterior, predict
from tests.conftest import tiny_llama, with_lora
from tests.tiny_base import queries

from .test_plain import language_model, texts

LORA = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
QUIET = dict(report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no")
NO_KL = r"was trained for 3 steps without its KL.*use BlobTrainer instead of Trainer.*add posterior.kl\(\)"


@pytest.fixture
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def dataset(tokenizer):
    """As in every tutorial: the text stays, and the labels are called `label`."""
    rows = Dataset.from_list(3 * [{"text": r["text"], "label": int(r["label"] == "refund")} for r in queries()])
    return rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=32), batched=True)


@pytest.fixture
def make(base, tokenizer):
    def make(bayesian=True, **config):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        model.config.pad_token_id = tokenizer.pad_token_id
        model = get_peft_model(model, LORA)
        if bayesian:
            bayesianize(model, BlobConfig(**config))
        return model

    return make


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("draws", [0, 3])
def test_the_script_that_everyone_has(make, dataset, tokenizer, tmp_path, draws):
    model = make()
    options = dict(num_train_epochs=20, learning_rate=2e-2, eval_num_samples=draws, per_device_train_batch_size=4)
    trainer = BlobTrainer(
        model=model,
        args=BlobTrainingArguments(str(tmp_path), eval_strategy="epoch", **options, **QUIET),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_accuracy"] == 1
    answers = predict(model, dataset["text"][:], draws, seed=trainer.args.seed, tokenizer=tokenizer)
    nll = -answers.log_probabilities[range(len(dataset)), torch.tensor(dataset["label"][:])].mean().item()
    assert found["eval_loss"] == pytest.approx(nll, abs=1e-4)
    assert find_posterior(model).summary()["kl"] > 1


def test_columns_are_removed_as_the_trainer_does(make, dataset, tokenizer, tmp_path):
    options = dict(max_steps=1, remove_unused_columns=False, **QUIET)
    kept = BlobTrainer(
        make(), BlobTrainingArguments(str(tmp_path), **options), train_dataset=dataset, processing_class=tokenizer
    )
    with pytest.raises(ValueError, match="`text` in this case"):
        kept.train()


def test_model_init_gives_each_training_its_own_posterior(make, dataset, tokenizer, tmp_path):
    made = []

    def model_init():
        made.append(make())
        return made[-1]

    options = dict(max_steps=6, learning_rate=1e-2, kl_scale=1.0, logging_steps=1, per_device_train_batch_size=4)
    arguments = BlobTrainingArguments(str(tmp_path), **options, **QUIET)
    trainer = BlobTrainer(args=arguments, model_init=model_init, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    first, second = made
    assert trainer.model is second
    assert trainer.posterior.model is second
    logged = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert logged[-1] == pytest.approx(find_posterior(second).kl().item(), rel=1e-5)
    assert logged[-1] < find_posterior(first).kl().item()  # it wasn't trained
    given = make()
    BlobTrainer(given, arguments, train_dataset=dataset, processing_class=tokenizer).train()
    for name, mean in find_posterior(second).named_means().items():
        assert torch.equal(find_posterior(given).named_means()[name], mean)


@pytest.fixture
def searcher(make, dataset, tokenizer, tmp_path):
    """A Trainer of these options, for a search."""

    def searcher_of(**options):
        return BlobTrainer(
            args=BlobTrainingArguments(str(tmp_path), eval_strategy="epoch", **options, **QUIET),
            model_init=lambda: make(),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=tokenizer,
        )

    return searcher_of


@pytest.mark.filterwarnings("ignore:the posterior")
def test_hyperparameter_search(searcher):
    trainer = searcher(max_steps=3, eval_num_samples=2, per_device_train_batch_size=4)
    scales = []

    def space(trial):
        rate = trial.suggest_categorical("learning_rate", [1e-5, 5e-2])
        return {"learning_rate": rate, "kl_scale": trial.suggest_float("kl_scale", 0.001, 1, log=True)}

    class Kept(type(trainer.callback_handler.callbacks[0])):
        def on_train_begin(self, args, *_, **__):
            scales.append((args.learning_rate, float(args.kl_scale)))

    trainer.add_callback(Kept())
    import optuna

    sampler = optuna.samplers.GridSampler({"learning_rate": [1e-5, 5e-2], "kl_scale": [0.01]})
    best = trainer.hyperparameter_search(space, n_trials=2, direction="minimize", backend="optuna", sampler=sampler)
    assert sorted(scales) == [(1e-5, 0.01), (5e-2, 0.01)]
    assert best.hyperparameters == {"learning_rate": 5e-2, "kl_scale": 0.01}


@pytest.mark.filterwarnings("ignore:the posterior")
def test_a_search_replaces_auto_and_whole_numbers_from_its_first_trial(searcher, dataset):
    """The Trainer makes each value the type of the one before: a text of 0.5, and a whole number of 0.3."""
    trainer = searcher(max_steps=1, kl_learning_rate=1)
    found = []

    class Found(TrainerCallback):
        def on_train_begin(self, args, *_, **__):
            rate = trainer.optimizer.param_groups[-1]["initial_lr"]
            found.append((trainer.current_kl_weight() * len(dataset), rate, args.kl_learning_rate))

    trainer.add_callback(Found())
    values = {"kl_scale": 0.5, "std_learning_rate": 0.04, "kl_learning_rate": 0.3}
    trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_float(name, value, value) for name, value in values.items()},
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert found == [pytest.approx(tuple(values.values()))] * 2


@pytest.mark.parametrize("bayesian", [False, None])
def test_blob_trainer_without_a_posterior(base, make, dataset, tokenizer, tmp_path, bayesian):
    if bayesian is None:
        model, message = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), "is no PEFT model"
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model, message = make(bayesian=False), "'default' has no posterior, so a plain LoRA is trained"
    trainer = BlobTrainer(
        model,
        BlobTrainingArguments(str(tmp_path), max_steps=1, **QUIET),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    with pytest.warns(UserWarning, match=rf"BlobTrainer: .*{message}.*call .*bayesianize\(model, BlobConfig\(\)\)"):
        trainer.train()


def test_a_stock_trainer_trains_no_posterior(make, dataset, tokenizer, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=8, per_device_train_batch_size=2, **QUIET)
    with pytest.warns(UserWarning, match=NO_KL) as found:
        Trainer(make(), arguments, train_dataset=dataset, processing_class=tokenizer).train()
    assert len([w for w in found if "without its KL" in str(w.message)]) == 1


def test_a_stock_sft_trainer_trains_no_posterior(base, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    model = with_lora(tiny_llama(vocab_size=400), ("q_proj",), task_type="CAUSAL_LM")
    bayesianize(model, BlobConfig())
    options = dict(max_steps=8, bf16=False, gradient_checkpointing=True, per_device_train_batch_size=2)
    arguments = trl.SFTConfig(str(tmp_path), **options, **QUIET)
    data = Dataset.from_list([{"text": record["text"]} for record in queries()])
    with pytest.warns(UserWarning, match=NO_KL):
        trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()


def loop(model, penalty, steps=8, accumulation=1):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    data = texts(2 * steps * accumulation)
    model.train()
    for step in range(steps):
        for part in range(accumulation):
            rows = data[(step * accumulation + part) * 2 :][:2]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            loss = model(**batch).loss
            if part == accumulation - 1:
                loss = loss + penalty(find_posterior(model)) / 100
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def own_kl(posterior):
    """A KL of one's own, without the constant."""
    return sum((std.square() / 0.08 - std.log()).sum() for std in posterior.named_stds().values())


@pytest.mark.parametrize("accumulation", [1, 5])
@pytest.mark.parametrize("penalty", [lambda posterior: posterior.kl(), own_kl])
def test_a_loop_that_adds_the_kl_is_not_warned_about(penalty, accumulation):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without its KL")
        loop(language_model(True), penalty, accumulation=accumulation)


def test_a_loop_that_forgets_the_kl_is():
    with pytest.warns(UserWarning, match=NO_KL):
        loop(language_model(True), lambda _: 0)
    meant = language_model(True)
    find_posterior(meant).watch.silent = True
    frozen = language_model(True)
    for parameter in find_posterior(frozen).parameters()[1]:
        parameter.requires_grad = False
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without its KL")
        for model in (meant, frozen, language_model(False)):
            loop(model, lambda _: 0)


def test_a_language_models_loss_is_a_mean_over_tokens(tmp_path):
    arguments = BlobTrainingArguments(str(tmp_path), max_steps=1, **QUIET)
    with pytest.warns(UserWarning, match=r"dataset_size is None, .* by the 12 examples, .* number of label tokens"):
        BlobTrainer(language_model(True), arguments, train_dataset=texts(12)).train()
    arguments.dataset_size = 72
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dataset_size")
        BlobTrainer(language_model(True), arguments, train_dataset=texts(12)).train()

"""The temperature that a posterior keeps: fitted after a training, used by predictions, and saved."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.optimize import minimize_scalar

from bloblora import BlobTrainer, find_posterior, load, predict, save, set_temperature
from bloblora.adapter import AdapterFileError
from bloblora.files import json_sha256
from bloblora.prediction import WeightDraws

from .conftest import TASK, _base, _base_state, arguments, classifier, examples, make_trainer

HEAD = {"factors": "none", "head_prior_std": 0.5}


def untempered(model, data, num_samples):
    sampler = WeightDraws(find_posterior(model))
    return predict(model, data, num_samples, task=TASK, sampler=sampler).draw_logits().double().numpy()


def log_mean(logits, temperature):
    scaled = logits / temperature
    p = np.exp(scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True))
    return np.log(p.mean(0))


def best_temperature(model, data, num_samples):
    logits, labels = untempered(model, data, num_samples), [example["label"] for example in data]

    def energy(log_temperature):
        right = log_mean(logits, math.exp(log_temperature))[np.arange(len(labels)), labels]
        return -right.sum() + log_temperature**2 / 2

    return math.exp(minimize_scalar(energy, bracket=(-1, 1)).x)


def trained(folder, model, data, with_task=True):
    if with_task:
        trainer = make_trainer(folder, model, eval_dataset=data)
    else:
        rows = Dataset.from_list(
            [{"text": "is left out", **e, "attention_mask": [1] * len(e["input_ids"])} for e in data]
        )
        trainer = BlobTrainer(
            model, arguments(folder), train_dataset=rows, eval_dataset=rows, data_collator=lambda r: TASK.collate(r)
        )
    trainer.train()
    return trainer


@pytest.mark.parametrize("with_task", [True, False])
@pytest.mark.parametrize("config", [{"init_std": 0.36}, HEAD])
def test_a_training_with_evaluation_data_fits_it(tmp_path, config, with_task):
    model, data = classifier(**config), examples(24)
    trainer = trained(tmp_path, model, data, with_task)
    temperatures = find_posterior(model).temperatures
    assert temperatures == pytest.approx([best_temperature(model, data, n) for n in (10, 0)], rel=1e-3)
    assert max(abs(math.log(temperature)) for temperature in temperatures) > 0.05
    for draws, temperature in zip((10, 0), temperatures, strict=True):
        found = predict(model, data, draws, task=TASK).log_probabilities.numpy()
        np.testing.assert_allclose(found, log_mean(untempered(model, data, draws), temperature), atol=1e-5)
    told = trainer.predict(trainer.eval_dataset)
    np.testing.assert_allclose(told.predictions, found, atol=1e-5)  # of the mean
    right = found[np.arange(len(data)), [example["label"] for example in data]]
    assert told.metrics["test_loss"] == pytest.approx(-right.mean(), rel=1e-4)


def test_it_is_saved_with_the_adapter(tmp_path):
    model, data = classifier(**HEAD), examples(24)
    trained(tmp_path, model, data)
    save(model, tmp_path / "adapter")
    base = _base()
    base.load_state_dict(_base_state())
    loaded = load(base, tmp_path / "adapter")
    assert find_posterior(loaded).temperatures == find_posterior(model).temperatures
    before, after = (predict(one, data, 5, task=TASK) for one in (model, loaded))
    assert torch.equal(before.log_probabilities, after.log_probabilities)

    file = tmp_path / "adapter" / "blob_config.json"
    description = {k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"}
    description["temperatures"] = [0.5, -1.0]
    file.write_text(json.dumps(description | {"sha256": json_sha256(description)}))
    with pytest.raises(AdapterFileError, match=r"'temperatures': .* two finite numbers above 0, got \[0.5, -1.0\]"):
        load(_base(), tmp_path / "adapter")


def test_another_training_starts_without_it(tmp_path):
    model, data = classifier(**HEAD), examples(24)
    trained(tmp_path, model, data)
    assert find_posterior(model).temperatures
    make_trainer(tmp_path, model, eval_dataset=data, temperature_scaling=False).train()
    assert find_posterior(model).temperatures is None


@pytest.mark.parametrize("data", [None, examples(9)])
def test_a_gaussian_head_without_one_is_warned_about(tmp_path, data):
    model = classifier(**HEAD)
    with pytest.warns(UserWarning, match="no temperature was fitted.*eval_dataset of 10 examples or more"):
        make_trainer(tmp_path, model, eval_dataset=data).train()
    assert find_posterior(model).temperatures is None


def test_evaluation_data_without_labels_cost_no_training(tmp_path):
    data = [{**example, "label": -100} for example in examples(12)]
    with pytest.warns(UserWarning, match="eval_dataset: no temperature was fitted on it: labels: must be classes"):
        make_trainer(tmp_path, classifier(**HEAD), eval_dataset=data).train()


def test_by_hand(base_of_texts):
    model, tokenizer, texts = base_of_texts
    labels = [row % 2 for row in range(len(texts))]
    temperature = set_temperature(model, texts, labels, tokenizer=tokenizer)
    assert find_posterior(model).temperatures[0] == temperature
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert set_temperature(model, {**batch, "labels": torch.tensor(labels)}) == pytest.approx(temperature, rel=1e-4)
    with pytest.raises(ValueError, match="labels: the inputs have none"):
        set_temperature(model, texts, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"labels: there are 1, and {len(texts)} inputs"):
        set_temperature(model, texts, [0], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="labels: must be classes from 0 to 2, got 0 to 3"):
        set_temperature(model, texts, [*labels[1:], 3], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="model: its adapter isn't Bayesian"):
        set_temperature(classifier(bayesian=False), texts, labels, tokenizer=tokenizer)


@pytest.fixture
def base_of_texts(base):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from bloblora import BlobConfig, bayesianize
    from tests.conftest import with_lora
    from tests.tiny_base import queries

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = with_lora(model, modules_to_save=["score"], task_type="SEQ_CLS")
    bayesianize(model, BlobConfig())
    return model, tokenizer, [row["text"] for row in queries()]

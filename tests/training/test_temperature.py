"""The temperature that a posterior keeps: fitted after a training, used by predictions, and saved."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from scipy.optimize import minimize_scalar
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

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


def loader_of(data, **options):
    return DataLoader(data, collate_fn=lambda rows: TASK.collate(rows), **options)


@pytest.fixture
def head_model():
    return classifier(**HEAD).eval()


@pytest.mark.parametrize("kind", ["prepared", "random", "subset", "weighted", "own"])
def test_a_loader_that_is_not_known_to_keep_the_order_is_refused(kind, head_model):
    data = examples(12)

    class Own(BatchSampler):
        def __iter__(self):
            yield from reversed([*super().__iter__()])

    loader = {
        "prepared": lambda: Accelerator(cpu=True).prepare(loader_of(data, batch_size=4, shuffle=True)),
        "random": lambda: loader_of(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
        "subset": lambda: loader_of(data, batch_size=4, sampler=SubsetRandomSampler(range(12))),
        "weighted": lambda: loader_of(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * 12, 12)),
        "own": lambda: loader_of(data, batch_sampler=Own(SequentialSampler(data), 4, False)),
    }[kind]()
    for call in (predict, set_temperature):
        with pytest.raises(ValueError, match=r"isn't known to keep the order of the data.*give shuffle=False"):
            call(head_model, loader, task=TASK)
    assert find_posterior(head_model).temperatures is None


class Stream(IterableDataset):
    """Its order is another one each time."""

    def __init__(self, data):
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        yield from self.data[self.passes :] + self.data[: self.passes]


@pytest.mark.parametrize("kind", ["plain", "prepared", "batches", "rows", "stream"])
def test_a_loader_is_read_once(kind, head_model):
    """The labels are those of the inputs beside them, and the temperature is that of the examples."""
    data = examples(24)
    expected = set_temperature(head_model, data, task=TASK)
    loader = {
        "plain": lambda: loader_of(data, batch_size=5),
        "prepared": lambda: Accelerator(cpu=True).prepare(loader_of(data, batch_size=5)),
        "batches": lambda: loader_of(data, batch_sampler=[[*range(20)], [*range(20, 24)]]),
        "rows": lambda: loader_of(data, batch_size=5, sampler=[*reversed(range(24))]),
        "stream": lambda: loader_of(Stream(data), batch_size=5),
    }[kind]()
    assert set_temperature(head_model, loader, task=TASK) == pytest.approx(expected, rel=1e-4)
    if kind == "plain":
        labels = [example["label"] for example in data]
        assert set_temperature(head_model, loader, labels, task=TASK) == pytest.approx(expected, rel=1e-4)
    if kind == "stream":
        assert loader.dataset.passes == 1


def test_a_disabled_adapter_has_no_temperature(tmp_path):
    model, data = classifier(**HEAD), examples(24)
    trainer = trained(tmp_path, model, data)
    base = model.get_base_model()
    with model.disable_adapter(), torch.no_grad():
        expected = TASK.logits(base, TASK.collate(data)).log_softmax(-1)
        for draws in (0, 3):
            found = predict(model, data, draws, task=TASK).log_probabilities
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        told = torch.tensor(trainer.predict(data).predictions)
        torch.testing.assert_close(told.log_softmax(-1), expected, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="model: its adapter is disabled"):
            set_temperature(model, data, task=TASK)
    tempered = predict(model, data, 0, task=TASK).log_probabilities.double().numpy()
    of_mean = find_posterior(model).temperatures[1]
    np.testing.assert_allclose(tempered, log_mean(untempered(model, data, 0), of_mean), atol=1e-5)


@pytest.mark.parametrize("with_task", [True, False])
@pytest.mark.parametrize(("metric", "names"), [(None, ["a", "b"]), ("eval_b_loss", ["b"]), ("a_loss", ["a"])])
def test_several_evaluation_data_sets(tmp_path, with_task, metric, names):
    model, parts = classifier(**HEAD), {"a": examples(40)[:18], "b": examples(40)[18:]}
    options = {"metric_for_best_model": metric}
    if with_task:
        make_trainer(tmp_path, model, eval_dataset=parts, **options).train()
    else:
        rows = {name: Dataset.from_list(with_mask(data)) for name, data in parts.items()}
        collator = lambda r: TASK.collate(r)  # noqa: E731
        settings = arguments(tmp_path, **options)
        BlobTrainer(model, settings, train_dataset=rows["a"], eval_dataset=rows, data_collator=collator).train()
    expected = [best_temperature(model, [e for name in names for e in parts[name]], n) for n in (10, 0)]
    assert find_posterior(model).temperatures == pytest.approx(expected, rel=1e-3)


def with_mask(data):
    return [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in data]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, "there is no eval_dataset"),
        ({"a": examples(4), "b": examples(5)}, "eval_dataset has 9 examples"),
        (Stream(examples(24)), "eval_dataset has no length"),
    ],
)
def test_the_warning_says_why(tmp_path, data, why):
    with pytest.warns(UserWarning, match=f"no temperature was fitted.* The reason: {why}; give an eval_dataset of 10"):
        make_trainer(tmp_path, classifier(**HEAD), eval_dataset=data).train()


@pytest.mark.parametrize("with_task", [True, False])
def test_examples_without_a_class_are_left_out(tmp_path, with_task):
    model, data = classifier(**HEAD), examples(24)
    some = [{**example, "label": -100} if row % 3 == 0 else example for row, example in enumerate(data)]
    trainer = trained(tmp_path, model, some, with_task)
    labelled = [example for example in some if example["label"] != -100]
    expected = [best_temperature(model, labelled, n) for n in (10, 0)]
    assert find_posterior(model).temperatures == pytest.approx(expected, rel=1e-3)
    if not with_task:  # whose loss is a mean over the batches' means over those that have one
        trainer.args.per_device_eval_batch_size = 24
        found = predict(model, labelled, 0, task=TASK).log_probabilities
        right = found[range(len(labelled)), [example["label"] for example in labelled]]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(-right.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (["a"] * 12, r"\['a', "),
        ([0.0, 1.0] * 6, "0.0"),
        (torch.zeros(12), "0.0"),
        ([True, False] * 6, "True"),
        ([None] * 12, r"\[None, "),
        (3, "3"),
    ],
)
def test_labels_of_another_type(labels, got, head_model):
    with pytest.raises(ValueError, match=f"labels: must be whole numbers, the class of each input from 0; got {got}"):
        set_temperature(head_model, examples(12), labels, task=TASK)


def test_labels_in_other_containers(head_model):
    data = examples(12)
    labels = [example["label"] for example in data]
    expected = set_temperature(head_model, data, labels, task=TASK)
    for same in (np.array(labels), torch.tensor(labels), torch.tensor(labels)[:, None], iter(labels)):
        assert set_temperature(head_model, data, same, task=TASK) == expected

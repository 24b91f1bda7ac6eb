"""Trainings that start from a LoRA."""

import json
import shutil
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from bloblora import find_posterior, models, runs
from bloblora.cli import main
from bloblora.runs.approximation import Approximation
from tests.tiny_base import QUESTIONS, queries, several, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"steps": 4, "batch_size": 4, "r": 2, "learning_rate": 0.01}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    write_jsonl(folder / "texts.jsonl", queries() * 4)
    write_jsonl(folder / "questions.jsonl", QUESTIONS)
    train(folder, base, "lora", method="lora", seed=3)
    return folder


def train(folder, base, name, data="texts", **options):
    settings = {**OPTIONS, "data": f"{folder}/{data}.jsonl", "output": f"{folder}/{name}", "model": str(base)}
    return runs.train(runs.RunConfig.of(**{**settings, **options}), progress=False)


@pytest.mark.parametrize("method", ["laplace-lora", "tfb"])
def test_a_post_hoc_method_leaves_the_lora_as_it_is(folder, base, method):
    run = train(folder, base, method, method=method, start_from=str(folder / "lora"))
    lora = runs.load_run(folder / "lora")
    expected = lora.predict(queries(), 0)
    torch.testing.assert_close(run.predict(queries(), 0).log_probs, expected.log_probs, atol=1e-5, rtol=0)
    assert run.predict(queries(), 3).log_probs.std(0).max() > 0
    labels = torch.tensor([run.task.labels.index(record["label"]) for record in queries()])
    nll = torch.nn.functional.nll_loss(expected.log_probs[0], labels).item()
    assert run.training["final"]["nll"] == pytest.approx(nll, abs=1e-5)
    assert runs.load_run(folder / method).training == run.training
    if method != "tfb":  # which turns A and B, without changing their product
        found, given = (load_file(folder / name / WEIGHTS) for name in (method, "lora"))
        assert all(torch.equal(found[key], given[key]) for key in given)


@pytest.mark.filterwarnings("ignore:.*records are")
def test_a_start_that_was_trained_on_what_is_held_out_is_said(folder, base):
    """The seed says which records are held out."""
    write_jsonl(folder / "several.jsonl", several(4))
    options = {"data": "several", "method": "lora", "validation": 0.25, "temperature_scaling": False}
    options["start_from"] = train(folder, base, "held-out-1", seed=1, **options).config.output
    with pytest.warns(UserWarning, match="with seed 1 and validation 0.25 it was trained on records that are held out"):
        train(folder, base, "held-out-0", **options)
    with warnings.catch_warnings(record=True) as said:
        train(folder, base, "held-out-1-again", seed=1, **options)
    assert not [one for one in said if "trained on records" in str(one.message)]


def test_a_post_hoc_method_on_choices(folder, base):
    """Whose examples have no input_ids, by whose length the Trainer would group them."""
    lora = train(folder, base, "lora-choices", "questions", method="lora", validation=0)
    options = {"method": "tfb", "start_from": lora.config.output, "validation": 0}
    run = train(folder, base, "tfb-choices", "questions", **options)
    assert run.config.value("train_sampling_strategy") == "group_by_length"
    expected = lora.predict(QUESTIONS, 0).log_probs
    torch.testing.assert_close(run.predict(QUESTIONS, 0).log_probs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_tfb_around_the_mean_of_a_bayesian_run(folder, base, subset):
    blob = train(folder, base, f"blob-{subset}", method="blob", init_std=0.25)
    options = {"method": "tfb", "subset_of_weights": subset, "tolerance": 0.5}
    run = train(folder, base, f"tfb-of-{subset}", start_from=blob.config.output, **options)
    torch.testing.assert_close(
        run.predict(queries(), 0).log_probs, blob.predict(queries(), 0).log_probs, atol=1e-5, rtol=0
    )
    assert run.predict(queries(), 3).log_probs.std(0).max() > 1e-4
    if subset == "last_layer":
        top = replace(run, sampler=Approximation.parse("top-blocks:1").apply(run.sampler)).predict(queries(), 3)
        torch.testing.assert_close(top.log_probs, run.predict(queries(), 3).log_probs, atol=1e-5, rtol=0)
    again = runs.load_run(run.config.output).predict(queries(), 3)
    assert torch.equal(again.log_probs, run.predict(queries(), 3).log_probs)


@pytest.mark.parametrize("method", ["lora", "blob", "map", "mc-dropout", "ivon", "swag"])
def test_others_go_on_from_it(folder, base, method):
    """Steps that are next to nothing show where the training began."""
    options = {"method": method, "start_from": str(folder / "lora")}
    still = {"steps": 2, "learning_rate": 1e-12, **({"kl_scale": 0.0} if method == "blob" else {})}
    run = train(folder, base, f"on-{method}", **options, **still)
    moved = train(folder, base, f"far-{method}", **options)
    found, far, given = (load_file(folder / name / WEIGHTS) for name in (f"on-{method}", f"far-{method}", "lora"))
    for key in given:
        torch.testing.assert_close(found[key], given[key], atol=1e-5, rtol=0)
    assert (find_posterior(run.model) is not None) == (method in ("blob", "ivon", "swag"))
    assert (far[key] - given[key]).abs().max() > 2e-5
    assert moved.training["num_examples"] == 16


def test_one_that_peft_saved(folder, base):
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=16, target_modules=["o_proj"], init_lora_weights=False)
    model = get_peft_model(fresh, lora).eval()
    model.save_pretrained(folder / "peft")
    labels = ["refund", "parcel", "invoice"]  # its order, and one that the data lack
    run = train(folder, base, "of-peft", method="tfb", start_from=str(folder / "peft"), labels=labels)
    assert all("o_proj" in name for name in find_posterior(run.model).layer_names())
    ids = models.load_tokenizer(str(base))(["where is my parcel"], return_tensors="pt")["input_ids"]
    stock = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), folder / "of-peft"
    ).eval()
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(stock(ids).logits, expected, atol=1e-4, rtol=1e-4)
    (line,) = runs.describe(run, [{"text": "where is my parcel"}], runs.PredictionOptions(samples=0))
    assert line["probabilities"] == pytest.approx(dict(zip(labels, expected[0].softmax(0).tolist(), strict=True)), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_from": "nowhere"}, "there is no such folder"),
        ({"r": 4}, "it has r 2, not 4; give the same"),
        ({"lora_alpha": 8}, "it has lora_alpha 16, not 8"),
        ({"target_modules": ["q_proj"]}, "target_modules: start_from says which layers are adapted"),
        ({"method": "full"}, "start_from isn't for method 'full'"),
        ({"method": "ensemble"}, "start_from isn't for method 'ensemble'"),
        ({"data": "questions"}, "start_from .* its task is classification, and the data's choice_text"),
    ],
)
def test_what_does_not_fit_is_said_before_the_model_is_loaded(folder, base, monkeypatch, options, message):
    monkeypatch.setattr(sys.modules["bloblora.runs.train"], "base_model", None)
    with pytest.raises(runs.RunError, match=message):
        train(folder, base, "wrong", **{"start_from": str(folder / "lora"), **options})
    assert not (folder / "wrong").exists()


def test_weights_of_another_model(folder, base):
    shutil.copytree(folder / "lora", folder / "altered", dirs_exist_ok=True)
    config = json.loads((folder / "altered" / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "v_proj", "o_proj"]
    (folder / "altered" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(runs.RunError, match=r"doesn't fit the model: .*o_proj.* in one of them only"):
        train(folder, base, "wrong", start_from=str(folder / "altered"))


def test_the_command(folder, base, capsys):
    data = ["--data", f"{folder}/texts.jsonl", "--model", str(base), "--r", "2"]
    start = ["--start-from", f"{folder}/lora", "--output", f"{folder}/command"]
    main(["train", *data, *start, "--method", "tfb"])
    assert "trained tfb" in capsys.readouterr().out

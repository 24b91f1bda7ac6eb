"""An answer that is not a number is an error that says where it comes from, and is never written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bloblora
from bloblora import runs
from bloblora.prediction import Tempered, WeightDraws
from bloblora.serving import Settings, load_hosted, open_hosted
from tests.tiny_base import give_base, held_out, queries, write_jsonl

LAYER = "model.layers.0.mlp.down_proj.weight"
FOUND = (
    rf"the model's answer is not a number: weight (base_model.)?.*{LAYER} isn't finite. The base model or the adapter"
)
TEXTS = [record["text"] for record in queries()]


def damage(folder, name):
    """Make one entry of a weight NaN."""
    (file,) = folder.glob("*model.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def nan_run(files, run, tmp_path_factory):
    """A run whose base model has a NaN."""
    folder = tmp_path_factory.mktemp("nan")
    shutil.copytree(files.base, folder / "base")
    shutil.copytree(run, folder / "run")
    damage(folder / "base", LAYER)
    give_base(folder / "run", folder / "base")
    return folder / "run"


def test_commands_write_nothing(call, files, nan_run, tmp_path):
    many = str(write_jsonl(tmp_path / "many.jsonl", held_out()))
    before = {file: file.read_bytes() for file in nan_run.iterdir() if file.is_file()}
    for command in (
        ("predict", nan_run, "--input", files.texts),
        ("predict", nan_run, "--input", files.texts, "--output", tmp_path / "lines.jsonl"),
        ("evaluate", nan_run, "--data", many, "--output", tmp_path / "metrics.json"),
        ("evaluate", nan_run, "--data", many, "--predictions", tmp_path / "kept.jsonl"),
        ("calibrate", nan_run, "--data", many, "--risk", "0.5"),
    ):
        status, out, err = call(*command)
        assert (status, out) == (2, ""), command
        assert "answer is not a number: weight base_model" in err
    status, _, err = call("export", nan_run, "--format", "merged", "--output", tmp_path / "merged")
    assert (status, (tmp_path / "merged").exists()) == (2, False)
    assert f"{LAYER} has 1 of 2048 entries that are NaN or infinite, so nothing was written" in err
    assert {file: file.read_bytes() for file in nan_run.iterdir() if file.is_file()} == before
    assert not any((tmp_path / name).exists() for name in ("lines.jsonl", "metrics.json"))
    assert "NaN" not in "".join(file.read_text() for file in tmp_path.glob("kept.jsonl"))


WRITING = ("--samples", "2", "--max-new-tokens", "2")
OTHERS = {
    "tags": [{"tokens": ["the", "card"], "tags": ["O", "B-card"]}, {"tokens": ["where"], "tags": ["O"]}],
    "texts": [{"prompt": "where", "response": text} for text in TEXTS],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_answers(call, files, nan_run, tmp_path, kind):
    """Texts have tokens that are not there, which NaN must not be taken for; and some are given, not answered."""
    data, run, lines = write_jsonl(tmp_path / "data.jsonl", OTHERS[kind]), tmp_path / "run", tmp_path / "lines.jsonl"
    options = ("--model", files.base, "--steps", "1", "--batch-size", "2", "--r", "2", "--validation", "0")
    assert call("train", "--data", data, "--output", run, *options)[0] == 0
    give_base(run, nan_run.parent / "base")
    judged = [{"prompt": "the card", "response": "a", "right": right} for right in (True, False)] * 20
    judged = write_jsonl(tmp_path / "judged.jsonl", judged)
    predict = ("predict", run, "--input", data)
    commands = [predict, (*predict, "--output", lines), ("evaluate", run, "--data", data)]
    if kind == "texts":
        score = ("score", run, "--input", data)
        commands = [score, (*score, "--samples", "0", "--output", lines), ("generate", run, "--input", data, *WRITING)]
        commands += [("correctness", run, "--data", judged)]
    for command in commands:
        status, out, err = call(*command)
        assert (status, out) == (2, ""), command
        assert "answer is not a number: weight " in err, command
    assert not lines.exists() or not lines.read_text()


def test_python(nan_run):
    run, settings = runs.load_run(nan_run), Settings()
    hosted = load_hosted(open_hosted([str(nan_run)], settings), settings)["run"]
    for answer in (
        lambda: run.predict(TEXTS, 0),
        lambda: run.predict(TEXTS, 3),
        lambda: bloblora.pipeline(run)(TEXTS),
        lambda: hosted.answer([({"text": TEXTS[0]}, hosted.encode({"text": TEXTS[0]}))], 2, settings),
        lambda: bloblora.predict(run.model, TEXTS, tokenizer=run.tokenizer),
    ):
        with pytest.raises(FloatingPointError, match=FOUND):
            answer()


@pytest.mark.parametrize("num_samples", [0, 2])
def test_text(choice_run, num_samples):
    run = runs.load_run(choice_run)
    inputs = run.tokenizer("Which gas", return_tensors="pt")
    ask = {"num_samples": num_samples, "tokenizer": run.tokenizer, "max_new_tokens": 2}
    bloblora.posterior_generate(run.model, inputs, **ask)
    run.model.get_submodule(f"base_model.model.{LAYER}".removesuffix(".weight")).weight.data.view(-1)[0] = torch.nan
    with pytest.raises(FloatingPointError, match=FOUND):
        bloblora.posterior_generate(run.model, inputs, **ask)


def test_a_temperature(run):
    loaded = runs.load_run(run)
    for wrong in (0.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            Tempered(loaded.sampler, wrong, 1.0)
    loaded.sampler = Tempered(loaded.sampler, 1e-320, 1e-320)
    with pytest.raises(FloatingPointError, match=r"all weights that are known are finite.*such as a temperature"):
        loaded.predict(TEXTS, 2)


def test_a_posterior(run):
    """NaN in Ω of one entry alone, which no mean sees."""
    loaded = runs.load_run(run)
    posterior = bloblora.find_posterior(loaded.model)
    with torch.no_grad():
        next(iter(posterior.named_std_parameters().values())).view(-1)[0] = torch.nan
    assert loaded.predict(TEXTS, 0).probabilities.isfinite().all()
    with pytest.raises(FloatingPointError, match=r"not a number: weight .*blob_std_parameter_.* isn't finite"):
        bloblora.predict(loaded.model, TEXTS, 2, tokenizer=loaded.tokenizer, sampler=WeightDraws(posterior))


def test_activations_that_overflow(run):
    loaded = runs.load_run(run)
    for name, weight in loaded.model.named_parameters():
        if "up_proj" in name or "gate_proj" in name:
            weight.data *= 2000
    assert loaded.predict(TEXTS, 0).probabilities.isfinite().all()
    loaded.model.half()
    with pytest.raises(FloatingPointError, match=r"activations overflow in torch.float16; use dtype float32"):
        loaded.predict(TEXTS, 0)


@pytest.mark.parametrize("method", ["tfb", "laplace-lora"])
def test_what_is_fitted_afterwards(call, files, run, tmp_path, method):
    """On a LoRA with a NaN no noise is chosen."""
    start, output = tmp_path / "start", tmp_path / "new"
    start.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"{run}/{name}", start / name)
    damage(start, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    command = ("train", "--data", files.texts, "--model", files.base, "--output", output, "--method", method)
    status, out, err = call(*command, "--start-from", start, "--r", "2", "--validation", "0")
    assert (status, out) == (2, "")
    assert "answer is not a number: weight base_model.model.model.layers.0.self_attn.q_proj.lora_A" in err
    assert not (output / "adapter_model.safetensors").exists()


def test_predictions_in_a_file(call, tmp_path):
    """JSON that Python writes may hold NaN."""
    line = {"probabilities": [0.5, 0.5], "log_probabilities": [float("nan"), -0.7], "target": 0}
    file = tmp_path / "other.jsonl"
    file.write_text(f"{json.dumps(line)}\n" * 100)
    status, out, err = call("calibrate", "--predictions", file, "--risk", "0.9", "--output", tmp_path / "decision.json")
    assert (status, out) == (2, "")
    assert "not a number" in err
    assert not (tmp_path / "decision.json").exists()

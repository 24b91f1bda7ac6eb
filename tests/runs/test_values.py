"""A run that predicts numbers, from a table to intervals with a promise, and what it doesn't offer."""

import json
import math
import random
import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from bloblora import pipeline, runs
from bloblora.cli import main
from bloblora.export import export
from bloblora.runs.decide import calibrate, open_decision
from bloblora.runs.selection import select_for
from bloblora.serving import load_hosted, open_hosted
from bloblora.tasks import encode_all
from tests.runs.conftest import train
from tests.serving.conftest import SETTINGS, serving
from tests.tiny_base import write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["card", "refund", "the", "payment", "air", "parcel", "gas", "twice"]
OPTIONS = runs.PredictionOptions(samples=3)


def records(count, seed=0):
    """The value is ten times the number of words, and noise."""
    generator = random.Random(seed)
    for _ in range(count):
        words = generator.choices(WORDS, k=generator.randint(1, 8))
        yield {"text": " ".join(words), "value": 10 * len(words) + generator.gauss(0, 2)}


def test_it_learns_is_loaded_again_and_is_measured(trained):
    assert trained.task.name == "regression"
    assert {"nll", "rmse", "interval_coverage"} == {*trained.training["held_out"]["by_num_samples"]["10"]}
    rescaling = trained.training["rescaling"]
    assert rescaling["nll"] <= rescaling["nll_before"]
    test = [*records(60, seed=1)]
    loaded = runs.load_run(trained.config.output)
    here, there = (run.predict(test, 3, seed=2) for run in (trained, loaded))
    assert torch.equal(here.logits, there.logits)
    assert (here.epistemic_std > 0).all()
    found = runs.evaluate(loaded, test, options=OPTIONS)
    values = torch.tensor([record["value"] for record in test])
    assert found["rmse"] < 0.8 * values.std().item()
    assert 0.7 < found["interval_coverage"] <= 1


def test_kept_predictions_give_the_same_metrics(trained, tmp_path):
    test, outside = [*records(20, seed=1)], ["an entirely other thing", "what?"]
    file = tmp_path / "kept.jsonl"
    kept = runs.evaluate(trained, test, outside, OPTIONS, predictions=file)
    assert kept == pytest.approx(runs.evaluate(trained, test, outside, OPTIONS), rel=1e-5)
    assert "auroc_epistemic_std" in kept
    lines = file.read_text().splitlines()
    assert json.loads(lines[0])["target"] == test[0]["value"]
    file.write_text("".join(f"{line}\n" for line in lines[:5]))  # as a stop leaves it
    assert runs.evaluate(trained, test, outside, OPTIONS, predictions=file) == kept
    assert file.read_text().splitlines() == lines


def test_intervals_by_predictions_in_a_file_are_those_of_the_run(trained, tmp_path, capsys):
    folder = shutil.copytree(trained.config.output, tmp_path / "run")
    data, table = str(write_jsonl(tmp_path / "test.jsonl", [*records(40, seed=3)])), str(tmp_path / "predictions.csv")
    options, beside = ["--coverage", "0.8", "--samples", "3"], ["--predictions", table, "--data", data]
    main(["predict", str(folder), "--input", data, "--samples", "3", "--output", table])
    found = []
    for given in (["--data", data], beside):
        main(["calibrate", str(folder), *given, *options, "--score", "epistemic_std"])
        found.append(json.loads((folder / "decision.json").read_text())["decisions"][0]["decision"])
    assert found[1]["intervals"] == pytest.approx(found[0]["intervals"], rel=1e-5)
    assert found[1]["scope"]["threshold"] == pytest.approx(found[0]["scope"]["threshold"], rel=1e-5)
    main(["calibrate", *beside, *options, "--output", str(tmp_path / "rules.json")])  # of any model
    assert "intervals: at least 0.8 of the intervals hold the right value" in capsys.readouterr().out


def test_promised_intervals_are_used_and_served(trained, tmp_path_factory):
    folder, held_out, test = trained.config.output, [*records(60, seed=3)], [*records(60, seed=4)]
    far = [record | {"text": f"{record['text']} what what"} for record in records(20, seed=5)]
    rules = {"coverage": 0.8, "false_alarm": 0.1, "score": "epistemic_std"}
    entry = calibrate(runs.open_run(folder), held_out, far, SETTINGS, **rules)
    assert entry["realized"]["false_alarm"] == 5 / 60  # above the ⌈61 · 0.9⌉ = 55th
    assert 0 <= entry["realized"]["detection"] <= 1
    assert entry["realized"]["promised_coverage"] == 49 / 60  # ⌈61 · 0.8⌉
    decision = open_decision(runs.open_run(folder), SETTINGS)
    (line,) = runs.describe(trained, test[:1], SETTINGS, decision)
    assert line["out_of_scope"] == (line["epistemic_std"] > entry["decision"]["scope"]["threshold"])
    low, high = line["promised_interval"]
    threshold = entry["decision"]["intervals"]["threshold"]
    assert (low + high) / 2 == pytest.approx(line["value"])
    assert (high - low) / 2 == pytest.approx(threshold * line["std"])
    assert line["std"] ** 2 == pytest.approx(line["aleatoric_std"] ** 2 + line["epistemic_std"] ** 2)
    hosted = load_hosted(open_hosted([f"values={folder}"], SETTINGS), SETTINGS)
    with serving(hosted) as client:
        (served,) = client.post("/v1/predict", json={"inputs": test[0]["text"]}).json()["answers"]
        (model,) = client.get("/v1/models").json()["models"]
        assert client.get("/openapi.json").status_code == 200
    for name in ("value", "std", "aleatoric_std", "epistemic_std", "interval", "promised_interval", "out_of_scope"):
        assert served[name] == pytest.approx(line[name], rel=1e-4)
    assert served["num_draws"] == SETTINGS.samples
    assert model["labels"] is None
    assert model["purpose"].startswith("Predicts a number for a text")
    assert pipeline(trained, num_samples=3)(test[0]["text"])[0]["value"] == pytest.approx(line["value"], rel=1e-4)


def test_a_table_of_ratings_from_the_command_line(base, tmp_path, capsys):
    rows = "".join(f"{record['text']},{record['value']:.2f}\n" for record in records(60))
    (tmp_path / "ratings.csv").write_text(f"review,stars\n{rows}")
    columns = ["--text-column", "review", "--label-column", "stars"]
    train = ["--steps", "4", "--batch-size", "8", "--output", str(tmp_path / "run"), "--model", str(base), "--r", "2"]
    data = ["--data", str(tmp_path / "ratings.csv")]
    main(["train", *data, *columns, *train])
    said = capsys.readouterr().err
    assert "all labels are numbers, some with fractions: a number is predicted" in said
    main(["train", *data, *columns, *train, "--output", str(tmp_path / "asked"), "--task", "regression"])
    assert "all labels are" not in capsys.readouterr().err
    main(["evaluate", str(tmp_path / "run"), *data, "--samples", "2"])
    assert "RMSE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tfb"}, "method 'tfb' has no form for task 'regression'; train that with lora, map"),
        ({"method": "laplace-lora"}, "method 'laplace-lora' has no form for task 'regression'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_what_is_of_classes_is_refused_before_training(base, tmp_path, options, message):
    with pytest.raises(runs.RunError, match=message):
        train(base, tmp_path, [*records(20)], **options)


def test_what_is_of_classes_is_refused_of_a_run(trained, tmp_path, capsys):
    folder, test = trained.config.output, [*records(4, seed=1)]
    for name in ("stop", "linearized"):
        with pytest.raises(runs.RunError, match=f"approximate '{name}' is for classes and choices"):
            runs.load_run(folder, name)
    with pytest.raises(runs.RunError, match="top_k: the run's task is regression"):
        pipeline(trained)(test, top_k=1)
    mirrored = runs.load_run(folder, "mirrored").predict(test, 4)
    assert mirrored.logits.shape == (4, 4, 2)
    file = str(write_jsonl(tmp_path / "test.jsonl", test))
    for command, message in (
        (["generate", folder, "--input", file], "the run's task is regression, which writes no text"),
        (["evaluate", folder, "--data", file, "--diagram", str(tmp_path / "a.png")], "diagram: accuracy against conf"),
        (
            ["calibrate", folder, "--data", file, "--risk", "0.1"],
            "risk, confidence and label_sets are for classes that",
        ),
        (["calibrate", folder, "--data", file, "--label-sets", "aps"], "risk, confidence and label_sets are for"),
        (["calibrate", folder, "--data", file, "--score", "mutual_information"], "it is one of std, epistemic_std"),
    ):
        with pytest.raises(SystemExit):
            main(command)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("format", ["lora", "merged"])
def test_an_exported_head_says_how_to_read_it(trained, tmp_path, format):
    """By the note alone: the mean and the spread of `predict`, but for the temperature."""
    drawn = {"draw": 0} if format == "merged" else {}
    manifest = export(trained.config.output, tmp_path / "out", format, 1, seed=5, **drawn)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.problem_type, config.id2label) == ("regression", {0: "mean", 1: "noise"})
    source = tmp_path / "out" if format == "merged" else manifest.base_model
    model = AutoModelForSequenceClassification.from_pretrained(source, config=config)
    if format == "lora":
        model = PeftModel.from_pretrained(model, tmp_path / "out" / "draw_00")
    test = [*records(4, seed=1)]
    batch = trained.task.collate(encode_all(trained.task, test, trained.tokenizer))
    batch.pop("labels")
    with torch.no_grad():
        m, a = model.eval()(**batch).logits.double().unbind(-1)
    note = next(warning for warning in manifest.warnings if "outputs are m and a" in warning)
    center, scale = map(float, re.search(r"value is (\S+) \+ (\S+)·m", note).groups())
    expected = trained.predict(test, 1, seed=5)
    torch.testing.assert_close(center + scale * m, expected.mean, rtol=1e-4, atol=1e-4)
    variance = scale**2 / (torch.log(1 + (math.e - 1) * a.exp()) + 1e-4) * manifest.temperature
    torch.testing.assert_close(variance.sqrt(), expected.std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ensemble", "swag", "mc-dropout", "distilled"])
def test_other_methods_predict_values_too(base, tmp_path, method):
    run = train(base, tmp_path, [*records(24)], method=method)
    found = runs.load_run(run.config.output).predict([*records(3, seed=1)], 3)
    assert torch.equal(found.logits, run.predict([*records(3, seed=1)], 3).logits)


def test_records_that_are_not_used_are_those_that_training_leaves():
    """A field that happens to be called as that of another task's answers doesn't group them."""
    data = [{"text": f"card {i}", "value": float(i), "label": f"{i % 5}"} for i in range(20)]
    config = runs.RunConfig.of(data="stars.jsonl", output="run", task="regression", limit=3)
    used, left = select_for(config, data), runs.unused(config, data)
    assert len(used) == 3
    assert left == [record for record in data if record not in used]

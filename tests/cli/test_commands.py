"""What the commands print and write."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

import bloblora
from bloblora.cli import main
from tests.cli.conftest import SETTINGS
from tests.tiny_base import QUESTIONS, queries, save_default

COMMANDS = ("train", "evaluate", "predict", "demo", "info")
SCORES = ("confidence", "predictive_entropy", "mutual_information")


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(call, command):
    status, text, _ = call(command, "--help")
    assert status == 0
    assert f"bloblora {command}" in text.partition("options:")[0]
    assert "Example" in text
    assert "``" not in text
    assert not re.search(r"--[a-z]+_", text)
    options = re.split(r"\n  (?=-)", text.partition("options:\n")[2])
    assert len(options) > 2
    for option in options:
        # what an option does stands beside it or below, before the parser's own (type: …)
        help_text = re.sub(r"^\s*-.*?(\s{2,}|\n)", "", option, count=1, flags=re.DOTALL)
        assert re.search(r"[A-Za-z]{2}", help_text.partition("(type")[0].partition("(required")[0]), option


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("train", ['{"text": ', '{"question": ', "run.json", "config.yaml", "continues", "--preset paper"]),
        ("evaluate", ["JSON", "ECE", "AUROC", "reliability diagram"]),
        ("predict", ["standard input", *SCORES]),
        ("demo", ["metrics.json", "reliability.png", "minutes"]),
    ],
)
def test_help_says_what_is_read_and_written(call, command, parts):
    text = call(command, "--help")[1]
    assert [part for part in parts if part not in text] == []


def test_the_first_help_shows_the_way(call):
    text = call("--help")[1]
    assert [command for command in COMMANDS if not re.search(rf"\n  {command} +\w", text)] == []
    assert call("--version")[1].split() == ["bloblora", bloblora.__version__]


def test_a_width_that_was_not_trained_against_a_prior_has_no_kl(call, files, run, tmp_path):
    arguments = ("train", "--data", files.texts, "--model", files.base, "--output", tmp_path, *SETTINGS)
    _, out, _ = call(*arguments, "--method", "tfb")
    assert "posterior: median Ω 0." in out
    assert "KL" not in out
    found, of_blob = (json.loads(call("info", folder, "--json")[1])["posterior"] for folder in (tmp_path, run))
    assert {*of_blob} - {*found} == {"kl", "head_kl", "share_at_prior"}


def test_train_in_json_and_again_from_its_config(call, files, tmp_path):
    first, second = tmp_path / "päth", tmp_path / "second"
    arguments = ("train", "--data", files.texts, "--model", files.base, "--seed", "3", *SETTINGS, "--json")
    status, out, err = call(*arguments, "--output", first)
    result = json.loads(out)
    assert (status, result["output"], result["num_examples"]) == (0, str(first), 4)
    assert result["posterior"]["median_std"] > 0
    assert "2/2" in err  # the bar of the training
    config = yaml.safe_load((first / "config.yaml").read_text(encoding="utf-8"))
    assert (config["seed"], config["training"]["max_steps"], config["output"]) == (3, 2, str(first))
    assert call("train", "--config", first / "config.yaml", "--output", second, "--json")[0] == 0
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_options_win_over_a_preset_and_a_config(call, tmp_path):
    (tmp_path / "mine.yaml").write_text("data: a\noutput: b\nlora: {r: 3}\nsteps: 7\n")
    status, out, _ = call("train", "--config", tmp_path / "mine.yaml", "--steps", "9", "--print-config")
    config = yaml.safe_load(out)
    assert (status, config["lora"], config["training"]) == (0, {"r": 3}, {"max_steps": 9})
    config = yaml.safe_load(
        call("train", "--data", "a", "--output", "b", "--preset", "paper", "--r", "5", "--print-config")[1]
    )
    # learning rate and batch size of the paper, section 4
    assert (config["lora"]["r"], config["training"]["learning_rate"]) == (5, 1e-4)
    assert config["training"]["per_device_train_batch_size"] == 4
    (tmp_path / "mine.yaml").write_text("data: a\noutput: b\nranks: 3\n")
    status, _, err = call("train", "--config", tmp_path / "mine.yaml")
    assert status == 2
    assert "ranks" in err


def test_train_for_people(call, files, tmp_path):
    arguments = ("train", "--data", files.texts, "--model", files.base, "--method", "lora", *SETTINGS)
    status, out, _ = call(*arguments, "--output", tmp_path / "run")
    assert status == 0
    assert f"saved to {tmp_path / 'run'}; next: bloblora evaluate {tmp_path / 'run'}" in out
    assert "{'" not in out  # the Trainer's logs


@pytest.mark.filterwarnings("ignore:temperature_folds:UserWarning")
def test_train_says_what_was_fitted(call, files, tmp_path):
    options = ("--method", "blob", "--temperature-folds", "2", *SETTINGS)
    status, out, _ = call("train", "--data", files.texts, "--model", files.base, *options, "--output", tmp_path / "run")
    assert status == 0
    assert re.search(
        r"temperature \S+ \(of the mean alone \S+\), scale of the width \S+: NLL \S+ to \S+ on 4 records",
        out,
    )


def test_evaluate_agrees_with_scikit_learn_on_what_predict_says(call, run, files, tmp_path):
    metrics, diagram = tmp_path / "new" / "metrics.json", tmp_path / "new" / "diagram.png"
    arguments = ("--ood", files.outside, "--samples", "4", "--output", metrics, "--diagram", diagram)
    status, out, _ = call("evaluate", run, "--data", files.texts, *arguments)
    assert status == 0
    assert "ECE" in out
    result = json.loads(metrics.read_text())
    assert result.keys() >= {"accuracy", "ece", "nll", "brier", "num_examples", "num_samples"}
    assert (result["num_examples"], result["num_samples"]) == (4, 4)
    assert diagram.read_bytes()[:4] == b"\x89PNG"

    inside, outside = (
        lines(call("predict", run, "--input", f, "--samples", "4")[1]) for f in (files.texts, files.outside)
    )
    labels = [record["label"] for record in queries()]
    assert result["accuracy"] == accuracy_score(labels, [line["label"] for line in inside])
    probabilities = [[line["probabilities"][name] for name in ("parcel", "refund")] for line in inside]
    assert result["nll"] == pytest.approx(log_loss(labels, probabilities), abs=1e-6)
    for name in SCORES:
        sign = -1 if name == "confidence" else 1
        scores = [sign * line[name] for line in [*inside, *outside]]
        expected = roc_auc_score([0] * len(inside) + [1] * len(outside), scores)
        assert result[f"auroc_{name}"] == pytest.approx(expected)


def test_evaluate_in_json(call, choice_run, files):
    status, out, _ = call("evaluate", choice_run, "--data", files.questions, "--samples", "0", "--json")
    assert status == 0
    assert json.loads(out)["num_samples"] == 0


def test_predict_keeps_the_order_and_sums_to_one(call, run, files, tmp_path):
    output = tmp_path / "answers.jsonl"
    status, out, _ = call(
        "predict", run, "--input", files.texts, "--samples", "3", "--batch-size", "3", "--output", output
    )
    assert (status, out) == (0, "")
    answers = lines(output.read_text(encoding="utf-8"))
    assert [line["text"] for line in answers] == [record["text"] for record in queries()]
    for line in answers:
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert line["probabilities"][line["label"]] == max(line["probabilities"].values()) == line["confidence"]
        assert 0 <= line["mutual_information"] <= line["predictive_entropy"] <= 0.6932  # ln 2
        total = line["mutual_information"] + line["expected_entropy"]
        assert total == pytest.approx(line["predictive_entropy"], abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_predict_choices(call, choice_run, files):
    answers = lines(call("predict", choice_run, "--input", files.questions)[1])
    assert [list(line["probabilities"]) for line in answers] == [record["choices"] for record in QUESTIONS]


def standard_input(monkeypatch, records):
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_stream_is_answered_in_parts_that_agree_with_the_whole(call, run, files, monkeypatch):
    """More lines than are read at a time, the same few over and over."""
    whole = lines(call("predict", run, "--input", files.texts, "--samples", "2")[1])
    standard_input(monkeypatch, queries() * 70)
    status, out, _ = call("predict", run, "--input", "-", "--samples", "2")
    assert status == 0
    answers = lines(out)
    assert len(answers) == 280
    for i, line in enumerate(answers):
        assert line["text"] == whole[i % 4]["text"]
        assert line["probabilities"] == pytest.approx(whole[i % 4]["probabilities"], abs=1e-5)


def test_a_stream_that_breaks_off_leaves_no_output(call, run, monkeypatch, tmp_path):
    standard_input(monkeypatch, [*queries() * 70, {"text": 5}])
    (tmp_path / "answers.jsonl").write_text("earlier\n")
    status, _, err = call("predict", run, "--input", "-", "--output", tmp_path / "answers.jsonl")
    assert status == 2
    assert "standard input:281: field 'text': 5" in err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"answers.jsonl": "earlier\n"}


def test_info(call, run, files):
    machine = json.loads(call("info", "--json")[1])
    assert machine["python"] == sys.version.split()[0]
    assert machine.keys() >= {"bloblora", "torch", "transformers", "peft", "cpus"}
    status, out, _ = call("info", run, "--json")
    result = json.loads(out)
    assert (status, result["config"]["method"]["name"], result["config"]["model"]) == (0, "blob", files.base)
    assert result["task"]["labels"] == ["parcel", "refund"]
    assert result["posterior"]["prior_std"] > 0
    assert result["training"]["num_examples"] == 4


def process(*arguments, **options):
    command = [sys.executable, "-m", "bloblora", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # A shell starts background jobs, such as a test run, with SIGINT ignored, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, env=environment, preexec_fn=heed, **options)


def test_a_reader_that_has_gone(run, files):
    read, write = os.pipe()
    os.close(read)
    with process("predict", run, "--input", files.texts, "--samples", "0", stdout=write) as predicting:
        os.close(write)
        err = predicting.communicate()[1]
    assert predicting.returncode == 2
    assert err.splitlines()[-1] == "bloblora predict: error: standard output was closed before everything was written"


def test_ctrl_c_says_how_to_go_on(files, tmp_path):
    arguments = ("--data", files.texts, "--model", files.base, "--output", tmp_path / "run", "--save-steps", "2")
    with process("train", *arguments, "--steps", "100000", stdout=subprocess.PIPE) as training:
        deadline = time.monotonic() + 300
        while not list(Path(tmp_path / "run").glob("checkpoints/checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.2)
        training.send_signal(signal.SIGINT)
        out, err = training.communicate(timeout=60)
    assert training.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "stopped; run the same command again to continue from the last checkpoint"
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "score"])
def test_ctrl_c_says_that_predictions_were_kept(command, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bloblora.cli._run", stopped)
    with pytest.raises(SystemExit, match="130"):
        main([command, "run"])
    said = "\nstopped; run the same command again to continue from the predictions that were kept\n"
    assert capsys.readouterr().err == said


def test_the_demo_and_its_second_call(call, tmp_path, monkeypatch):
    save_default(tmp_path / "cache")
    monkeypatch.setenv("BLOBLORA_CACHE", str(tmp_path / "cache"))
    arguments = ("demo", "--steps", "2", "--limit", "8", "--samples", "2", "--output", tmp_path / "demo")
    status, out, err = call(*arguments)
    assert status == 0, err
    assert all(name in out for name in ("LoRA", "BLoB, N = 0", "BLoB, N = 2", "where is my parcel"))
    assert "Next, on the same run:" in out
    metrics = (tmp_path / "demo" / "metrics.json").read_bytes()
    rows = json.loads(metrics)
    assert {name: row["num_samples"] for name, row in rows.items()} == {"LoRA": 0, "BLoB, N = 0": 0, "BLoB, N = 2": 2}
    assert all(row["num_examples"] == 8 for row in rows.values())
    assert (tmp_path / "demo" / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    trained = (tmp_path / "demo" / "blob" / "run.json").stat().st_mtime_ns
    assert call(*arguments)[0] == 0
    assert (tmp_path / "demo" / "blob" / "run.json").stat().st_mtime_ns == trained
    assert (tmp_path / "demo" / "metrics.json").read_bytes() == metrics

"""A method of another package, installed as a user installs it: it works from every command, and needs no edit here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file

from tests.tiny_base import queries, save_base, write_jsonl

PACKAGE = Path(__file__).parents[1] / "plugin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(folder / "site"), str(PACKAGE)], check=True)
    save_base(folder / "base")
    write_jsonl(folder / "texts.jsonl", queries() * 2)
    train = {"steps": 2, "batch_size": 2, "r": 2}
    sets = {"train": {"data": "texts.jsonl"}, "test": "texts.jsonl", "validation": "texts.jsonl"}
    methods = {"very noisy": {"method": "noisy", "noise_size": 0.5}}
    study = {"models": [f"{folder}/base"], "seeds": [0], "samples": [0, 2], "train": train}
    study["datasets"] = {"desk": sets}
    study |= {"methods": methods, "baseline": "very noisy"}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder


_PROGRAM = """
import contextlib, io, json, sys
from bloblora.cli import main
for arguments in json.loads(sys.argv[1]):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exit_:
            status = exit_.code or 0
    print(json.dumps({"status": status, "out": out.getvalue(), "err": err.getvalue()}))
"""


SETTINGS = ("--model", "base", "--steps", "2", "--batch-size", "2", "--r", "2")
WRONG = ("train", "--data", "texts.jsonl", "--output", "wrong", *SETTINGS)
COMMANDS = {
    "told": ("train", "--method", "noisy", "--help"),
    "negative": (*WRONG, "--method", "noisy", "--noise-size", "-1"),
    "text": (*WRONG, "--method", "noisy", "--noise-size", "much"),
    "broken": (*WRONG, "--method", "broken"),
    "trained": (
        *("train", "--data", "texts.jsonl", *SETTINGS),
        *("--method", "noisy", "--noise-size", "0.3", "--output", "run"),
    ),
    "exported": ("export", "run", "--output", "exported", "--samples", "2"),
    "answered": ("predict", "run", "--input", "texts.jsonl", "--samples", "3"),
    "compared": ("compare", "study.yaml", "--output", "results"),
    "reported": ("report", "results"),
    "tuned": (
        *("tune", "study.yaml", "--dataset", "desk", "--method", "very noisy"),
        *("--output", "search", "--trials", "1"),
    ),
}


@pytest.fixture(scope="module")
def done(folder):
    """The commands one after the other in a process that finds the package; status and what each of them said."""
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", _PROGRAM, json.dumps([*COMMANDS.values()])]
    found = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    lines = map(json.loads, found.stdout.splitlines())
    return SimpleNamespace(**{name: SimpleNamespace(**line) for name, line in zip(COMMANDS, lines, strict=True)})


def test_help_and_errors_name_its_option(done):
    told, negative, text, broken = done.told, done.negative, done.text, done.broken
    assert "--noise-size" in told.out
    assert "Relative size of the noise" in told.out
    assert "--prior-std" not in told.out
    assert "'broken' of package bloblora-noisy" in told.err
    assert "is skipped: ModuleNotFoundError" in told.err
    assert (negative.status, "noise_size must be above 0, got -1.0" in negative.err) == (2, True)
    assert "--noise-size: expected float. Got value: much" in text.err
    assert "method 'broken' is not one of lora, " in broken.err


def test_it_is_trained_exported_and_predicts(done, folder):
    trained, exported, answered = done.trained, done.exported, done.answered
    assert "trained noisy" in trained.out, trained.err
    stored = json.loads((folder / "run" / "run.json").read_text())
    assert stored["config"]["method"] == {"name": "noisy", "noise_size": 0.3}
    assert stored["options"] == {"noise_size": 0.3}
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["method"] == stored["config"]["method"]
    assert exported.status == 0, exported.err
    draws = [load_file(folder / "exported" / name / "adapter_model.safetensors") for name in ("mean", "draw_00")]
    changed = [name for name in draws[0] if not draws[0][name].equal(draws[1][name])]
    assert changed
    assert all("lora_A" in name for name in changed)
    lines = answered.out.splitlines()
    assert len(lines) == 8
    assert all(json.loads(line)["mutual_information"] > 0 for line in lines)


def test_it_is_compared_and_tuned(done, folder):
    compared, reported, tuned = done.compared, done.reported, done.tuned
    assert "1 runs done, 0 failed" in compared.out, compared.err
    assert reported.status == 0
    assert "very noisy" in (folder / "results" / "report.md").read_text()
    assert tuned.status == 0, tuned.err
    found = yaml.safe_load(tuned.out)
    assert found.keys() == {"noise_size", "learning_rate"}
    assert 0.03 <= found["noise_size"] <= 0.3

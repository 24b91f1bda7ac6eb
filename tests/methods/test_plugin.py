"""A method of another package, installed as a user installs it: it works from every command, and needs no edit here."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture
def call(folder):
    def call(*arguments):
        environment = os.environ | {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bloblora", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return call


SETTINGS = ("--model", "base", "--steps", "2", "--batch-size", "2", "--r", "2")


def test_help_shows_its_option_and_no_others(call):
    done = call("train", "--method", "noisy", "--help")
    assert "--noise-size" in done.stdout
    assert "Relative size of the noise" in done.stdout
    assert "--prior-std" not in done.stdout
    assert "'broken' of package bloblora-noisy" in done.stderr
    assert "is skipped: ModuleNotFoundError" in done.stderr


def test_it_is_trained_exported_and_predicts(call, folder):
    given = ("--method", "noisy", "--noise-size", "0.3", "--output", "run")
    done = call("train", "--data", "texts.jsonl", *SETTINGS, *given)
    assert "trained noisy" in done.stdout, done.stderr
    stored = json.loads((folder / "run" / "run.json").read_text())
    assert stored["config"]["method"] == {"name": "noisy", "noise_size": 0.3}
    assert stored["options"] == {"noise_size": 0.3}
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["method"] == stored["config"]["method"]
    done = call("export", "run", "--output", "exported", "--samples", "2")
    assert done.returncode == 0, done.stderr
    draws = [load_file(folder / "exported" / name / "adapter_model.safetensors") for name in ("mean", "draw_00")]
    changed = [name for name in draws[0] if not draws[0][name].equal(draws[1][name])]
    assert changed
    assert all("lora_A" in name for name in changed)
    answers = call("predict", "run", "--input", "texts.jsonl", "--samples", "3")
    assert all(json.loads(line)["mutual_information"] > 0 for line in answers.stdout.splitlines())


def test_bad_options_are_named(call):
    train = ("train", "--data", "texts.jsonl", "--output", "wrong", *SETTINGS)
    done = call(*train, "--method", "noisy", "--noise-size", "-1")
    assert (done.returncode, "noise_size must be above 0, got -1.0" in done.stderr) == (2, True)
    done = call(*train, "--method", "noisy", "--noise-size", "much")
    assert "--noise-size: expected float. Got value: much" in done.stderr
    done = call(*train, "--method", "broken")
    assert "method 'broken' is not one of lora, " in done.stderr


def test_it_is_compared_and_tuned(call, folder):
    done = call("compare", "study.yaml", "--output", "results")
    assert "1 runs done, 0 failed" in done.stdout, done.stderr
    assert call("report", "results").returncode == 0
    assert "very noisy" in (folder / "results" / "report.md").read_text()
    search = ("--dataset", "desk", "--method", "very noisy", "--output", "search", "--trials", "1")
    done = call("tune", "study.yaml", *search)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)
    assert found.keys() == {"noise_size", "learning_rate"}
    assert 0.03 <= found["noise_size"] <= 0.3

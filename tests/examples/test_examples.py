"""Each example runs from its first line to its table, with a tiny model and two steps."""

import importlib.util
from pathlib import Path

import pytest

from tests.tiny_base import QUESTIONS, write_jsonl

FOLDER = Path(__file__).parents[2] / "examples"
SHOWN = {
    "intent_routing": ("guaranteed:", "480 test", "200 out_of_scope", "out of scope"),
    "grader": ("lora: held out", "blob, N = 2: larger numbers", "accuracy"),
    "qa_uncertainty": ("Denmark", "Velmoria", "agreement", "refused:"),
    "continue_lora": ("LoRA", "continued as BLoB, N = 2", "ECE", "median Ω"),
}


def main_of(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_every_example_has_a_test_and_a_line():
    names = {file.stem for file in FOLDER.glob("*.py")}
    assert names == SHOWN.keys()
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in names if f"- [{name}.py]({name}.py): " not in text] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHOWN)
def test_it_runs(name, base, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    main_of(name)(["--model", str(base), "--steps", "2", "--samples", "2"])
    printed = capsys.readouterr().out
    assert [part for part in SHOWN[name] if part not in printed] == []


def test_the_grader_takes_questions(base, tmp_path, capsys):
    data = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS * 5)
    main_of("grader")(["--model", str(base), "--steps", "2", "--samples", "2", "--data", str(data)])
    printed = capsys.readouterr().out
    assert "2 questions each" in printed
    assert "larger numbers" not in printed

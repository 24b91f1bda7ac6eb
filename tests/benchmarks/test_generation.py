"""The fast version of the benchmark of written answers: that it runs, and what is right."""

import json
import sys

import generation
import pytest

from tests.tiny_base import QUESTIONS, write_jsonl

RECORD = {"question": "Which?", "choices": ["the sun", "sun and moon", "iron"], "answer": 0}


@pytest.mark.parametrize(
    ("text", "right"),
    [("The sun.", True), ("It is the sun", True), ("sun and moon", False), ("sun or iron", False), ("moon", False)],
)
def test_what_is_right(text, right):
    assert generation.is_right(text, RECORD) == right


@pytest.mark.parametrize("seeds", ["0", pytest.param("01", marks=pytest.mark.long)])
def test_it_runs(base, tmp_path, monkeypatch, seeds):
    data = str(write_jsonl(tmp_path / "questions.jsonl", QUESTIONS))
    options = ["--data", data, "--test", data, "--model", str(base), "--steps", "2", "--seeds", *seeds]
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["generation.py", *options, *folders])
    monkeypatch.setattr(generation, "alone", lambda function, *arguments: function(*arguments))
    generation.main()
    for seed in seeds:
        result = json.loads((tmp_path / "results" / "results.json").read_text())[f"blob-seed{seed}"]
        assert result["num_questions"] == len(QUESTIONS)
        for metrics in result["metrics"].values():
            assert 0 <= metrics["accuracy"] <= 1
            assert metrics["perplexity"] > 1
    assert "| BLoB, N = 5 |" in (tmp_path / "results" / "README.md").read_text()

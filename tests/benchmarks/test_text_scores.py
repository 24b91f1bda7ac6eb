"""The fast version of the study of written answers: that it runs, and what its questions and measures are."""

import json
import re
import sys
from datetime import datetime

import pytest
import text_scores
import torch


def test_the_questions_have_their_answers():
    records = text_scores.additions_and_dates(60)
    assert len({record["prompt"] for record in records}) == 60
    for record in records:
        if record["kind"] == "days":
            first, last = re.findall(r"\d+ \w+ \d{4}", record["prompt"])
            days = datetime.strptime(last, "%d %B %Y") - datetime.strptime(first, "%d %B %Y")
            assert int(record["response"]) == days.days
        else:
            first, second = map(int, re.findall(r"\d+", record["prompt"]))
            assert int(record["response"]) == first + second
            assert len(str(first)) == len(str(second)) == int(record["kind"][0])
    assert text_scores.right_by("arithmetic")(f"It is {records[0]['response']}.", records[0])


def test_the_measures():
    confidence, right = torch.tensor([0.9, 0.8, 0.3, 0.1]).double(), torch.tensor([True, False, True, False])
    found = text_scores.intervals(confidence, confidence, right)
    assert found["auroc"][0] == pytest.approx(0.75)
    assert found["brier"][0] == pytest.approx((0.01 + 0.64 + 0.49 + 0.01) / 4)
    assert all(low <= value <= high for value, low, high in found.values())
    assert text_scores.above(confidence, right)["at_0.8"] == {"count": 2, "right": 1, "mean_p": pytest.approx(0.85)}


def test_it_runs(base, tmp_path, monkeypatch):
    options = ["--model", str(base), "--steps", "2", "--limit", "10", "--calibration", "12", "--questions", "12"]
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    few = ["--methods", "lora", "blob", "--samples", "2", "--answers", "2"]
    monkeypatch.setattr(sys, "argv", ["text_scores.py", *options, *few, *folders])
    monkeypatch.setattr(text_scores, "alone", lambda function, *arguments: function(*arguments))
    lasts = []
    monkeypatch.setattr(
        text_scores, "right_by", lambda name: lambda text, record: lasts.append(0) or len(lasts) % 2 == 0
    )  # an untrained model is never right
    monkeypatch.setattr(text_scores, "_RESAMPLES", 20)
    text_scores.main()
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    blob = results["arithmetic, BLoB, seed 0"]
    assert {"p_correct", "semantic_entropy", "p_true", "tokur_epistemic"} <= blob["metrics"].keys()
    lora = results["arithmetic, plain LoRA, seed 0"]
    assert lora["tokens_read"]["answer"] < blob["tokens_read"]["answer"]
    assert "## arithmetic, BLoB, seed 0" in (tmp_path / "results" / "README.md").read_text()

"""`bloblora calibrate` of a run that writes text, and what `generate` and `score` say then."""

import json
import shutil

import pytest

from bloblora import runs
from bloblora.cli.calibrate import calibrate
from bloblora.cli.text import GenerationOptions, ScoringOptions, correctness, generate, score
from bloblora.data import ReadingOptions
from bloblora.decision import CorrectnessError, PromiseError
from bloblora.runs import PredictionOptions, text_decisions
from bloblora.runs.texts import WritingOptions
from tests.generation.conftest import RECORDS
from tests.tiny_base import queries, write_jsonl, write_signed

WRONG = ["iron", "my money", "sand", "the card", "late", "a parcel"]
OPTIONS, WRITING = PredictionOptions(samples=2), WritingOptions(max_new_tokens=16)
GENERATION = GenerationOptions(samples=2, max_new_tokens=16)
LAX = {"risk": 0.6, "confidence": 0.6, "coverage": 0.4}


@pytest.fixture
def folder(trained, tmp_path):
    return str(shutil.copytree(trained.config.output, tmp_path / "run"))


def given(record):
    """Texts in the place of a record's response, of which five are right."""
    texts = [record["response"], *WRONG] * 5
    return [{"prompt": record["prompt"], "response": text, "right": text == record["response"]} for text in texts]


def references(record):
    """Ten times the same, and every second reference is another."""
    texts = [record["response"], "iron"] * 5
    return [{"prompt": record["prompt"], "response": text} for text in texts]


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def calibrated(folder, data, **options):
    calibrate(OPTIONS, ReadingOptions(), WRITING, folder, str(data), **{**LAX, **options})


def test_a_threshold_of_an_earlier_version_is_refused(folder, tmp_path):
    """It is of e^s, and by the score itself it would withhold all texts."""
    data, file = write_jsonl(tmp_path / "texts.jsonl", given(RECORDS[0])), tmp_path / "run" / "decision.json"
    calibrated(folder, data, by="sequence_log_probability")
    stored = json.loads(file.read_text())
    rule = stored["decisions"][0]["decision"]["answering"]
    assert rule["threshold"] < 0
    rule["threshold"] = 0.25
    write_signed(file, stored)
    with pytest.raises(runs.RunError, match=r"threshold of sequence_log_probability is 0\.25.* must be below 0.*again"):
        score(folder, str(data), ScoringOptions(samples=2), ReadingOptions())


def test_texts_that_are_given(folder, tmp_path, capsys):
    """The map is fitted on texts of one prompt, and the promise on those of another."""
    first, second = (write_jsonl(tmp_path / f"{i}.jsonl", given(record)) for i, record in enumerate(RECORDS))
    with pytest.raises(runs.RunError, match=r"no map to p_correct for `bloblora score` .* or give --by"):
        calibrated(folder, second)
    correctness(folder, str(first), GENERATION, ReadingOptions(), maps=["platt"])
    with pytest.raises(runs.RunError, match=r"record 1: its prompt, and those of 35 records of 35, are among those"):
        calibrated(folder, first)
    capsys.readouterr()
    calibrated(folder, second)
    said = capsys.readouterr().out
    promise = "at most 0.6 of the answered are wrong, with probability 0.6, on data like the 35 calibration records"
    assert f"answering: {promise}" in said
    assert "errors among answers" in said
    assert "next: bloblora score" in said
    output = tmp_path / "scores.jsonl"
    score(folder, str(second), ScoringOptions(samples=2), ReadingOptions(), output=str(output))
    lines = lines_of(output)
    threshold = json.loads((tmp_path / "run" / "decision.json").read_text())["decisions"][0]["decision"]["answering"]
    assert [line["abstain"] for line in lines] == [line["p_correct"] <= threshold["threshold"] for line in lines]
    assert {line["abstain"] for line in lines} == {True, False}
    assert all(line["promises"] == {"answering": promise} for line in lines)
    # another map, of which nothing was promised
    correctness(folder, str(first), GENERATION, ReadingOptions(), maps=["isotonic"])
    with pytest.raises(runs.RunError, match=r"decision\.json is for another map to p_correct"):
        score(folder, str(second), ScoringOptions(samples=2), ReadingOptions())


def test_answers_and_sets_of_them(folder, tmp_path, capsys):
    data = write_jsonl(tmp_path / "references.jsonl", references(RECORDS[0]) + references(RECORDS[1]))
    calibrated(folder, data, by="log_probability", json=True)
    entry = json.loads(capsys.readouterr().out)
    assert entry["text"] == {"of": "generate", "options": {**GENERATION.how()}}
    assert entry["decision"]["answer_sets"] == {"coverage": 0.4, "threshold": 1, "num_examples": 20}
    assert entry["realized"]["set_coverage"] == 0.5
    generate(folder, str(data), GENERATION, ReadingOptions(), output=str(tmp_path / "answers.jsonl"))
    for line in lines_of(tmp_path / "answers.jsonl"):
        assert line["answer_set"] == [line["answer"]]
        assert line["abstain"] is False  # half are right, as may be
        assert line["promises"]["answer_sets"].startswith("at least 0.4 of the answer sets hold a right answer")
    with pytest.raises(runs.RunError, match=r"is for other texts \(.*temperature 0\.0.* there, .*temperature 1\.0"):
        generate(folder, str(data), GenerationOptions(samples=2, temperature=1.0), ReadingOptions())
    # none of the promises is of texts that are given
    output = tmp_path / "scores.jsonl"
    score(folder, str(data), ScoringOptions(samples=2), ReadingOptions(), output=str(output))
    assert "abstain" not in lines_of(output)[0]
    calibrated(folder, data, by="log_probability", coverage=0.8)
    said = " ".join(capsys.readouterr().out.split())
    assert "answer sets: not promised, and left out: coverage 0.8 can't be promised: for 10 of 20 records" in said
    assert "the most that could be is 0.476" in said  # 10/21


@pytest.mark.parametrize(
    ("records", "options", "error", "message"),
    [
        (references(RECORDS[0]), {"by": "rank"}, CorrectnessError, "by: must be one of p_correct, log_probability"),
        (given(RECORDS[0]), {"by": "agreement"}, CorrectnessError, "got 'agreement'"),
        (references(RECORDS[0]), {"risk": 2.0}, ValueError, r"risk must be in \(0, 1\), got 2"),
        (
            references(RECORDS[0]),
            {"risk": 0.01, "coverage": 0.99},
            PromiseError,
            r"risk 0\.01 .*\ncoverage 0\.99 needs at least 99 records",
        ),
        (references(RECORDS[0]), {"matcher": "numeric"}, runs.RunError, "record 1: field 'response': matcher numeric"),
        (references(RECORDS[0]), {"ood": "x.jsonl"}, runs.RunError, "and with nothing else; got --ood"),
        (queries(), {}, runs.RunError, "needs records with 'prompt' or 'messages'"),
    ],
)
def test_what_carries_no_promise(records, options, error, message, folder, tmp_path, monkeypatch):
    """Found before the model is loaded."""
    monkeypatch.setattr(text_decisions, "load_run", None)
    data = write_jsonl(tmp_path / "labelled.jsonl", records)
    with pytest.raises(error, match=message):
        calibrated(folder, data, **options)
    assert not (tmp_path / "run" / "decision.json").exists()

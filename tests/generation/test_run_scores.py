"""`bloblora score` and `bloblora correctness` of a trained run."""

import csv
import io
import json
import shutil
import sys
from datetime import datetime
from decimal import Decimal

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import dynamic_module_utils

from bloblora import runs
from bloblora.cli.text import GenerationOptions, ScoringOptions, correctness, generate, score
from bloblora.data import DataError, ReadingOptions
from bloblora.decision import CorrectnessError
from bloblora.evaluation import ood_metrics
from bloblora.generation import find_matcher
from bloblora.models import ModelError
from bloblora.runs import scoring
from bloblora.tasks import TaskError
from tests.faults.test_code_in_models import CLASSES, CODE, REFUSED, change
from tests.tiny_base import give_base, queries, write_jsonl

from .conftest import RECORDS

TEXTS = [
    {**RECORDS[0], "claims": ["dioxide", [0, 6]]},
    RECORDS[1],
    {"prompt": RECORDS[0]["prompt"], "response": "the card. the carbon"},
]
OPTIONS = ScoringOptions(samples=3)
GENERATION = GenerationOptions(samples=2, max_new_tokens=16)


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run, which may be calibrated."""
    return str(shutil.copytree(trained.config.output, tmp_path / "run"))


def test_the_command_scores_texts_and_claims(trained, tmp_path):
    data = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    output = tmp_path / "scores.jsonl"
    options = ScoringOptions(samples=3, claims="sentences")
    score(trained.config.output, str(data), options, ReadingOptions(), output=str(output))
    lines, expected = lines_of(output), trained.score(TEXTS, 3)
    assert [line["response"] for line in lines] == [record["response"] for record in TEXTS]
    assert lines[0]["id"] == 7
    for name, values in expected.scores().items():
        assert [line[name] for line in lines] == pytest.approx(values.tolist(), abs=1e-5), name
    # the run has learnt the first two
    assert lines[0]["sequence_log_probability"] > lines[2]["sequence_log_probability"] + 5
    tokens = lines[0]["tokens"]
    assert "".join(tokens["texts"]).startswith(" carbon dioxide")
    assert len(tokens["draw_log_probabilities"]) == 3
    assert [claim["text"] for claim in lines[0]["claims"]] == ["dioxide", "carbon"]
    assert [claim["text"] for claim in lines[2]["claims"]] == ["the card.", "the carbon"]
    for line in (lines[0], lines[2]):  # of every token but the end of the text, each in one claim
        inside = sum(line["tokens"]["log_probabilities"][:-1])
        claimed = sum(claim["sequence_log_probability"] for claim in line["claims"])
        assert claimed == pytest.approx(inside, abs=1e-4)
    assert "p_correct" not in lines[0]


@pytest.mark.parametrize("space", ["  ", "\n", " \n\t"])
def test_claims_are_places_in_the_response_as_it_is_given(space, trained):
    """White space before and after it moves none of them."""
    start = len(space)
    (bare,) = trained.describe_scores([{"prompt": "What?", "response": "my card, twice.", "claims": [[0, 7]]}], 2)
    claims = [[start, start + 7], [0, start + 7], f"{space}my card", "twice. "]
    record = {"prompt": "What?", "response": f"{space}my card, twice. \n", "claims": claims}
    (line,) = trained.describe_scores([record], 2)
    places = [(claim["text"], claim["start"], claim["end"]) for claim in line["claims"]]
    assert places == [
        ("my card", start, start + 7),
        (f"{space}my card", 0, start + 7),
        (f"{space}my card", 0, start + 7),
        ("twice. ", start + 9, start + 16),
    ]
    if space == "  ":  # which a prompt's response is read without
        expected = bare["claims"][0]["log_probability"]
        assert line["claims"][0]["log_probability"] == pytest.approx(expected, abs=1e-5)
    (line,) = trained.describe_scores([{**record, "claims": None}], 2, claims="sentences")
    assert [claim["text"] for claim in line["claims"]] == ["my card, twice."]
    with pytest.raises(TaskError, match=r"item 0: \[0, 1\] must be places of more than white space"):
        next(trained.describe_scores([{**record, "claims": [[0, 1]]}], 2))


def test_other_columns_may_be_of_any_type(trained, tmp_path):
    rows = [{**record, "when": datetime(2024, 1, 2), "cost": Decimal("0.5"), "raw": b"\xff"} for record in TEXTS[1:]]
    parquet.write_table(pa.Table.from_pylist(rows), data := tmp_path / "texts.parquet")
    score(trained.config.output, str(data), OPTIONS, ReadingOptions(), output=str(tmp_path / "scores.jsonl"))
    lines = lines_of(tmp_path / "scores.jsonl")
    assert [line["response"] for line in lines] == [record["response"] for record in TEXTS[1:]]
    assert not {"when", "cost", "raw"} & lines[0].keys()


def test_claims_of_a_table(trained, tmp_path):
    table = tmp_path / "texts.csv"
    with table.open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerows([["prompt", "response", "claims"], ["What?", "my card", '["my", [3, 7]]'], ["What?", "a", ""]])
    score(trained.config.output, str(table), OPTIONS, ReadingOptions(), output=str(tmp_path / "scores.jsonl"))
    first, second = lines_of(tmp_path / "scores.jsonl")
    assert [claim["text"] for claim in first["claims"]] == ["my", "card"]
    assert "claims" not in second


def test_a_stop_loses_no_more_than_a_chunk(trained, tmp_path, monkeypatch):
    """And the same command on another file, or with other options, is refused."""
    monkeypatch.setattr(sys.modules["bloblora.runs.processes"], "CHUNK", 2)  # `runs.processes` is a function
    data, output = write_jsonl(tmp_path / "texts.jsonl", TEXTS), tmp_path / "scores.jsonl"
    run_folder, given = trained.config.output, (OPTIONS, ReadingOptions(), str(output))
    score(run_folder, str(data), *given)
    whole = output.read_text()
    output.write_text(whole[: len(whole) - 40])
    described = []
    load = scoring.load_run

    def loaded(description, **options):
        run = load(description, **options)
        before = run.describe_scores
        run.describe_scores = lambda chunk, *a, **o: described.extend(chunk) or before(chunk, *a, **o)
        return run

    monkeypatch.setattr(scoring, "load_run", loaded)
    score(run_folder, str(data), *given)
    assert len(described) == 1
    assert [line["tokens"]["ids"] for line in lines_of(output)] == [
        line["tokens"]["ids"] for line in map(json.loads, whole.splitlines())
    ]
    with pytest.raises(runs.RunError, match="num_samples 3 there, 2 now"):
        score(run_folder, str(data), ScoringOptions(samples=2), ReadingOptions(), output=str(output))
    for changed in ({"claims": []}, {"id": "another"}):
        other = write_jsonl(tmp_path / "other.jsonl", [TEXTS[0] | changed, *TEXTS[1:]])
        with pytest.raises(runs.RunError, match="lines_sha256"):
            score(run_folder, str(other), *given)


def test_a_stream_and_a_table(trained, tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.read_bytes())))
    score(trained.config.output, "-", OPTIONS, ReadingOptions())
    streamed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = trained.score(TEXTS, 3).log_probability.tolist()
    assert [line["log_probability"] for line in streamed] == pytest.approx(expected, abs=1e-5)
    table = tmp_path / "scores.csv"
    score(trained.config.output, str(data), OPTIONS, ReadingOptions(), output=str(table))
    with table.open(newline="") as handle:
        rows = [*csv.DictReader(handle)]
    assert [json.loads(row["tokens"])["ids"] for row in rows] == [line["tokens"]["ids"] for line in streamed]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scores.csv", "texts.jsonl"]


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"prompt": "What?", "response": " "}, DataError, "field 'response': ' ' must be a text that isn't empty"),
        ({"prompt": "What?"}, DataError, "field 'response': missing"),
        ({"prompt": "where is it " * 2000, "response": "a card"}, TaskError, r"record 1: max_length: .* the limit is"),
        ({"prompt": "What?", "response": "a card", "claims": ["sun"]}, TaskError, "'sun' must be a part of the respon"),
        (queries()[0], runs.RunError, "needs records with 'prompt' or 'messages', not 'text'"),
    ],
)
def test_bad_texts_are_found_before_the_model_is_loaded(record, error, message, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "load_run", None)
    data, output = write_jsonl(tmp_path / "texts.jsonl", [record]), tmp_path / "scores.jsonl"
    with pytest.raises(error, match=message):
        score(trained.config.output, str(data), OPTIONS, ReadingOptions(), output=str(output))
    assert not output.exists()


def test_bad_texts_of_a_stream_are_numbered(trained, tmp_path, monkeypatch, capsys):
    """Those of its second batch too; and nothing is loaded for a first one that can't be used."""
    good, bad = {"prompt": "What?", "response": "a card"}, {"prompt": "What?", "response": "a card</s> or two"}
    follows = "response: ' or two' follows the end-of-text token '</s>'"
    data = write_jsonl(tmp_path / "texts.jsonl", [*[good] * 66, bad])
    with pytest.raises(TaskError, match=f"record 67: {follows}"):
        score(trained.config.output, str(data), ScoringOptions(samples=0), ReadingOptions())
    assert len(capsys.readouterr().out.splitlines()) == 64
    monkeypatch.setattr(runs, "load_run", pytest.fail)
    for records, options, message in (
        ([good, bad], {}, f"record 2: {follows}"),
        (
            [good, good | {"claims": ["sun"]}],
            {"claims": "sentences"},
            "record 2: field 'claims', item 0: 'sun' must be",
        ),
    ):
        data = write_jsonl(tmp_path / "texts.jsonl", records)
        with pytest.raises(TaskError, match=message):
            score(trained.config.output, str(data), ScoringOptions(samples=0, **options), ReadingOptions())


def right_and_wrong():
    """Texts that the run has learnt, and others."""
    wrong = ["iron", "my money", "sand", "the card", "late", "a parcel"]
    return [
        {"prompt": record["prompt"], "response": text, "right": text == record["response"]}
        for record in RECORDS
        for text in [record["response"], *wrong] * 3
    ]


def test_a_map_of_texts_that_are_given(folder, tmp_path, capsys):
    records = right_and_wrong()
    data = write_jsonl(tmp_path / "labelled.jsonl", records)
    options = GenerationOptions(samples=3)
    correctness(folder, str(data), options, ReadingOptions(), maps=["platt"], json=True)
    entry = json.loads(capsys.readouterr().out)
    assert (entry["of"], entry["options"]) == ("score", {"num_samples": 3, "seed": 0})
    output = tmp_path / "scores.jsonl"
    score(folder, str(data), OPTIONS, ReadingOptions(), output=str(output))
    found = torch.tensor([line["p_correct"] for line in lines_of(output)])
    right = torch.tensor([record["right"] for record in records])
    assert ood_metrics({"p": -found[right]}, {"p": -found[~right]})["auroc_p"] > 0.7
    assert found.mean().item() == pytest.approx(right.double().mean().item(), abs=0.05)
    # a map of texts that are given is none of answers
    generate(folder, str(data), GENERATION, ReadingOptions(), output=str(tmp_path / "answers.jsonl"))
    assert "p_correct" not in lines_of(tmp_path / "answers.jsonl")[0]
    with pytest.raises(runs.RunError, match=r"is for other texts .*run `bloblora correctness` again"):
        score(folder, str(data), ScoringOptions(samples=2), ReadingOptions())


def test_a_map_of_answers_and_references(folder, tmp_path, capsys):
    """The run answers two prompts as it has learnt; half of the references are others."""
    folder = str(shutil.move(folder, tmp_path / "my run"))
    given = [record | {"response": text} for record in RECORDS for text in (record["response"], "iron")] * 5
    references = [{name: record[name] for name in ("prompt", "response")} for record in given]
    data = write_jsonl(tmp_path / "references.jsonl", references)
    (tmp_path / "judge.py").write_text("def same(answer, reference):\n    return answer.strip() == reference\n")
    matcher = f"{tmp_path / 'judge.py'}:same"
    correctness(folder, str(data), GENERATION, ReadingOptions(), matcher=matcher, maps=["platt"])
    said = capsys.readouterr().out
    assert "10 of 20 texts are right" in said
    assert "brier" in said
    assert "ece_floor" in said
    assert f"next: bloblora generate '{folder}' --input FILE" in said
    generate(folder, str(data), GENERATION, ReadingOptions(), output=str(tmp_path / "answers.jsonl"))
    # equal prompts get equal answers, of which half are right
    found = [line["p_correct"] for line in lines_of(tmp_path / "answers.jsonl")]
    assert found == pytest.approx([0.5] * 20, abs=0.1)
    file = tmp_path / "my run" / "correctness.json"
    stored = json.loads(file.read_text())
    stored["maps"][0]["correctness"]["num_right"] = 12
    file.write_text(json.dumps(stored))
    with pytest.raises(runs.RunError, match=r"its field 'sha256' says .*it was altered"):
        generate(folder, str(data), GENERATION, ReadingOptions())


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([RECORDS[0]] * 6, {"matcher": "numeric"}, "record 1: field 'response': matcher numeric: .* no number in it"),
        ([RECORDS[0]] * 6, {"matcher": "nearly"}, "matcher must be exact, normalized, numeric, module:function"),
        ([RECORDS[0]] * 6, {"matcher": "operator:add"}, "matcher operator:add gave '.*'; it must give True or False"),
        ([RECORDS[0]] * 6, {"matcher": "no_module:same"}, "No module named 'no_module'"),
        ([RECORDS[0] | {"right": True}] * 12, {}, "of 12 texts 12 are right and 0 wrong"),
        ([RECORDS[0] | {"right": "perhaps"}], {}, "field 'right': 'perhaps' must be true or false"),
        (right_and_wrong(), {"maps": ["linear"]}, "maps must be among platt, beta, isotonic, got linear"),
        (queries(), {}, "needs records with 'prompt' or 'messages'"),
    ],
)
def test_labelled_texts_that_carry_no_map(records, options, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["bloblora.runs.correctness"], "load_run", pytest.fail)  # all is known before
    data = write_jsonl(tmp_path / "labelled.jsonl", records)
    with pytest.raises((runs.RunError, CorrectnessError, ValueError), match=message):
        correctness(folder, str(data), GENERATION, ReadingOptions(), **options)
    assert not (tmp_path / "run" / "correctness.json").exists()


def test_a_matcher_that_fails_on_an_answer_names_it(folder, tmp_path):
    """What it can't do with a reference is known before; the answers come from the run."""
    judge = "def same(answer, reference):\n    return answer.strip() == reference or answer[99] == 0\n"
    (tmp_path / "judge.py").write_text(judge)
    references = [RECORDS[0]] * 2 + [RECORDS[0] | {"response": "iron"}] * 10
    data, matcher = write_jsonl(tmp_path / "references.jsonl", references), f"{tmp_path / 'judge.py'}:same"
    message = (
        r"record 3: matcher .*judge.py:same must give True or False for the answer ' carbon dioxide' and the reference "
        "'iron'; got IndexError: string index out of range"
    )
    with pytest.raises(runs.RunError, match=message):
        correctness(folder, str(data), GENERATION, ReadingOptions(), matcher=matcher)


@pytest.mark.parametrize(
    ("matcher", "answer", "reference", "right"),
    [
        ("exact", " Iron\n", "Iron", True),
        ("exact", "iron", "Iron", False),
        ("normalized", "The iron.", "iron", True),
        ("numeric", "3 apples and 4 are 1,207.50 in all.", "1207.5", True),
        ("numeric", "x = -2e3", "-2000", True),
        ("numeric", "3-5", "5", True),
        ("numeric", "none", "5", False),
        ("numeric", "12345,678", "12345678", False),
        ("operator:eq", "a", "a", True),
    ],
)
def test_matchers(matcher, answer, reference, right):
    assert find_matcher(matcher)(answer, reference) == right


def test_a_base_with_code_of_its_own(trained, folder, tmp_path, monkeypatch):
    """It is run only where that is asked for, by `score` from a file or standard input, and by `correctness`."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    base, marker = tmp_path / f"own_{tmp_path.name}", tmp_path / "was_run"
    shutil.copytree(trained.config.model, base)
    change(base / "config.json", model_type="own", auto_map=CLASSES)
    (base / "own.py").write_text(CODE.format(marker=str(marker)))
    give_base(tmp_path / "run", base)
    data = write_jsonl(tmp_path / "texts.jsonl", right_and_wrong())
    output, meant = str(tmp_path / "scores.jsonl"), {"trust_remote_code": True}
    for options in ({}, {"output": output}):
        with pytest.raises(ModelError, match=REFUSED):
            score(folder, str(data), OPTIONS, ReadingOptions(), **options)
    with pytest.raises(ModelError, match=REFUSED):
        correctness(folder, str(data), GENERATION, ReadingOptions())
    assert not marker.exists()
    correctness(folder, str(data), GenerationOptions(samples=1, **meant), ReadingOptions(), maps=["platt"])
    score(folder, str(data), ScoringOptions(samples=1, **meant), ReadingOptions(), output=output)
    assert len(lines_of(tmp_path / "scores.jsonl")) == len(right_and_wrong())

"""The columns of the training data are saved with a run, and used again on other files."""

import json

import pytest

from tests.cli.conftest import SETTINGS
from tests.tiny_base import queries


@pytest.fixture
def table(tmp_path):
    def write(name, *columns, separator=";"):
        rows = [columns, *((record["text"], f" {record['label']}") for record in queries())]
        (file := tmp_path / name).write_text("".join(f"{separator.join(row)}\n" for row in rows), encoding="utf-16")
        return file

    return write


def test_columns_of_a_run(files, table, call, tmp_path):
    data, output = table("data.csv", "query", "body"), tmp_path / "run"
    train = ["train", "--data", data, "--model", files.base, "--output", output, *SETTINGS]
    status, _, error = call(*train)
    assert status == 2
    assert error.splitlines()[-1:] == [
        f"bloblora train: error: {data}: its columns are query, body, and none is obvious; of texts and their labels "
        "give --text-column and --label-column; or else --text-column, --text-pair-column, --label-column, "
        "--labels-column, --value-column; or --question-column, "
        "--choices-column, --answer-column; or "
        "--prompt-column, --response-column, --messages-column; or "
        "--chosen-column, --rejected-column, --margin-column, --responses-column, --prompt-column; "
        "or --tokens-column, --tags-column"
    ]
    train += ["--label-column", "body"]
    status, _, error = call(*train)
    assert status == 0
    assert f"{data}: text is column 'query' (--text-column to choose otherwise)" in error.splitlines()
    assert f"{data}: not UTF-8, read as utf-16" in error.splitlines()
    stored = json.loads((output / "run.json").read_text())
    assert stored["config"]["reading"] == {"label_column": "body"}
    assert stored["columns"] == {"text": "query", "label": "body"}
    assert call(*train)[0] == 0  # the same run, which is there

    for other in (data, table("own.csv", "text", "label"), table("guessed.csv", "sentence", "intent")):
        status, out, error = call("evaluate", output, "--data", other, "--samples", "1", "--json")
        assert (status, json.loads(out)["num_examples"]) == (0, 4), error
    other = table("other.csv", "query", "topic", separator=",")
    options = ["--samples", "1", "--text-column", "topic"]
    status, out, _ = call("predict", output, "--input", other, *options)
    assert [json.loads(line)["text"] for line in out.splitlines()] == [f" {record['label']}" for record in queries()]


def test_rows_that_cannot_be_used_are_left_out(run, call, tmp_path):
    (file := tmp_path / "data.csv").write_text("text,label\nwhere is my parcel,parcel\n,parcel\n")
    status, _, error = call("evaluate", run, "--data", file, "--samples", "1")
    assert (status, "data.csv:3: field 'text': '' must be" in error) == (2, True)
    status, out, error = call("evaluate", run, "--data", file, "--samples", "1", "--json", "--skip-invalid")
    assert (status, json.loads(out)["num_examples"]) == (0, 1)
    assert "left out 1 invalid row" in error


def test_a_limit_of_tokens(files, call, tmp_path):
    train = ["train", "--data", files.texts, "--model", files.base, "--output", tmp_path / "run", *SETTINGS]
    status, _, error = call(*train, "--max-length", "3")
    assert (status, "record 1: max_length: 3 tokens are left for the prompt, too few for a text" in error) == (2, True)
    status, _, error = call(*train, "--max-length", "3", "--template", "{text}")
    assert status == 0
    assert "of 4 records have more than max_length=3 tokens: the end of the text was cut off" in error
    assert json.loads((tmp_path / "run" / "task.json").read_text())["max_length"] == 3

"""Two processes on one output: the second stops with an error, and what is read back is checked."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from bloblora import runs
from bloblora.runs.entries import EntriesFile
from bloblora.runs.processes import append_lines
from tests.tiny_base import write_jsonl

ROWS = list(range(3))


def described(rows):
    return [{"row": row} for row in rows]


def write(file, **options):
    append_lines(file, ROWS, described, {"seed": 0}, is_of=lambda line, row: line["row"] == row, **options)


def test_the_second_writer_of_a_file_is_refused_and_a_killed_ones_partial_file_goes(tmp_path):
    file = tmp_path / "lines.jsonl"
    for partial in (".lines.jsonl.0123abcd.partial", ".lines.jsonl.meta.json.0123abcd.partial"):
        (tmp_path / partial).touch()
    with runs.alone(file):
        with pytest.raises(runs.RunError, match=r"lines\.jsonl: another process is at work in it"):
            write(file)
        assert not file.exists()
    write(file)
    assert {path.name for path in tmp_path.iterdir()} == {"lines.jsonl", "lines.jsonl.meta.json"}


@pytest.mark.parametrize(("option", "name"), [("--output", "metrics.json"), ("--diagram", "diagram.svg")])
def test_two_evaluations_with_one_output(call, files, run, tmp_path, option, name):
    evaluate = ("evaluate", run, "--data", files.texts, "--samples", "0", option, tmp_path / name)
    with runs.alone(tmp_path / name):
        status, out, err = call(*evaluate)
        assert (status, out) == (2, "")
        assert f"{name}: another process is at work in it" in err
    assert call(*evaluate)[0] == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(("json", "svg", "lock"))] == [name]


def test_two_with_one_output(call, files, run, tmp_path):
    predicted = write_jsonl(tmp_path / "predicted.jsonl", [{"probabilities": [0.9, 0.1], "target": 0}] * 60)
    rules = tmp_path / "rules.json"
    for output, command in {
        rules: ("calibrate", "--predictions", predicted, "--risk", "0.5", "--output", rules),
        tmp_path / "out.csv": ("predict", run, "--input", files.texts, "--output", tmp_path / "out.csv"),
        tmp_path / "export": ("export", run, "--output", tmp_path / "export"),
        tmp_path / "import": ("import", run, "--output", tmp_path / "import"),
    }.items():
        with runs.alone(output):
            status, out, err = call(*command)
        assert (status, out) == (2, ""), command
        assert f"{output.name}: another process is at work in it" in err
        assert not output.exists()


def test_the_lock_that_a_kill_left_beside_a_whole_output_goes(call, run, tmp_path):
    for command in ("export", "import"):
        output = tmp_path / command
        shutil.copytree(run, output)
        (lock := tmp_path / f".{command}.lock").touch()
        status, _, err = call(command, run, "--output", output)
        assert (status, "choose another output" in err, lock.exists()) == (2, True, False)


@dataclass(frozen=True)
class Numbers:
    format_version: int
    numbers: list[dict]


def test_two_writers_of_a_runs_entries_lose_none(tmp_path):
    file, numbers = tmp_path / "numbers.json", EntriesFile(Numbers, 1, "count")

    def put(number):
        numbers.put(file, {"number": number, "state": 0}, {"number": number}, {"state": 0})

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(put, range(20))]
    assert sorted(entry["number"] for entry in numbers.read(file)) == [*range(20)]
    numbers.put(file, {"number": 3, "state": 1}, {"number": 3}, {"state": 1})  # of another state of the run
    assert numbers.read(file) == [{"number": 3, "state": 1}]
    file.write_text(file.read_text().replace("3", "4"))
    with pytest.raises(runs.RunError, match=r"numbers\.json: .* it was altered"):
        numbers.read(file)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([0, 1, 2, 0], "has more lines than the 3 records"),
        ([0, 2, 1], ":2: isn't a prediction of record 2"),
    ],
)
def test_lines_of_other_records_are_refused_and_stay(tmp_path, lines, message):
    file = tmp_path / "lines.jsonl"
    write(file)
    file.write_text("".join(json.dumps({"row": row}) + "\n" for row in lines))
    before = file.read_bytes()
    with pytest.raises(runs.RunError, match=message):
        write(file)
    assert file.read_bytes() == before

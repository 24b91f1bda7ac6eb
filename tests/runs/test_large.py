"""Memory and files of data that need not fit into memory."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bloblora import runs
from bloblora.data import DataError, MappedRows, write_rows
from bloblora.runs.folder import records_sha256
from bloblora.runs.selection import split
from tests.tiny_base import queries, write_jsonl

_PREDICT = """
import sys
from bloblora.cli import main
main(sys.argv[1:])
# not ru_maxrss, which starts with what the parent had
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
RECORDS = [{"text": f"text {i}", "label": "abc"[i % 3], "extra": i} for i in range(90)]


@pytest.fixture
def mapped(tmp_path):
    write_rows(tmp_path / "rows.arrow", RECORDS)
    return MappedRows(tmp_path / "rows.arrow")


def test_records_on_the_disk_are_chosen_as_those_in_memory(mapped):
    for limit in (5, 100, None):
        assert list(runs.select(mapped, limit, 3)) == runs.select(RECORDS, limit, 3)
    assert [list(part) for part in split(mapped, 0.2, 3)] == [*split(RECORDS, 0.2, 3)]


def test_the_hash_is_that_of_one_json_list(mapped):
    read = [{"text": record["text"], "label": record["label"]} for record in RECORDS]
    assert records_sha256(mapped) == hashlib.sha256(json.dumps(read).encode()).hexdigest()
    assert records_sha256([]) == hashlib.sha256(b"[]").hexdigest()


@pytest.mark.parametrize("text", ["one more", ""])
def test_training_leaves_no_scratch(base, tmp_path, text):
    file = write_jsonl(tmp_path / "data.jsonl", [*queries(), {"text": text, "label": "refund"}])
    output = tmp_path / "run"
    config = runs.RunConfig.of(data=str(file), output=str(output), model=str(base), steps=1, batch_size=2, r=2)
    if text:
        assert runs.train(config, progress=False).training["num_examples"] == 5
        assert not (output / ".data").exists()
        return
    with pytest.raises(DataError, match="field 'text': ''"):
        runs.train(config, progress=False)
    assert not output.exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak from Linux")
def test_memory_of_a_long_prediction_is_that_of_a_short_one(base, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", queries())
    config = runs.RunConfig.of(data=str(data), output=str(tmp_path / "run"), model=str(base), steps=1, r=2)
    runs.train(config, progress=False)
    running = []
    for size in (300, 2500):  # more than a chunk of what is written at once
        records = [{"id": i, "text": f"where is {'my ' * (i % 9)}parcel", "note": f"{i:040000}"} for i in range(size)]
        file = write_jsonl(tmp_path / f"{size}.jsonl", records)
        command = ["predict", config.output, "--input", file, "--samples", "0", "--batch-size", "256"]
        running.append(_start(*command, "--output", tmp_path / f"{size}.out"))
    small, large = (int(process.communicate(timeout=600)[0]) / 1024 for process in running)
    with Path(tmp_path / "2500.out").open(encoding="utf-8") as lines:
        assert json.loads([*lines][-1])["id"] == 2_499
    # The notes alone of 2,200 records are 88 MB; what libraries hold differs by some 20 MB from process to process.
    assert large - small < 45, f"{small} MB for 300 records, {large} MB for 2,500"


def _start(*arguments):
    command = [sys.executable, "-c", _PREDICT, *map(str, arguments)]
    # glibc gives threads arenas of their own, whose number is chance
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

"""Input that was found to be taken in silence, or refused only after the work."""

import ctypes
import json
import shutil
import subprocess
import sys

import pytest

from bloblora.data import DataError, read_records
from bloblora.files import read_json
from tests.cli.conftest import HEAD, LEARNT, SETTINGS
from tests.tiny_base import write_jsonl


def test_equal_keys_are_refused(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match=r"run\.json: not readable as JSON: key 'b' is there twice"):
        read_json(file, ValueError)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "text": "b", "label": "x"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:1: not valid JSON: key 'text' is there twice"):
        read_records(data)


def test_half_a_surrogate_pair_in_an_id_is_refused_before_the_work(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "x", "id": ["\\udc00"]}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'id': .* has half a surrogate pair"):
        read_records(data)


_PROGRAM = """
import contextlib, io, json, sys
from bloblora.cli import main
for arguments in json.loads(sys.argv[1]):
    err, status = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exit_:
            status = exit_.code or 0
    print(json.dumps([status, err.getvalue()]))
"""


@pytest.fixture
def without_rights():
    """Run commands in a process for which rights count, also where that of the tests is root's."""

    def commands(*commands):
        libc = ctypes.CDLL(None)
        drop, dac_override = 24, 1  # prctl's PR_CAPBSET_DROP; fails where there is nothing to drop
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, json.dumps([[*map(str, arguments)] for arguments in commands])],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda: libc.prctl(drop, dac_override, 0, 0, 0),
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    return commands


@pytest.fixture
def read_only(run, tmp_path):
    """A finished run in a folder that can't be written."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "decision.json").unlink(missing_ok=True)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_finished_run_in_a_folder_that_cannot_be_written(files, read_only, without_rights, tmp_path):
    """`train` opens it and `predict` reads it; `calibrate` says so before it has predicted anything."""
    there = sorted(file.name for file in read_only.iterdir())
    train = ("train", "--data", files.texts, "--model", files.base, "--output", read_only)
    unseen = [{"text": f"number {i}", "label": ["parcel", "refund"][i % 2]} for i in range(100)]
    data = write_jsonl(tmp_path / "unseen.jsonl", unseen)
    same, another, predicted, calibrated = without_rights(
        (*train, *SETTINGS, *LEARNT, *HEAD),
        (*train, *SETTINGS, *LEARNT, *HEAD, "--seed", "7"),
        ("predict", read_only, "--input", files.outside),
        ("calibrate", read_only, "--data", data),
    )
    assert same[0] == predicted[0] == 0
    assert (another[0], "another configuration" in another[1]) == (2, True)
    status, err = calibrated
    assert status == 2
    assert err.splitlines()[-1].endswith("decision.json: can't be written: Permission denied")
    assert "predicting" not in err
    assert sorted(file.name for file in read_only.iterdir()) == there

"""Commands that are killed at moments that a seed picks, or whose disk is full, and are given again.

They end as if nothing had happened.
"""

import gc
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest

from bloblora.cli import main
from tests.tiny_base import queries, write_jsonl

TRAINING = ("--steps", "4", "--save-steps", "1", "--batch-size", "2", "--r", "2")
COMMANDS = {
    "train": ("train", "--data", "texts.jsonl", "--model", "base", "--output", "out", *TRAINING),
    "predict": ("predict", "run", "--input", "many.jsonl", "--output", "out.csv", "--samples", "2"),
    "evaluate": ("evaluate", "run", "--data", "many.jsonl", "--predictions", "out.jsonl", "--samples", "2"),
    "export": ("export", "run", "--output", "out", "--samples", "0"),
}
LONGER = {
    "ensemble": (*COMMANDS["train"], "--method", "ensemble", "--members", "3"),
    "swag": (*COMMANDS["train"], "--method", "swag"),
    "merged": (*COMMANDS["export"], "--format", "merged"),
    "compare": ("compare", "study.yaml", "--output", "out"),
}
STUDY = """
name: kills
seeds: [0, 1]
samples: [0, 2]
baseline: blob
models: [base]
train: {max_steps: 3, save_steps: 1, per_device_train_batch_size: 2}
datasets: {texts: {train: {data: texts.jsonl}, test: {data: texts.jsonl}}}
methods: {blob: {}}
"""
IMPORTED = ("cli.options", "cli.calibrate", "cli.predict", "cli.share", "cli.train", "export", "training.trainer")
SPENT = {"seconds", "peak_memory_bytes", "resumed_from", "share_of_time", "machine", "sha256"}
"""Fields that say what was spent, and hashes over them; hashes of files aren't in a field of that name."""


@pytest.fixture(scope="module")
def forks():
    """Processes with the imports done, so that a kill costs no start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(f"bloblora.{name}" for name in IMPORTED)])
    return context


@pytest.fixture
def campaign(files, run, forks, tmp_path):
    """Runs a command undisturbed, and with full disks and kills, and compares all files that there are at the end."""

    def folder(name):
        """Where it works: paths are the same in all."""
        folder = tmp_path / name
        folder.mkdir()
        shutil.copytree(files.base, folder / "base")
        shutil.copytree(run, folder / "run")
        write_jsonl(folder / "texts.jsonl", queries())
        write_jsonl(folder / "many.jsonl", queries() * 150)
        (folder / "study.yaml").write_text(STUDY)
        return folder

    def campaign(name, seed, kills, limits=()):
        arguments, moments = (COMMANDS | LONGER)[name], random.Random(f"{name} {seed}")
        whole, disturbed = folder("whole"), folder("disturbed")
        changes = _run(forks, whole, arguments)
        faults = [{"limit": limit} for limit in limits]
        faults += [{"kill": (moments.randint(1, changes), moments.uniform(0, 0.02))} for _ in range(kills)]
        for fault in (*faults, {}):
            refused = arguments[0] == "export" and (disturbed / "out").exists()  # it writes over no export
            _run(forks, disturbed, arguments, refused=refused, **fault)
        found, expected = _content(disturbed), _content(whole)
        assert sorted(found) == sorted(expected)
        for file, content in expected.items():
            assert found[file] == content, file

    return campaign


@pytest.mark.parametrize(
    ("name", "kills", "limits"),
    [("train", 2, [20_000]), ("predict", 1, []), ("evaluate", 1, []), ("export", 1, [20_000])],
)
def test_disturbed_and_given_again(campaign, name, kills, limits):
    campaign(name, 0, kills, limits)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("name", [*COMMANDS, *LONGER])
def test_disturbed_again_and_again(campaign, name, seed):
    campaign(name, seed, kills=6, limits=[100 * 2**seed])


def _run(forks, folder, arguments, kill=None, limit=None, refused=False):
    """Run a command in a folder to its end, or to a kill so many seconds after its n-th change; how many it made.

    With a limit on the size of files it may end with one message, and where it is refused it must.
    """
    process = forks.Process(target=_command, args=(folder, arguments, limit))
    process.start()
    changes, state, deadline = 0, _state(folder), time.monotonic() + 300
    while process.is_alive():
        assert time.monotonic() < deadline
        before, state = state, _state(folder)
        changes += state != before
        if kill and changes >= kill[0]:
            time.sleep(kill[1])
            process.kill()
            break
        time.sleep(0.001)
    process.join()
    if kill and process.exitcode == -signal.SIGKILL:
        return changes
    said = folder.with_suffix(".log").read_text()
    assert process.exitcode in ([2] if refused else [0, 2] if limit else [0]), said
    if process.exitcode == 2:
        _, error, message = said.rpartition(f"bloblora {arguments[0]}: error: ")
        assert error
        assert len(message.splitlines()) <= (2 if arguments[0] == "compare" else 1)  # of each of its runs
        assert "Traceback" not in said
        assert "stream produced" not in said
    return changes


def _command(folder, arguments, limit):
    gc.freeze()  # as in tests/conftest.py
    os.chdir(folder)
    said = io.StringIO()
    if limit:  # a write beyond it is an error as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(arguments)
    except Exception:
        said.write(traceback.format_exc())
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        folder.with_suffix(".log").write_text(said.getvalue())


def _state(folder):
    """What changes when a file appears, grows or goes."""
    state = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                state[place, name] = (status := os.stat(Path(place, name))).st_size, status.st_mtime_ns
    return state


def _content(folder):
    """Every file, hidden ones too: JSON without what was spent, and all without the folder's own place."""
    files = [file for file in folder.rglob("*") if file.is_file() and "logs" not in file.parts]
    return {str(file.relative_to(folder)): _read(file, folder) for file in files}


def _read(file, folder):
    content = file.read_bytes().replace(bytes(folder), b"")
    return _without_spent(json.loads(content)) if file.suffix == ".json" else content


def _without_spent(content):
    if isinstance(content, list):
        return [*map(_without_spent, content)]
    if not isinstance(content, dict):
        return content
    return {name: _without_spent(value) for name, value in content.items() if name not in SPENT}

"""A command reads a run's folder once: counted by Python's own audit of what is opened."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
from collections import Counter
folder, opened = os.path.realpath(sys.argv[1]), Counter()
def count(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        path = os.path.realpath(arguments[0])
        if path.startswith(folder + os.sep):
            opened[os.path.basename(path)] += 1
sys.addaudithook(count)
from bloblora.cli import main
main(sys.argv[2:])
for name, number in opened.items():
    print("opened", name, number, file=sys.stderr)
"""


@pytest.mark.parametrize("command", [("evaluate", "--data"), ("predict", "--input")])
def test_each_description_is_read_once(run, files, command):
    arguments = [command[0], run, command[1], files.texts, "--samples", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, run, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    lines = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("opened ")]
    opened = Counter({name: int(number) for name, number in lines})
    assert opened["run.json"] == opened["task.json"] == 1
    assert 0 < opened["adapter_model.safetensors"] <= 3  # its content's hash, its bytes' hash, and PEFT
    written = {name for name in opened if name.startswith(".metrics.json.")}  # becomes metrics.json, and its lock
    assert len(written) == (2 if command[0] == "evaluate" else 0)
    assert {file.name for file in Path(run).iterdir()} >= opened.keys() - written

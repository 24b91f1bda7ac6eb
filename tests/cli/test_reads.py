"""A command reads a run's folder once: counted by Python's own audit of what is opened."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, os, sys
from collections import Counter
folder, opened = os.path.realpath(sys.argv[1]), Counter()
def count(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        path = os.path.realpath(arguments[0])
        if path.startswith(folder + os.sep):
            opened[os.path.basename(path)] += 1
sys.addaudithook(count)
from bloblora.cli import main
for command in json.loads(sys.argv[2]):
    opened.clear()
    main(command)
    print("opened", json.dumps(opened), file=sys.stderr)
"""


def test_each_description_is_read_once(run, files):
    commands = [["evaluate", run, "--data", files.texts], ["predict", run, "--input", files.texts]]
    arguments = [run, json.dumps([[*command, "--samples", "2"] for command in commands])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    counts = [json.loads(line[7:]) for line in done.stderr.splitlines() if line.startswith("opened ")]
    assert len(counts) == len(commands)
    for opened, writes in zip(counts, (2, 0), strict=True):  # what becomes metrics.json, and its lock
        assert opened["run.json"] == opened["task.json"] == 1
        assert 0 < opened["adapter_model.safetensors"] <= 3  # its content's hash, its bytes' hash, and PEFT
        written = {name for name in opened if name.startswith(".metrics.json.")}
        assert len(written) == writes
        assert {file.name for file in Path(run).iterdir()} >= opened.keys() - written

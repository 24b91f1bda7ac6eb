"""Somebody who does what a page says, with a tiny model and two steps."""

import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from bloblora.cli import main
from bloblora.evaluation import METRICS
from bloblora.methods import METHODS
from bloblora.posterior import PRIORS
from bloblora.serving import Server, server
from bloblora.studies import read_study
from bloblora.tasks import TASKS
from tests.docs.blocks import ROOT, Block

# What a command gets in addition. The default model is a tiny one, see conftest.py.
QUICK = {
    "train": ["--steps", "2", "--batch-size", "2", "--r", "2"],
    "demo": ["--steps", "2", "--limit", "20", "--output", "runs/of-the-demo"],
    "calibrate": ["--risk", "0.9", "--confidence", "0.5", "--coverage", "0.6", "--false-alarm", "0.3"],
    "tune": ["--trials", "1", "--aim", "nll"],
    "serve": ["--port", "0", "--drain-seconds", "0"],
}
# And what a run has no rule for.
WITHOUT = {
    "runs/stars": ("--risk", "--confidence"),
    "runs/tags": ("--risk", "--confidence"),
    "runs/ner": ("--risk", "--confidence"),
}
# What is read for something else: names of a model and of data that are elsewhere or large.
INSTEAD = {
    "meta-llama/Llama-2-7b-hf": "smollm2-135m",
    "arc_easy": "choices.jsonl",
    "support_desk:validation": "validation.jsonl",
    "support_desk:test": "held_out.jsonl",
    "support_desk:out_of_scope": "other.jsonl",
    "--data support_desk": "--data queries.jsonl",
    "risk=0.2": "risk=0.9, level=0.5, coverage=0.6, false_alarm=0.3",
    '"127.0.0.1", 8000': '"127.0.0.1", 0',
    "--validation 0.25": "--validation 0.5",
    "--validation 0.2 ": "--validation 0.5 ",
    "--temperature-folds 5": "--temperature-folds 2",
}
# Numbers of steps in Python, which a test of what is learnt leaves.
STEPS = re.compile(r"\b(?:max_)?steps=\d+")


class Reader:
    """Runs blocks in order, in the current folder and in one namespace; `close` stops what serves."""

    def __init__(self, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.namespace, self.address = namespace, "localhost:8000"
        self._packages: set[str] = set()
        self._patch = monkeypatch
        self._servers: list[Server] = []
        self._threads: list[Thread] = []
        servers = self._servers

        class Kept(Server):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                servers.append(self)

        monkeypatch.setattr(server, "Server", Kept)

    def run(self, block: Block, all_steps: bool = False) -> None:
        code = block.code if all_steps else STEPS.sub(lambda found: f"{found[0].partition('=')[0]}=2", block.code)
        for old, new in INSTEAD.items():
            code = code.replace(old, new)
        if block.language == "python" and (file := re.match(r"# (\w+)/\w+\.py\n", code)):
            self._write(Path(file[0][2:].strip()), code)
            return
        kinds = {
            "python": self._python,
            "sh": self._shell,
            "yaml": self._yaml,
            "json": self._json,
            "toml": self._install,
        }
        assert block.language in kinds, f"{block.place}: no way to run {block.language!r}"
        kinds[block.language](code, block)

    def close(self) -> None:
        for running in self._servers:
            running.handle_exit(15, None)
        for thread in self._threads:
            thread.join(30)
        for name in [name for name in sys.modules if name.partition(".")[0] in self._packages]:
            del sys.modules[name]
        if self._packages:
            forget_other_packages()

    def _write(self, file: Path, code: str) -> None:
        """A module of a package that the page writes."""
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
        self._packages.add(file.parent.name)
        importlib.invalidate_caches()
        forget_other_packages()

    def _install(self, code: str, block: Block) -> None:
        """What pip leaves of a pyproject.toml: the package's name and entry points, in a folder on Python's path."""
        name = re.search(r'^name = "(.+)"$', code, re.MULTILINE)
        assert name, block.place
        folder = Path(f"{name[1].replace('-', '_')}-1.0.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name[1]}\nVersion: 1.0\n")
        groups = code[code.index("[project.entry-points") :]
        groups = re.sub(r'^\[project\.entry-points\."(.+)"\]$', r"[\1]", groups, flags=re.MULTILINE)
        (folder / "entry_points.txt").write_text(groups.replace('"', ""), encoding="utf-8")
        self._patch.syspath_prepend(str(Path.cwd()))

    def _python(self, code: str, block: Block) -> None:
        # Lines before it, so that a traceback has the page's line.
        compiled = compile("\n" * block.line + code.replace("localhost:8000", self.address), block.page, "exec")
        if "run_server(" in code:
            self._serve(lambda: exec(compiled, self.namespace))
        else:
            exec(compiled, self.namespace)

    def _yaml(self, code: str, block: Block) -> None:
        if "datasets" in yaml.safe_load(code):
            Path("block.yaml").write_text(code, encoding="utf-8")
            read_study("block.yaml")

    def _json(self, code: str, block: Block) -> None:
        whole = code.replace(", …", "").replace("…, ", "")
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(whole)
            return
        for line in whole.splitlines():
            json.loads(line)

    def _shell(self, code: str, block: Block) -> None:
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("localhost:8000", self.address), comments=True)
            stdin = ""
            if "|" in words:
                at = words.index("|")
                assert words[0] == "echo", f"{block.place}: {line}"
                stdin, words = " ".join(words[1:at]) + "\n", words[at + 1 :]
            if words:
                self._command(words, stdin, f"{block.place}: {line}")

    def _command(self, words: list[str], stdin: str, place: str) -> None:
        program, *arguments = words
        if program == "bloblora":
            more = QUICK.get(arguments[0], [])
            wrong = [name for place, names in WITHOUT.items() if place in arguments for name in names]
            pairs = zip(more[::2], more[1::2], strict=True)
            command = [*arguments, *(word for pair in pairs if pair[0] not in wrong for word in pair)]
            if command[0] == "serve":
                self._serve(lambda: main(command))
                return
            self._patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            try:
                main(command)
            except SystemExit as exit_:
                pytest.fail(f"{place}: exit status {exit_.code}")
        elif program == "curl":
            words += ["--silent", "--fail-with-body"]
            found = subprocess.run(words, capture_output=True, text=True, check=False)
            assert found.returncode == 0, f"{place}: {found.stdout}{found.stderr}"
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(arguments) <= set(targets), place
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), place  # they have tests of their own
        elif (program, *arguments[:1]) == ("pip", "install"):
            known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert set(re.findall(r"\[([\w,]+)\]", " ".join(arguments))) <= set(known), place
        else:
            pytest.fail(f"{place}: nothing knows how to run {program!r}; see tests/docs/reader.py, or mark the block")

    def _serve(self, start: Any) -> None:
        """In a thread, until the page ends; later blocks ask this server."""
        before = len(self._servers)
        thread = Thread(target=start, daemon=True)
        thread.start()
        self._threads.append(thread)
        while len(self._servers) == before or not self._servers[-1].started:
            thread.join(0.02)
            assert thread.is_alive(), "the server ended"
        self.address = self._servers[-1].url.removeprefix("http://")


def forget_other_packages() -> None:
    """Registries look for other packages' entry points again, as a new process does."""
    for registry in (METHODS, PRIORS, TASKS, METRICS):
        vars(registry).pop("_others", None)
        for name in registry._loaded.keys() - registry._own.keys():
            del registry._loaded[name]

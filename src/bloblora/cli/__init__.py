"""The command line: its options are derived from functions and dataclasses; it parses, calls, prints."""

import ast
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from importlib.metadata import entry_points, version
from keyword import iskeyword
from pathlib import Path
from typing import Any, NoReturn

from ..files import cache_folder, write_text
from ..messages import escaped, quoted

_DESCRIPTION = """usage: bloblora COMMAND [options]

Bayesian low-rank adaptation for language models: LoRA that knows what it does not know.

  bloblora demo
  bloblora train --data queries.jsonl --output runs/desk
  bloblora evaluate runs/desk --data test.jsonl --ood other.jsonl
  bloblora calibrate runs/desk --data held_out.jsonl --risk 0.1
  echo '{"text": "where is my parcel"}' | bloblora predict runs/desk --input -

Every option can be in a YAML file (--config FILE); a run's own is saved beside it as config.yaml."""

COMMANDS: Mapping[str, str] = {
    "train": "train",
    "calibrate": "calibrate",
    "evaluate": "predict",
    "predict": "predict",
    "generate": "text",
    "score": "text",
    "correctness": "text",
    "serve": "serve",
    "import": "share",
    "export": "share",
    "card": "share",
    "push": "share",
    "demo": "demo",
    "compare": "study",
    "report": "study",
    "tune": "study",
    "methods": "about",
    "info": "about",
}
"""The commands, and the modules of this package that hold their functions."""

_SOURCES = (".py", ".yaml")
_KEPT = {
    **dict.fromkeys(("train", "demo", "compare", "tune"), "the last checkpoint"),
    **dict.fromkeys(("calibrate", "evaluate", "score"), "the predictions that were kept"),
}
"""What a command that was stopped continues from."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 2 and one message where an argument, a file or a model is wrong."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or [""]
    try:
        if command in ("-h", "--help"):
            print(_help())
        elif command == "--version":
            print(f"bloblora {version('bloblora')}")
        elif command not in COMMANDS:
            fail("", f"a command must be one of {', '.join(COMMANDS)}, got {quoted(command)}; see bloblora --help")
        elif {"-h", "--help", "--help-all"} & {*rest}:
            _show_help(command, rest)
        else:
            _run(command, rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has gone; Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(command, "standard output was closed before everything was written")
    except (ValueError, OSError, FloatingPointError) as error:
        fail(command, "\n".join(filter(None, (str(error), getattr(error, "advice", "")))))
    except KeyboardInterrupt:
        again = f"; run the same command again to continue from {_KEPT[command]}" if command in _KEPT else ""
        print(f"\nstopped{again}", file=sys.stderr)
        sys.exit(130)


def fail(command: str, message: str) -> NoReturn:
    """One message on standard error, exit status 2."""
    print(f"bloblora {command}".rstrip() + f": error: {escaped(message)}", file=sys.stderr)
    sys.exit(2)


def _run(command: str, arguments: Sequence[str]) -> None:
    _quiet()
    with _one_voice():
        from .options import parsed

        function = getattr(import_module(f".{COMMANDS[command]}", __name__), command + "_" * iskeyword(command))
        options = parsed(command, function, arguments)
        from transformers.utils.logging import disable_progress_bar  # after the parser, which may only show the help

        disable_progress_bar()
        function(**options)


def _show_help(command: str, arguments: Sequence[str]) -> None:
    """Print the options of a command, from the cache where the same was asked before.

    The options of a training are those of PEFT and Transformers too, whose imports take seconds.
    """
    file = _kept_help(command, arguments)
    if file is not None and file.is_file():
        print(file.read_text(encoding="utf-8"), end="")
        sys.exit()  # as the parser does
    shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            _run(command, arguments)
    except SystemExit as end:
        if file is not None and not end.code:
            with suppress(OSError):  # a folder that can't be written costs time alone
                write_text(file, shown.getvalue())
        raise
    finally:
        print(shown.getvalue(), end="")


def _kept_help(command: str, arguments: Sequence[str]) -> Path | None:
    """Where the help for these arguments is kept; None where more decides it: a file, or methods of other packages."""
    if any(argument.startswith("--config") for argument in arguments):
        return None
    if any(group.startswith("bloblora.") for group in entry_points().groups):
        return None
    changed = [file.stat().st_mtime_ns for file in Path(__file__).parents[1].rglob("*") if file.suffix in _SOURCES]
    versions = [version(name) for name in ("bloblora", "peft", "transformers", "jsonargparse")]
    columns = shutil.get_terminal_size().columns
    key = json.dumps([command, *arguments, columns, sys.version, versions, len(changed), max(changed)])
    with suppress(OSError):  # without a home there is no cache
        return cache_folder() / "help" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.txt"
    return None


def _help() -> str:
    """What the commands are, by the first lines of their functions, which aren't imported: that takes seconds."""
    lines: dict[str, str] = {}
    for module in dict.fromkeys(COMMANDS.values()):
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        lines |= {node.name.rstrip("_"): (ast.get_docstring(node) or "").partition("\n")[0] for node in functions}
    commands = "\n".join(f"  {command:<11} {lines[command]}" for command in COMMANDS)
    return f"{_DESCRIPTION}\n\ncommands, each with --help:\n{re.sub('``', '`', commands)}"


class _Voice(logging.Handler):
    """Notes and warnings as lines on standard error, each once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.say(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())

    def warn(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """In place of `warnings.showwarning`."""
        self.say(f"warning: {message}")

    def say(self, line: str) -> None:
        line = escaped(line)
        if line not in self._said:
            self._said.add(line)
            bars = sys.modules.get("tqdm")  # which it moves out of the way
            (bars.tqdm.write if bars else print)(line, file=sys.stderr)


@contextmanager
def _one_voice() -> Iterator[None]:
    """The library's log and Python's warnings as lines of one form."""
    log, voice, show = logging.getLogger("bloblora"), _Voice(), warnings.showwarning
    before = log.level, log.propagate
    log.addHandler(voice)
    log.setLevel(logging.INFO)
    log.propagate, warnings.showwarning = False, voice.warn
    try:
        yield
    finally:
        log.removeHandler(voice)
        log.setLevel(before[0])
        log.propagate, warnings.showwarning = before[1], show


def _quiet() -> None:
    """Keep the libraries' own notes out of what a person reads."""
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
    logging.getLogger("torchao").setLevel(logging.ERROR)

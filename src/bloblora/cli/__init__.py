"""The command line: parses, calls, prints."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn

_DESCRIPTION = """Bayesian low-rank adaptation for language models: LoRA that knows what it does not know.

  bloblora demo
  bloblora train --data queries.jsonl --output runs/desk
  bloblora evaluate runs/desk --data test.jsonl --ood other.jsonl
  bloblora calibrate runs/desk --data held_out.jsonl --risk 0.1
  echo '{"text": "where is my parcel"}' | bloblora predict runs/desk --input -

Every option can stand in a YAML file (--config FILE); a run's own is saved beside it as config.yaml."""
_FLAGS = {
    "json": "print JSON, for programs",
    "dry_run": "only list the runs and whether they are done",
    "private": "make a private repository",
    "update": "commit to a repository that exists already",
}
_RESUMABLE = ("train", "demo", "compare")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 2 and one message where an argument, a file or a model is wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    try:
        _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has gone; Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(command, "standard output was closed before everything was written")
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(command, str(error))
    except KeyboardInterrupt:
        again = "; run the same command again to go on from the last checkpoint" if command in _RESUMABLE else ""
        print(f"\nstopped{again}", file=sys.stderr)
        sys.exit(130)


def _run(arguments: list[str]) -> None:
    _quiet()
    from argparse import RawDescriptionHelpFormatter

    import jsonargparse
    from jsonargparse import DefaultHelpFormatter, Namespace

    from . import commands

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Descriptions keep their lines."""

    class ArgumentParser(jsonargparse.ArgumentParser):
        """Errors are one message, and options are shown as they are usually written, --with-dashes."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            command = self.prog.replace(" [options]", "")
            _fail(command.removeprefix("bloblora").strip(), f"{_plain(message)}; see {command} --help")

        def format_help(self, *args: Any) -> str:
            return _dashed(super().format_help(*args))

    parser = ArgumentParser(
        prog="bloblora", description=_DESCRIPTION, version=commands.version(), formatter_class=Formatter
    )
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, command in commands.COMMANDS.items():
        description = (command.__doc__ or "").partition("    Args:")[0]
        subparser = ArgumentParser(description=dedent("    " + description), formatter_class=Formatter)
        if "directory" in command.__annotations__:
            optional: dict[str, Any] = {"nargs": "?", "default": None} if name == "info" else {}
            what = "folder of a study's results" if name == "report" else "folder of a run"
            subparser.add_argument("directory", type=str, help=what, **optional)
        if "directories" in command.__annotations__:
            subparser.add_argument("directories", type=str, nargs="+", help="folders of runs, or NAME=FOLDER")
        if "study" in command.__annotations__:
            subparser.add_argument("study", type=str, help="YAML file of a study")
        skip: set[str | int] = {"directory", "directories", "study", *_FLAGS}
        subparser.add_function_arguments(command, skip=skip, as_group=False, as_positional=False)
        for flag in _FLAGS.keys() & command.__annotations__.keys():
            subparser.add_argument(f"--{flag}", action="store_true", help=_FLAGS[flag])
        subparser.add_argument("--config", action="config", help="YAML file with options; later options override it.")
        subcommands.add_subcommand(name, subparser, help=description.splitlines()[0])
    parsed = parser.parse_args(_normalized(arguments))
    options = Namespace(parsed[parsed.subcommand])
    options.pop("config", None)
    commands.COMMANDS[parsed.subcommand](**options.as_dict())


def preset_file(name: str) -> str:
    """Path of a preset's YAML, for ``--config``.

    Raises:
        SystemExit: there is no such preset.
    """
    folder = Path(__file__).parent / "presets"
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        _fail("", f"--preset {name!r} is not one of {known}")
    return str(folder / f"{name}.yaml")


def _fail(command: str, message: str) -> NoReturn:
    """One message on standard error, exit status 2."""
    print(f"bloblora {command}".rstrip() + f": error: {message}", file=sys.stderr)
    sys.exit(2)


def _plain(message: str) -> str:
    """The parser's message in the words of the command line, on one line."""
    message = re.sub(r'Parser key "([^"]+)":', lambda match: f"--{match[1]}:", message.strip())
    # of an option that may be left out, only the kind that it may be given as
    kind = r"Does not validate against any of the Union subtypes.*?Errors:\s*- (.*?)\s*- Expected a <class 'NoneType'>"
    message = re.sub(kind + r".*?Given value:", r"\1. Got value:", message, flags=re.DOTALL)
    message = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", message)
    message = re.sub(r"Expected a typing\.Literal\[([^]]*)\]", r"expected one of \1", message)
    return re.sub(r"\s+", " ", _dashed(message)).rstrip(".")


def _dashed(text: str) -> str:
    """Options with dashes, and code in single backticks."""
    return re.sub(r"--[a-z]+(?:_[a-z]+)+", lambda match: match[0].replace("_", "-"), text).replace("``", "`")


def _normalized(arguments: Sequence[str]) -> list[str]:
    """``--learning-rate`` as ``--learning_rate``, and ``--preset NAME`` as the YAML that it stands for, put first."""
    result: list[str] = []
    presets: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name == "--preset":
            presets += ["--config", preset_file(value if equals else next(pending, ""))]
        elif name.startswith("--"):
            result.append(name[:2] + name[2:].replace("-", "_") + equals + value)
        else:
            result.append(argument)
    return result[:1] + presets + result[1:]


def _quiet() -> None:
    """Keep the libraries' own notes out of what a person reads."""
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
    logging.getLogger("torchao").setLevel(logging.ERROR)

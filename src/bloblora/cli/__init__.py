"""The command line: parses, calls, prints."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

_DESCRIPTION = """Bayesian low-rank adaptation for language models: LoRA that knows what it does not know.

  bloblora demo
  bloblora train --data queries.jsonl --output runs/desk
  bloblora evaluate runs/desk --data held_out.jsonl --ood other.jsonl
  echo '{"text": "where is my parcel"}' | bloblora predict runs/desk --input -

Every option can stand in a YAML file (--config FILE); a run's own is saved beside it as config.yaml."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 2 and one message where an argument, a file or a model is wrong."""
    _quiet()
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

    from . import commands

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Descriptions keep their lines."""

    parser = ArgumentParser(
        prog="bloblora", description=_DESCRIPTION, version=commands.version(), formatter_class=Formatter
    )
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, command in commands.COMMANDS.items():
        description = (command.__doc__ or "").partition("    Args:")[0]
        subparser = ArgumentParser(description=dedent("    " + description), formatter_class=Formatter)
        if "directory" in command.__annotations__:
            optional: dict[str, Any] = {"nargs": "?", "default": None} if name == "info" else {}
            subparser.add_argument("directory", type=str, help="folder of a run", **optional)
        subparser.add_function_arguments(command, skip={"directory", "json"}, as_positional=False)
        if "json" in command.__annotations__:
            subparser.add_argument("--json", action="store_true", help="print JSON, for programs")
        subparser.add_argument("--config", action="config", help="YAML file with options; later options override it.")
        subcommands.add_subcommand(name, subparser, help=description.splitlines()[0])
    parsed = parser.parse_args(_normalized(sys.argv[1:] if arguments is None else arguments))
    options = Namespace(parsed[parsed.subcommand])
    options.pop("config", None)
    try:
        commands.COMMANDS[parsed.subcommand](**options.as_dict())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"bloblora {parsed.subcommand}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def preset_file(name: str) -> str:
    """Path of a preset's YAML, for ``--config``.

    Raises:
        SystemExit: there is no such preset.
    """
    folder = Path(__file__).parent / "presets"
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        print(f"bloblora: error: --preset {name!r} is not one of {known}", file=sys.stderr)
        sys.exit(2)
    return str(folder / f"{name}.yaml")


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

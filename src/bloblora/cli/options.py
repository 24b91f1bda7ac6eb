"""Options of commands, derived: from a function's parameters, and from the fields of the dataclasses among them."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import dedent, fill
from typing import Any, Literal, NoReturn, get_type_hints

import docstring_parser
import jsonargparse
import yaml
from jsonargparse import DefaultHelpFormatter
from peft import LoraConfig

from .. import tasks
from ..data import ReadingOptions
from ..files import parse_yaml, regular
from ..messages import LONGEST
from ..methods import METHODS
from ..runs.config import (
    LORA,
    SHORT,
    TRAINING,
    RunConfig,
    RunError,
    default_of,
    options_of,
    presets,
    read_preset,
    unknown_option,
)
from ..training import BlobTrainingArguments
from . import fail

_POSITIONAL: dict[str, Any] = {"directory": {}, "directories": {"nargs": "+"}, "study": {}}
_GROUPS = {
    "run": "data, model and run",
    "reading": "columns of the data",
    "task": "task",
    "method": "method {method}",
    "lora": "LoRA: the options of peft.LoraConfig",
    "training": "training: the options of transformers.TrainingArguments",
}


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Descriptions keep their lines."""


class _Parser(jsonargparse.ArgumentParser):
    """Errors are one message, and options are shown as they are usually written, --with-dashes."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(self.prog.removeprefix("bloblora "), f"{_plain(message)}; see {self.prog} --help")

    def format_help(self, *args: Any) -> str:
        return _dashed(super().format_help(*args))


def parsed(command: str, function: Callable[..., None], arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command's function, from those of its command line."""
    arguments = _normalized(arguments)
    everything = "--help_all" in arguments
    doc = docstring_parser.parse(function.__doc__ or "")
    description = (function.__doc__ or "").partition("    Args:")[0]
    parser = _Parser(prog=f"bloblora {command}", description=dedent("    " + description), formatter_class=_Formatter)
    helps = {parameter.arg_name: parameter.description or "" for parameter in doc.params}
    hints, sections = get_type_hints(function), {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if kind is RunConfig:
            sections[name] = _add_run(parser, arguments, everything)
        elif is_dataclass(kind):
            of_kind = get_type_hints(kind)
            for option in fields(kind):
                _add(parser, option.name, of_kind[option.name], _default(option), option.metadata["help"])
            sections[name] = [option.name for option in fields(kind)]
        elif name in _POSITIONAL:
            optional: Any = {"nargs": "?", "default": None} if parameter.default is None else {}
            parser.add_argument(name, type=str, help=helps[name], **_POSITIONAL[name], **optional)
        elif kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=helps[name])
        else:
            _add(parser, name, kind, parameter.default, helps[name])
    parser.add_argument("--config", action="config", help="YAML file with options; later options override it.")
    if of_run := RunConfig in hints.values():
        parser.add_argument("--help_all", action="help", help="show also the rarer options of LoRA and the Trainer")
        _check_known(arguments, parser)
    shown = of_run and "--print_config" in arguments
    values = parser.parse_args([a for a in arguments if not (shown and a == "--print_config")]).as_dict()
    values.pop("config", None)
    values.pop("help_all", None)
    for name, names in sections.items():
        given = {option: values.pop(option) for option in names if option in values}
        kind = hints[name]
        values[name] = RunConfig.of(**given) if kind is RunConfig else kind(**given)
        if shown:
            print(yaml.safe_dump(values[name].given(), sort_keys=False, allow_unicode=True), end="")
            parser.exit()
    return values


def _check_known(arguments: Sequence[str], parser: Any) -> None:
    """Raise a RunError for an option that a run doesn't have, which says more than the parser's own error."""
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    given = [a[2:].partition("=")[0] for a in arguments if a.startswith("--")]
    files = [content for option, content in pairwise(arguments) if option == "--config"]
    given += [name for content in files for name in json.loads(content)]
    problems = [unknown_option(n, known, _chosen(arguments)[0]) for n in given if n.partition(".")[0] not in known]
    if problems:
        raise RunError("\n".join(problems) + f"; see {parser.prog} --help")


def _add(parser: Any, name: str, kind: Any, default: Any, text: str, *, shown: str | None = None) -> None:
    names = [f"--{name}", *(f"--{short}" for short, long in SHORT.items() if long == name)]
    if kind is not str and "Config" in str(kind):  # a configuration of PEFT's or accelerate's: its fields, as a mapping
        kind = dict | None
    options = {"required": True} if default is inspect.Parameter.empty else {"default": default}
    text = re.sub(r"\s+", " ", text).strip()
    if shown is not None:
        options, text = {"default": argparse.SUPPRESS}, f"{text} (default: {shown})" if text else text
    if kind is bool:  # --name alone, or with true or false
        options |= {"nargs": "?", "const": True}
    help_ = argparse.SUPPRESS if shown is not None and not text else text.replace("%", "%%")
    parser.add_argument(*names, type=kind, help=help_, **options)


def _add_run(parser: Any, arguments: Sequence[str], everything: bool) -> list[str]:
    """Add the options of a run with the method and the task that the arguments name; returns their names.

    None has a default here: what is given is what the run's configuration holds.
    """
    method, task = _chosen(arguments)
    usual = {*TRAINING, *METHODS[method].training_defaults, *LORA, "num_train_epochs"}
    names = ["method", "task", "preset"]
    for place, options in options_of(method, task).items():
        group = parser.add_argument_group(_GROUPS[place].format(method=method))
        if place == "method":
            _add(group, "method", str, None, f"One of {', '.join(METHODS)} (`bloblora methods`).", shown="blob")
            _add(group, "preset", str, None, f"Options of a paper: {', '.join(presets())}; others win.", shown="none")
        if place == "task":
            _add(group, "task", str, None, "How records become logits, see docs/concepts.md.", shown="auto")
        rare, hints = [], _hints(place, method, task)
        for name, option in options.items():
            text = option.metadata.get("help", "")
            if place in ("lora", "training") and name not in usual and not everything:
                rare.append(name)
                text = ""
            required = option.default is MISSING and option.default_factory is MISSING
            shown = "required" if required else str(default_of(option, method))
            _add(group, name, hints[name], None, text, shown=shown)
        if rare:
            group.description = fill(f"--help-all describes also {', '.join(rare)}.", 80, break_on_hyphens=False)
        names += options
    return names


def _hints(place: str, method: str, task: str) -> dict[str, Any]:
    if place == "task":
        kinds = [tasks.TASKS[task]] if task in tasks.TASKS else [*tasks.TASKS.values()]
        return {option.name: get_type_hints(kind)[option.name] for kind in kinds for option in fields(kind)}
    kinds_ = {
        "run": RunConfig,
        "reading": ReadingOptions,
        "method": METHODS[method],
        "lora": LoraConfig,
        "training": BlobTrainingArguments,
    }
    hints = get_type_hints(kinds_[place])
    return hints | {n: hints[n] | Literal["auto"] for n, value in TRAINING.items() if value == "auto" and n in hints}


def _chosen(arguments: Sequence[str]) -> tuple[str, str]:
    """The method and the task that arguments name, themselves or by a file or a preset."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("method", "task", "preset"):
        peek.add_argument(f"--{name}")
    peek.add_argument("--config", action="append", default=[])
    known = peek.parse_known_args(list(arguments))[0]
    chosen: dict[str, Any] = {"method": "blob", "task": "auto"}
    for options in (*map(json.loads, known.config), vars(known)):
        preset = read_preset(options["preset"]) if options.get("preset") else {}
        for source in (preset, options):
            for name in chosen:
                value = source.get(name)
                chosen[name] = (value.get("name") if isinstance(value, dict) else value) or chosen[name]
    METHODS.find(chosen["method"], "method", RunError)
    return chosen["method"], chosen["task"]


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return inspect.Parameter.empty if option.default is MISSING else option.default


def _normalized(arguments: Sequence[str]) -> list[str]:
    """``--learning-rate`` as ``--learning_rate``, and files of options as what they hold, its sections unfolded."""
    result: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name == "--config":
            result += [name, json.dumps(_read_options(value if equals else next(pending, "")))]
        elif name.startswith("--"):
            result.append(name[:2] + name[2:].replace("-", "_") + equals + value)
        else:
            result.append(argument)
    return result


def _read_options(file: str) -> dict[str, Any]:
    """The options in a YAML file, each by its name alone."""
    try:
        content = parse_yaml(regular(Path(file)).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError) as error:
        raise RunError(f"--config {file}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"--config {file}: must hold a mapping of names to values, got {type(content).__name__}")
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if name in _GROUPS and isinstance(value, dict):
            flat |= {option if option != "name" else name: item for option, item in value.items()}
        else:
            flat[name] = value
    if "trust_remote_code" in flat:  # it may be a file of someone else's
        raise RunError(f"--config {file}: trust_remote_code isn't taken from a file; give it on the command line")
    return flat


def _plain(message: str) -> str:
    """The parser's message in the words of the command line, on one line."""
    message = re.sub(r'Parser key "([^"]+)":', lambda match: f"--{match[1]}:", message.strip())
    union = r"Does not validate against any of the Union subtypes.*?Errors:\s*- "
    # of an option that may be left out, only the kind that it may be given as
    optional = union + r"(.*?)\s*- Expected a <class 'NoneType'>.*?Given value:"
    message = re.sub(optional, r"\1. Got value:", message, flags=re.DOTALL)
    number_or_word = union + r"(Expected a <class '\w+'>)\s*- Expected a typing\.Literal\[(.*?)\].*?Given value:"
    message = re.sub(
        number_or_word, lambda match: f"{match[1]} or {match[2].replace(', ', ' or ')}. Got value:", message, flags=re.S
    )
    message = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", message)
    message = re.sub(r"Expected a typing\.Literal\[([^]]*)\]", r"expected one of \1", message)
    message = re.sub(r"\s+", " ", _dashed(message)).rstrip(".")
    message = re.sub(rf"(\S{{{LONGEST}}})\S+", r"\1…", message)
    return re.sub(rf"(value: .{{{LONGEST}}}).+", r"\1…", message)  # the parser ends with it


def _dashed(text: str) -> str:
    """Options with dashes, and code in single backticks."""
    return re.sub(r"--[a-z]+(?:_[a-z0-9]+)+", lambda match: match[0].replace("_", "-"), text).replace("``", "`")

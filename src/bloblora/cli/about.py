"""What there is: methods, versions, what a run's folder holds."""

import os
import platform
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from .. import runs
from ..adapter import find_posterior, library_versions
from ..files import cache_folder
from ..methods import METHODS
from ..runs.config import default_of
from .common import dumped
from .train import posterior_summary


def methods(json: bool = False) -> None:
    """List the methods that `--method` takes: what each is, its paper and its options.

    Examples:
      bloblora methods

    Args:
        json: print JSON.
    """
    rows: dict[str, dict[str, Any]] = {
        name: {
            "summary": _first_line(sys.modules[method.__module__].__doc__),
            "paper": f"arXiv {method.paper}",
            "options": {
                option: {"default": default_of(field, name), "help": field.metadata["help"]}
                for option, field in method.options().items()
            },
        }
        for name, method in METHODS.items()
    }
    if json:
        print(dumped(rows))
        return
    table = Table(Column("method", no_wrap=True), "what it is", "options and defaults", show_lines=True)
    for name, row in rows.items():
        options = ", ".join(f"{key} = {value['default']}" for key, value in row["options"].items())
        table.add_row(Text(name), Text(f"{row['summary']}\n{row['paper']}"), Text(options))
    Console().print(table)


def info(code: runs.CodeOptions, directory: str | None = None, json: bool = False) -> None:
    """Show versions and the machine, or what a run's folder holds: settings, labels, posterior, training.

    Examples:
      bloblora info
      bloblora info runs/desk

    Args:
        code: of the base model.
        directory: folder of a run.
        json: print JSON.
    """
    if directory is None:
        result: dict[str, Any] = {
            **library_versions(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "cuda": torch.cuda.is_available(),
            "cache": _cache(),
        }
    else:
        run = runs.load_run(directory, trust_remote_code=code.trust_remote_code)
        posterior = find_posterior(run.model)
        result = {
            "config": run.config.given(),
            "task": run.task.to_dict(),
            "posterior": {**posterior.config.to_dict(), **(posterior_summary(run) or {})} if posterior else None,
            "training": run.training,
        }
    if json:
        print(dumped(result))
    else:
        Console().print_json(dumped(result))


def _cache() -> str | None:
    try:
        return str(cache_folder())
    except OSError:  # there is no home
        return None


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]

"""What the benchmarks of this folder share: options, timing side by side, and how results are kept."""

import argparse
import json
import multiprocessing
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bloblora.files import read_json, write_text
from bloblora.studies.job import rounded

RESULTS = Path(__file__).parents[1] / "results"
FILE = "results.json"


def parser_of(description: str | None, results: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring and has ``--results``, by default a folder below results/."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / results, help="folder of what is written")
    return parser


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result, from a process of its own: its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def times(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function; in each round all take turns, in a random order."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name in random.Random(number).sample([*functions], len(functions)):
            start = time.perf_counter()
            functions[name]()
            if number:  # the first round warms up
                found[name].append(time.perf_counter() - start)
    return found


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, list[float]]:
    """Each function's time over that of ``base`` in the same round."""
    return {name: [a / b for a, b in zip(values, seconds[base], strict=True)] for name, values in seconds.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "lower quartile": quartiles[0], "upper quartile": quartiles[2]}


def kept(folder: Path) -> dict[str, Any]:
    """What a folder's results.json holds; empty where there is none."""
    return read_json(folder / FILE, ValueError) if (folder / FILE).is_file() else {}


def keep(folder: Path, results: Mapping[str, Any], text: str | None = None, *, file: str = FILE) -> None:
    """Write results.json, floats to five digits and lists of numbers in a line, and README.md where there is a text."""
    content = json.dumps(rounded(dict(results)), indent=1, ensure_ascii=False)
    content = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", content)
    write_text(folder / file, content + "\n")
    if text is not None:
        write_text(folder / "README.md", text)

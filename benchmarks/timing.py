"""Timing of functions side by side, for the benchmarks of this folder."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def times(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function; in each round all take turns, in another order."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    names = [*functions]
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
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

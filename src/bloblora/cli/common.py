"""What the commands on a run share: its folder, its files, and tables of what was promised."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from .. import evaluation, runs
from ..data import ReadingOptions, read_records
from ..files import replacing
from ..messages import quoted
from ..runs import PredictionOptions, RunDescription, RunError, open_run
from ..runs.lines import lines_file, write_table
from ..runs.outcome import log


def dumped(content: Any) -> str:
    """JSON as people read it."""
    return jsonlib.dumps(content, indent=2, ensure_ascii=False)


def opened(directory: str, options: PredictionOptions | None = None) -> RunDescription:
    """The description of a run whose method allows the approximation; the warnings of its training are repeated."""
    description = open_run(directory)
    if options is not None:
        options.check(description.method, description.task)
    for problem in description.training.get("warnings", ()):
        log.warning(f"this run: {problem}")
    return description


def check_files(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None]) -> None:
    """Raise a RunError for a file that can't be written, or is also read, or written for another option.

    And for two inputs of one stream.
    """
    if len(piped := [f"--{name}" for name, file in inputs.items() if file == "-"]) > 1:
        raise RunError(f"{' and '.join(piped)} '-': standard input is read once; give a file for one of them")
    others = {name: file for name, file in inputs.items() if file not in (None, "-")}
    for name, file in outputs.items():
        if file == "-":  # which as an input is no file of that name either
            raise RunError(f"--{name} '-': only an input can be so; leave it out, or give a file")
        for other, there in others.items():
            if file is not None and there is not None and _is_same(Path(file), Path(there)):
                raise RunError(f"--{name} {quoted(file)}: is the same file as --{other} {quoted(there)}; give another")
        if file is not None:
            runs.check_writable(file)
            others[name] = file


def _is_same(file: Path, other: Path) -> bool:
    return file.resolve() == other.resolve() or (file.exists() and other.exists() and file.samefile(other))


def read_for(
    description: RunDescription, data: str, ood: str | None, reading: ReadingOptions
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Labelled records in scope and records out of it, once they fit the run."""
    records = read_records(data, reading, known=description.known)
    known = replace(description.known, columns={**description.columns, **reading.columns()})
    skip = ReadingOptions(skip_invalid=reading.skip_invalid)
    outside = read_records(ood, skip, known=known, require_labels=False) if ood else None
    for source, side in ((data, records), (ood, outside)):
        with named(source):
            if side is not None:
                runs.check_kind(description.task, side)
    with named(data):
        runs.targets_of(description.task, records)
    return records, outside


@contextmanager
def named(source: str | None) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{source}: {error}") from error


def write_described(
    source: str,
    output: str | None,
    batches: Iterable[list[dict[str, Any]]],
    check: Callable[[list[dict[str, Any]]], None],
    load: Callable[[], runs.Run],
    describe: Callable[[runs.Run, list[dict[str, Any]]], Iterator[dict[str, Any]]],
) -> None:
    """Write a line for each record of ``source``; the run is loaded once the first batch has been checked."""
    run = None
    lines = None if output is None else lines_file(Path(output))
    with _alone(output, lines):
        with _writing(runs.part_of(lines) if lines else None) as handle:
            for records in batches:
                with named(source):
                    check(records)
                run = run or load()
                _write_lines(handle, describe(run, records))
        if lines:
            runs.join_parts(lines)
            if runs.processes().is_main_process:
                _as_table(lines, output)


@contextmanager
def _alone(output: str | None, lines: Path | None) -> Iterator[None]:
    """The locks of what this process writes: its part of the lines, and where it is the first all that they become."""
    with ExitStack() as stack:
        if output and lines:
            joined = [Path(output), lines] if runs.processes().is_main_process else []
            for file in dict.fromkeys([*joined, runs.part_of(lines)]):
                stack.enter_context(runs.alone(file))
        yield


@contextmanager
def _writing(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is complete."""
    if output is None:
        yield sys.stdout
        return
    with replacing(output) as partial, partial.open("w", encoding="utf-8") as handle:
        yield handle


def _as_table(lines: Path, output: str | None) -> None:
    """Make the table of its lines, and remove these, where the output is one."""
    if output is not None and lines != Path(output):
        try:
            write_table(lines, Path(output))
        finally:
            lines.unlink()


def _write_lines(handle: TextIO, lines: Iterator[dict[str, Any]]) -> None:
    for line in lines:
        handle.write(jsonlib.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    handle.flush()


def realized(decision: dict[str, Any], result: dict[str, Any], title: str) -> Table:
    """What was promised and what became of it, of the rules that are there."""
    sets = {"answer_sets": "sets with a right answer", "tag_sets": "texts with all right tags in their sets"}
    of_sets = next((name for name in sets if name in decision), "label_sets")
    promised = {
        "selective_risk": ("answering", "≤", "risk"),
        "set_coverage": (of_sets, "≥", "coverage"),
        "false_alarm": ("scope", "≤", "false_alarm"),
        "promised_coverage": ("intervals", "≥", "coverage"),
        "recall": ("label_thresholds", "≥", "coverage"),
    }
    names = {
        "answered": "answered",
        "selective_risk": "errors among answers",
        "set_coverage": sets.get(of_sets, "sets with the right label"),
        "set_size": "tags a set" if of_sets == "tag_sets" else "labels a set",
        "false_alarm": "flagged in scope",
        "detection": "flagged out of scope",
        "promised_coverage": "intervals with the right value",
        "promised_width": "width of an interval",
        "recall": "labels named where they are right",
        "least_recall": "the same of the worst label",
        "named": "labels named",
    }
    table = Table("", "promised", "realized", title=title)
    for name in (name for name in names if name in result):
        rule, sign, option = promised.get(name, ("", "", ""))
        promise = f"{sign} {decision[rule][option]:.4g}" if rule else ""
        table.add_row(names[name], promise, evaluation.metric_number(name, result[name]))
    return table

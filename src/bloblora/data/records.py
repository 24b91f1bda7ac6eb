"""Reading and checking records.

A record is a plain dict: ``{"text", "label"}`` for classification, ``{"question", "choices", "answer"}`` for multiple
choice with ``answer`` the index of the right choice. For prediction, ``label`` and ``answer`` may be missing.
"""

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import DataError
from .paper import PAPER_SETS, read_paper_set
from .support_desk import support_desk

Record = dict[str, Any]
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_records(source: str | Path, *, require_labels: bool = True) -> list[Record]:
    """Read and check labelled records.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file; a `datasets` folder; ``-`` for JSON lines on standard
            input; ``support_desk``, or a set of the paper such as ``arc_easy`` or ``mmlu/college_physics``, with an
            optional ``:split`` (default train). In CSV, ``choices`` is a JSON list, or columns ``choice_0``,
            ``choice_1``, …
        require_labels: whether each record must have its label or answer.

    Returns:
        The records, all of one kind, with extra fields as they are.

    Raises:
        DataError: lists every problem with file, line, field and value.
    """
    name, _, split = str(source).partition(":")
    if name == "support_desk":
        try:
            return support_desk(split or "train")
        except ValueError as error:
            raise DataError([str(error)]) from error
    if name in PAPER_SETS or name.startswith("mmlu/"):
        return read_paper_set(name, split or "train")
    records, problems = [], []
    for where, row in _rows(str(source)):
        if isinstance(row, str):
            problems.append(f"{where}: {row}")
            continue
        record = _from_columns(row)
        problems += [f"{where}: {problem}" for problem in _problems(record, require_labels)]
        records.append(record)
    if not records and not problems:
        problems = [f"{source}: there are no records in it"]
    if problems:
        raise DataError(problems)
    kind_of(records)
    return records


def kind_of(records: Iterable[Record]) -> str:
    """``classification`` or ``choice``.

    Raises:
        DataError: both kinds, or none.
    """
    kinds = {"classification" if "text" in record else "choice" for record in records}
    if len(kinds) != 1:
        raise DataError(["records of both kinds: some have 'text', some 'question'; keep them in separate files"])
    return kinds.pop()


def _rows(source: str) -> Iterator[tuple[str, Record | str]]:
    """Each row with its place; a text instead of a row says what is wrong with it."""
    path = Path(source)
    if source == "-":
        yield from _json_lines("standard input", sys.stdin)
    elif path.is_dir():
        yield from _dataset_rows(path)
    elif not path.is_file():
        known = ", ".join(["support_desk", *PAPER_SETS, "mmlu/<subject>"])
        raise DataError([f"data {source!r}: no such file or folder, and not one of {known}"])
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from _json_lines(source, lines)
    elif path.suffix == ".json":
        yield from _json_list(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
            for row in reader:
                yield f"{source}:{reader.line_num}", row
    elif path.suffix == ".parquet":
        from datasets import Dataset

        for number, row in enumerate(Dataset.from_parquet(source), start=1):
            yield f"{source}: row {number}", dict(row)
    else:
        raise DataError([f"data {source!r}: the ending {path.suffix!r} is not one of {', '.join(_SUFFIXES)}"])


def _json_lines(source: str, lines: Iterable[str]) -> Iterator[tuple[str, Record | str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = f"not valid JSON: {error.msg} at column {error.colno}"
        yield f"{source}:{number}", row if isinstance(row, (dict, str)) else f"{row!r} is not a JSON object"


def _json_list(path: Path) -> Iterator[tuple[str, Record | str]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError([f"{path}:{error.lineno}: not valid JSON: {error.msg}"]) from error
    if not isinstance(rows, list):
        raise DataError([f"{path}: must hold a list of objects, got {type(rows).__name__}"])
    for number, row in enumerate(rows, start=1):
        yield f"{path}: item {number}", row if isinstance(row, dict) else f"{row!r} is not a JSON object"


def _dataset_rows(path: Path) -> Iterator[tuple[str, Record | str]]:
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError([f"{path}: not a folder that `datasets` saved: {error}"]) from error
    if isinstance(rows, DatasetDict):
        raise DataError([f"{path}: has several splits; give one of {', '.join(str(path / name) for name in rows)}"])
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", dict(row)


def _from_columns(row: Record) -> Record:
    """A table's row as a record: choices from JSON or columns, numbers from text, labels as text."""
    record = {k: v for k, v in row.items() if v is not None and not (v == "" and k in ("label", "answer"))}
    columns = sorted((k for k in record if re.fullmatch(r"choice_\d+", k)), key=lambda k: int(k[7:]))
    if columns and "choices" not in record:
        record["choices"] = [record.pop(column) for column in columns if record[column] != ""]
    elif isinstance(record.get("choices"), str):
        with suppress(json.JSONDecodeError):  # reported with its value by the check that follows
            record["choices"] = json.loads(record["choices"])
    if isinstance(record.get("answer"), str) and record["answer"].strip().isdigit():
        record["answer"] = int(record["answer"])
    if isinstance(record.get("label"), int) and not isinstance(record["label"], bool):
        record["label"] = str(record["label"])
    return record


def _problems(record: Record, require_labels: bool) -> list[str]:
    if "text" in record:
        return [*_text_problems(record, "text"), *_label_problems(record, require_labels)]
    if "question" not in record:
        fields = ", ".join(map(str, record)) or "nothing"
        return [f"it has {fields}; it must have 'text' (and 'label'), or 'question' and 'choices' (and 'answer')"]
    return [*_text_problems(record, "question"), *_choice_problems(record, require_labels)]


def _text_problems(record: Record, name: str) -> list[str]:
    value = record[name]
    right = isinstance(value, str) and value.strip()
    return [] if right else [f"field '{name}': {value!r} must be a text that isn't empty"]


def _label_problems(record: Record, required: bool) -> list[str]:
    if "label" not in record:
        return ["field 'label': missing; each training or evaluation record needs one"] if required else []
    return _text_problems(record, "label")


def _choice_problems(record: Record, required: bool) -> list[str]:
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        return [f"field 'choices': {choices!r} must be a list of at least 2 texts"]
    if "answer" not in record:
        return ["field 'answer': missing; each training or evaluation record needs one"] if required else []
    answer = record["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return [f"field 'answer': {answer!r} is not an index into {len(choices)} choices (0..{len(choices) - 1})"]
    return []

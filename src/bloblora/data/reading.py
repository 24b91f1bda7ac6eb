"""Reading records from files, folders and names, each row checked."""

import csv
import json
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from .records import DataError, Record, first_field, record_kind, record_problems
from .sets import PAPER_SETS, read_paper_set, support_desk

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PARQUET_ROWS, _BUFFER = 1024, 2**20  # rows and bytes at a time, so that a row group need not fit into memory
Row = Record | str
"""A row as it was read, or why it can't be."""


def read_records(source: str | Path, *, require_labels: bool = True) -> list[Record]:
    """Read and check labelled records.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file; a `datasets` folder; ``-`` for JSON lines on standard
            input; ``support_desk``, or a set of the paper such as ``arc_easy`` or ``mmlu/college_physics``, with an
            optional ``:split`` (default train). In a table, ``choices`` is a JSON list, or columns ``choice_0``,
            ``choice_1``, … Text is UTF-8. Numbers and booleans as labels become texts; an answer may be a letter.
        require_labels: whether each record must have its label or answer.

    Returns:
        The records, all of one kind, with extra fields as they are.

    Raises:
        DataError: lists every problem with file, line, field and value.
    """
    return [*read_each(source, require_labels=require_labels)]


def read_each(source: str | Path, *, require_labels: bool = True) -> Iterator[Record]:
    """The records of `read_records` one after the other, none of them kept.

    Raises:
        DataError: as `read_records`, after the last.
    """
    problems: list[str] = []
    for record, found in _checked(str(source), require_labels):
        problems += found
        yield record
    if problems:
        raise DataError(problems)


def read_batches(source: str | Path, size: int, *, require_labels: bool = True) -> Iterator[list[Record]]:
    """The records of `read_records`, ``size`` at a time.

    A file is checked whole before its first batch, and read again for them: but for .json, memory holds a batch,
    however long the file is. Standard input is a stream: it is read and checked a batch at a time, so that answers
    don't wait for its end.

    Raises:
        DataError: as `read_records`.
    """
    if str(source) != "-":
        for _ in read_each(source, require_labels=require_labels):
            pass
    rows = _checked(str(source), require_labels)
    while batch := list(islice(rows, size)):
        if problems := [problem for _, found in batch for problem in found]:
            raise DataError(problems)
        yield [record for record, _ in batch]


def _checked(source: str, require_labels: bool) -> Iterator[tuple[Record, list[str]]]:
    """Each row as a record, with its problems; a DataError where there is none."""
    first, empty = None, True
    for where, row in _rows(source):
        empty = False
        if isinstance(row, str):
            yield {}, [f"{where}: {row}"]
            continue
        record = _from_columns(row)
        kind = record_kind(record)
        problems = record_problems(record, kind, require_answer=require_labels)
        if kind and not problems:
            first = first or kind
            if kind != first:
                fields = f"it has {first_field(kind)}, those before {first_field(first)}"
                problems = [f"{fields}; keep the kinds in separate files"]
        yield record, [f"{where}: {problem}" for problem in problems]
    if empty:
        raise DataError([f"{'standard input' if source == '-' else source}: there are no records in it"])


def _rows(source: str) -> Iterator[tuple[str, Row]]:
    """Each row with its place."""
    path = Path(source)
    name, _, split = source.partition(":")
    if source == "-":
        # Bytes, because a terminal's encoding need not be UTF-8.
        yield from _json_lines("standard input", sys.stdin.buffer)
    elif name == "support_desk":
        yield from _numbered(source, support_desk(split or "train"))
    elif name in PAPER_SETS or (name.startswith("mmlu/") and not path.exists()):
        yield from _numbered(source, read_paper_set(name, split or "train"))
    elif path.is_dir():
        yield from _numbered(source, _dataset_rows(path))
    elif not path.is_file():
        known = ", ".join(["support_desk", *PAPER_SETS, "mmlu/<subject>"])
        raise DataError([f"data {source!r}: no such file or folder, and not one of {known}"])
    elif (suffix := path.suffix.lower()) == ".jsonl":
        with path.open("rb") as lines:
            yield from _json_lines(source, lines)
    elif suffix == ".json":
        yield from _numbered(source, _json_list(path), "item")
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        yield from _numbered(source, _parquet_rows(path))
    else:
        raise DataError([f"data {source!r}: the ending {path.suffix!r} is not one of {', '.join(_SUFFIXES)}"])


def _numbered(source: str, rows: Iterable[Row], what: str = "row") -> Iterator[tuple[str, Row]]:
    return ((f"{source}: {what} {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(source: str, lines: Iterable[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if line.strip():
            yield f"{source}:{number}", _json_row(line)


def _json_row(line: bytes) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists
        return f"not valid JSON: {error}"
    return _object(row)


def _json_list(path: Path) -> Iterator[Row]:
    text = "".join(_lines(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError([f"{path}:{error.lineno}: not valid JSON: {error.msg}"]) from error
    except (ValueError, RecursionError) as error:
        raise DataError([f"{path}: not valid JSON: {error}"]) from error
    if not isinstance(rows, list):
        raise DataError([f"{path}: must hold a list of objects, got {type(rows).__name__}"])
    return map(_object, rows)


def _object(row: Any) -> Row:
    return row if isinstance(row, dict) else f"{row!r} is not a JSON object"


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(_lines(path), delimiter=delimiter)
    try:
        for row in reader:
            surplus = row.pop(None, None)  # where DictReader puts cells without a name
            problem = f"more cells than the header has columns: {surplus!r}; quote cells that hold {delimiter!r}"
            yield f"{path}:{reader.line_num}", problem if surplus else row
    except csv.Error as error:
        raise DataError([f"{path}:{reader.line_num}: not a table: {error}"]) from error


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file; a DataError names the first that is no UTF-8."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isascii() and (escaped := re.search("[\udc80-\udcff]", line)):
                raise DataError([f"{path}:{number}: not UTF-8: byte 0x{ord(escaped[0]) - 0xDC00:02x}"])
            yield line


def _parquet_rows(path: Path) -> Iterator[Row]:
    # Not through `datasets`, which would copy the file into its cache first.
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError([f"{path}: not readable as Parquet: {error}"]) from error


def _dataset_rows(path: Path) -> Iterable[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError([f"{path}: not a folder that `datasets` saved: {error}"]) from error
    if isinstance(rows, DatasetDict):
        raise DataError([f"{path}: has several splits; give one of {', '.join(str(path / name) for name in rows)}"])
    return rows


def _from_columns(row: Record) -> Record:
    """A row as a record: choices from JSON or columns, numbers from text, labels as text; null is missing."""
    record = {k: v for k, v in row.items() if not _is_missing(k, v)}
    columns = sorted((k for k in record if re.fullmatch(r"choice_\d+", k)), key=lambda k: int(k[7:]))
    if columns and "choices" not in record:
        texts = [record.pop(column) for column in columns]
        record["choices"] = [text for text in texts if text != ""]
    elif isinstance(record.get("choices"), str):
        with suppress(json.JSONDecodeError):  # reported with its value by the check that follows
            record["choices"] = json.loads(record["choices"])
    if "answer" in record:
        record["answer"] = _index(record["answer"], record.get("choices"))
    if isinstance(label := record.get("label"), (bool, int, float)):
        whole = isinstance(label, float) and label.is_integer()
        record["label"] = json.dumps(int(label) if whole else label)
    return record


def _is_missing(name: str, value: Any) -> bool:
    """Null, and where an answer of any kind should be also an empty cell or the NaN that pandas writes for one."""
    return value is None or (name in ("label", "answer", "response") and (value == "" or value != value))


def _index(answer: Any, choices: Any) -> Any:
    """An answer as an index, where it is one written as text, a whole float, or a letter that can't be meant else."""
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)
    if not isinstance(answer, str) or not isinstance(choices, list):
        return answer
    letter = answer.strip().upper()
    # ASCII, because "²" is a digit too, of which int() makes nothing
    if letter.isascii() and letter.isdigit() and len(letter) < 10:
        return int(letter)
    index = ascii_uppercase.find(letter) if len(letter) == 1 else -1
    return index if 0 <= index < len(choices) and answer not in choices else answer

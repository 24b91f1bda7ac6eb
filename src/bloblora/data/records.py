"""Reading and checking records.

A record is a plain dict: ``{"text", "label"}`` for classification, ``{"question", "choices", "answer"}`` for multiple
choice with ``answer`` the index of the right choice, ``{"prompt", "response"}`` or ``{"messages"}`` for open text, with
messages ``{"role", "content"}`` of which the assistant's is the last. For prediction, ``label``, ``answer``,
``response`` and the assistant's last message may be missing.
"""

import csv
import json
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from .errors import DataError
from .paper import PAPER_SETS, read_paper_set
from .support_desk import support_desk

Record = dict[str, Any]
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_FORMS = "'text' (and 'label'), 'question' and 'choices' (and 'answer'), 'prompt' (and 'response'), or 'messages'"
_PARQUET_ROWS, _BUFFER = 1024, 2**20  # rows and bytes at a time, so that a row group need not fit into memory
_FIELD = {"classification": "'text'", "choice": "'question'", "generation": "'prompt' or 'messages'"}


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


def kind_of(records: Iterable[Record]) -> str:
    """``classification``, ``choice`` or ``generation``.

    Raises:
        DataError: several kinds, or none.
    """
    kinds = {_kind(record) for record in records}
    if not kinds:
        raise DataError(["there are no records"])
    if len(kinds) > 1:
        some = ", ".join(f"some have {_FIELD[kind]}" for kind in sorted(kinds))
        raise DataError([f"records of several kinds: {some}; keep them in separate files"])
    return kinds.pop()


def _checked(source: str, require_labels: bool) -> Iterator[tuple[Record, list[str]]]:
    """Each row as a record, with its problems; a DataError where there is none."""
    kind, empty = None, True
    for where, row in _rows(source):
        empty = False
        if isinstance(row, _Broken):
            yield {}, [f"{where}: {row.reason}"]
            continue
        record = _from_columns(row)
        problems = _problems(record, require_labels)
        if not problems:
            kind = kind or _kind(record)
            if _kind(record) != kind:
                fields = f"it has {_FIELD[_kind(record)]}, those before {_FIELD[kind]}"
                problems = [f"{fields}; keep the kinds in separate files"]
        yield record, [f"{where}: {problem}" for problem in problems]
    if empty:
        raise DataError([f"{'standard input' if source == '-' else source}: there are no records in it"])


@dataclass(frozen=True)
class _Broken:
    """A row that can't be read, and why."""

    reason: str


_Row = tuple[str, Record | _Broken]


def _rows(source: str) -> Iterator[_Row]:
    """Each row with its place."""
    path = Path(source)
    name, _, split = source.partition(":")
    if source == "-":
        # Bytes, because a terminal's encoding need not be UTF-8.
        yield from _json_lines("standard input", sys.stdin.buffer)
    elif name == "support_desk":
        try:
            rows = support_desk(split or "train")
        except ValueError as error:
            raise DataError([str(error)]) from error
        yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, start=1))
    elif name in PAPER_SETS or (name.startswith("mmlu/") and not path.exists()):
        rows = read_paper_set(name, split or "train")
        yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, start=1))
    elif path.is_dir():
        yield from _dataset_rows(path)
    elif not path.is_file():
        known = ", ".join(["support_desk", *PAPER_SETS, "mmlu/<subject>"])
        raise DataError([f"data {source!r}: no such file or folder, and not one of {known}"])
    elif (suffix := path.suffix.lower()) == ".jsonl":
        with path.open("rb") as lines:
            yield from _json_lines(source, lines)
    elif suffix == ".json":
        yield from _json_list(path)
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise DataError([f"data {source!r}: the ending {path.suffix!r} is not one of {', '.join(_SUFFIXES)}"])


def _json_lines(source: str, lines: Iterable[bytes]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if line.strip():
            yield f"{source}:{number}", _json_object(line)


def _json_object(line: bytes) -> Record | _Broken:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _Broken(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return _Broken(f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists
        return _Broken(f"not valid JSON: {error}")
    return row if isinstance(row, dict) else _Broken(f"{row!r} is not a JSON object")


def _json_list(path: Path) -> Iterator[_Row]:
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError([f"{path}:{error.lineno}: not valid JSON: {error.msg}"]) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError([f"{path}: not valid JSON: {error}"]) from error
    if not isinstance(rows, list):
        raise DataError([f"{path}: must hold a list of objects, got {type(rows).__name__}"])
    for number, row in enumerate(rows, start=1):
        yield f"{path}: item {number}", row if isinstance(row, dict) else _Broken(f"{row!r} is not a JSON object")


def _table_rows(path: Path, delimiter: str) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter)
        try:
            for row in reader:
                surplus = row.pop(None, None)  # where DictReader puts cells without a name
                problem = f"more cells than the header has columns: {surplus!r}; quote cells that hold {delimiter!r}"
                yield f"{path}:{reader.line_num}", _Broken(problem) if surplus else row
        except csv.Error as error:
            raise DataError([f"{path}:{reader.line_num}: not a table: {error}"]) from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path) from error


def _parquet_rows(path: Path) -> Iterator[_Row]:
    # Not through `datasets`, which would copy the file into its cache first.
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER) as file:
            batches = file.iter_batches(batch_size=_PARQUET_ROWS)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))
    except (ArrowException, OSError) as error:
        raise DataError([f"{path}: not readable as Parquet: {error}"]) from error


def _dataset_rows(path: Path) -> Iterator[_Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError([f"{path}: not a folder that `datasets` saved: {error}"]) from error
    if isinstance(rows, DatasetDict):
        raise DataError([f"{path}: has several splits; give one of {', '.join(str(path / name) for name in rows)}"])
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", dict(row)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _not_utf8(path: Path) -> DataError:
    """The error that names the first line which is no UTF-8."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return DataError([f"{path}:{number}: not UTF-8: byte 0x{line[error.start]:02x}"])
    return DataError([f"{path}: not UTF-8"])


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


def _kind(record: Record) -> str:
    if "text" in record:
        return "classification"
    return "generation" if "prompt" in record or "messages" in record else "choice"


def _problems(record: Record, require_labels: bool) -> list[str]:
    if "text" in record:
        return [*_text_problems(record, "text"), *_label_problems(record, require_labels)]
    if "prompt" in record:
        return [*_text_problems(record, "prompt"), *_response_problems(record, require_labels)]
    if "messages" in record:
        return _message_problems(record["messages"], require_labels)
    if "question" not in record:
        fields = ", ".join(map(str, record)) or "nothing"
        return [f"it has {fields}; it must have {_FORMS}"]
    return [*_text_problems(record, "question"), *_choice_problems(record, require_labels)]


def _text_problems(record: Record, name: str) -> list[str]:
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        return [f"field '{name}': {value!r} must be a text that isn't empty"]
    return [] if _is_unicode(value) else [f"field '{name}': {value!r} has half a surrogate pair, which is no text"]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label_problems(record: Record, required: bool) -> list[str]:
    if "label" not in record:
        return ["field 'label': missing; each training or evaluation record needs one"] if required else []
    return _text_problems(record, "label")


def _response_problems(record: Record, required: bool) -> list[str]:
    if "response" not in record:
        return ["field 'response': missing; each training record needs one"] if required else []
    return _text_problems(record, "response")


def _message_problems(messages: Any, required: bool) -> list[str]:
    if not isinstance(messages, list) or not messages:
        return [f"field 'messages': {messages!r} must be a list of at least one message"]
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return [f"field 'messages', item {number}: {message!r} must have 'role' and 'content'"]
        if problems := [*_text_problems(message, "role"), *_text_problems(message, "content")]:
            return [f"field 'messages', item {number}: {problem}" for problem in problems]
    if required and messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        return [f"field 'messages': the last one's role is {role!r}; in training records it must be 'assistant'"]
    return []


def _choice_problems(record: Record, required: bool) -> list[str]:
    choices = record.get("choices")
    usable = isinstance(choices, list) and all(isinstance(c, str) and c.strip() and _is_unicode(c) for c in choices)
    if not isinstance(choices, list) or len(choices) < 2 or not usable:
        return [f"field 'choices': {choices!r} must be a list of at least 2 texts"]
    if "answer" not in record:
        return ["field 'answer': missing; each training or evaluation record needs one"] if required else []
    answer = record["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return [f"field 'answer': {answer!r} is not an index into {len(choices)} choices (0..{len(choices) - 1})"]
    return []

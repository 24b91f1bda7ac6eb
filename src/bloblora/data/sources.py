"""The rows of files, folders and names of every form, one after the other, each with its place."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, time
from io import TextIOWrapper
from itertools import chain, zip_longest
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from zipfile import ZipFile

from ..files import parse_json
from ..messages import quoted, shortened
from .columns import date_text, obvious_kind
from .exports import label_studio_row, rasa_rows
from .records import DataError, Place, Record
from .sets import PAPER_SETS, read_paper_set, support_desk

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet", ".yml", ".yaml", ".conll")
_PARQUET_ROWS, _BUFFER = 1024, 2**20  # rows and bytes at a time, so that a row group need not fit into memory
_MOST_UNPACKED, _MOST_TIMES = 2**28, 100  # bytes, and times of the file's size, both of which a bomb is above
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_QUOTES = "a cell that begins with a quote must end with the next one; write quotes that belong to its text twice"
_NOT_IN_CP1252 = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
Row = Record | str
"""A row as it was read, or why it can't be."""
Say = Callable[[str], None]


def rows_of(source: str, say: Say) -> Iterator[tuple[Place, Row]]:
    """Each row with its place; what had to be assumed of a file is said.

    Raises:
        DataError: there is no such source, or it can't be read.
    """
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
    elif path.exists() and not path.is_file():
        raise DataError([f"data {quoted(source)}: is not a regular file"])
    elif not path.exists():
        known = ", ".join(["support_desk", *PAPER_SETS, "mmlu/<subject>"])
        raise DataError([f"data {quoted(source)}: no such file or folder, and not one of {known}"])
    else:
        yield from _file_rows(path, say)


def _file_rows(path: Path, say: Say) -> Iterator[tuple[Place, Row]]:
    source = str(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".jsonl":
        yield from _json_lines(source, _lines(path, say))
    elif suffix == ".json":
        yield from _numbered(source, _json_rows(path, say), "item")
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(path, suffix, say)
    elif suffix in (".yml", ".yaml"):
        yield from _numbered(source, rasa_rows(source, "".join(_lines(path, say))), "example")
    elif suffix == ".conll":
        yield from _tagged_rows(path, say)
    elif suffix == ".xlsx":
        yield from _sheet_rows(path, say)
    elif suffix == ".parquet":
        yield from _numbered(source, _parquet_rows(path))
    else:
        ending = quoted(path.suffix)
        raise DataError([f"data {quoted(source)}: the ending {ending} is not one of {', '.join(SUFFIXES)}"])


def _numbered(source: str, rows: Iterable[Row], what: str = "row") -> Iterator[tuple[Place, Row]]:
    return (((f"{source}: {what} ", number), row) for number, row in enumerate(rows, start=1))


def _json_lines(source: str, lines: Iterable[str | bytes]) -> Iterator[tuple[Place, Row]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield (f"{source}:", number), _json_row(line)


def _json_row(line: str | bytes) -> Row:
    try:
        text = line if isinstance(line, str) else line.removeprefix(BOM_UTF8).decode()
        row = parse_json(text)
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}"
    except ValueError as error:  # a number of thousands of digits, lists in lists, a key twice
        return f"not valid JSON: {error}"
    return _object(row)


def _json_rows(path: Path, say: Say) -> Iterator[Row]:
    try:
        content = parse_json("".join(_lines(path, say)))
    except json.JSONDecodeError as error:
        lines = "; name a file of JSON lines .jsonl" if error.msg == "Extra data" else ""
        raise DataError([f"{path}:{error.lineno}: not valid JSON: {error.msg}{lines}"]) from error
    except ValueError as error:
        raise DataError([f"{path}: not valid JSON: {error}"]) from error
    return (label_studio_row(row) if isinstance(row, dict) else _object(row) for row in _list_in(path, content, say))


def _list_in(path: Path, content: Any, say: Say) -> Sequence[Any]:
    """The list itself; the only list of objects in an object; or the rows of a table, as pandas writes them."""
    if isinstance(content, list):
        if content and all(isinstance(row, list) for row in content):
            raise DataError([f"{path}: its rows are lists, without the names of columns; write a list of objects"])
        return content
    if not isinstance(content, dict):
        raise DataError([f"{path}: must hold a list of objects, got {type(content).__name__}"])
    if (rows := _rows_of_table(path, content)) is not None:
        return rows
    lists = [name for name, value in content.items() if isinstance(value, list) and _all_objects(value)]
    if len(lists) != 1:
        found = f"several: {', '.join(lists)}" if lists else f"it has {', '.join(content) or 'nothing'}"
        raise DataError([f"{path}: must hold a list of objects, or an object with exactly one such list; {found}"])
    say(f"{path}: the records are those of {quoted(lists[0])}")
    return content[lists[0]]


def _rows_of_table(path: Path, content: dict[str, Any]) -> list[Record] | None:
    """Rows of what ``DataFrame.to_json`` and ``to_dict`` make of a table; None of anything else.

    The ways of pandas, its ``orient``: a column's cells by row or a row's cells by column, a column's cells as a list,
    and names and cells apart (``split``).
    """
    parts = [*content.values()]
    columns, rows = content.get("columns"), content.get("data")
    if isinstance(columns, list) and isinstance(rows, list) and not _all_objects(rows):
        if not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
            names = ", ".join(map(str, columns))
            raise DataError([f"{path}: a row of 'data' hasn't a cell for each of 'columns': {names}"])
        if wrong := [name for name in columns if not isinstance(name, str)]:
            raise DataError([f"{path}: the names in 'columns' must be texts, got {quoted(wrong[0])}"])
        return [dict(zip(columns, row, strict=True)) for row in rows]
    if parts and all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts):
        if _are_rows([*content], [*parts[0]]):
            return parts
        return [{name: column[key] for name, column in content.items()} for key in parts[0]]
    of_lists = bool(parts) and all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts)
    if of_lists and (obvious_kind([*content]) or not any(map(_all_objects, parts))):
        return [dict(zip(content, row, strict=True)) for row in zip(*parts, strict=True)]
    return None


def _are_rows(names: list[str], inner: list[str]) -> bool:
    """Whether objects in an object are rows, by the names of both: columns have names of fields, rows numbers."""
    of_fields = [obvious_kind(side) is not None for side in (names, inner)]
    if of_fields[0] != of_fields[1]:
        return of_fields[1]
    return all(name.isdecimal() for name in names) and not all(name.isdecimal() for name in inner)


def _all_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _object(row: Any) -> Row:
    return row if isinstance(row, dict) else f"{quoted(row)} is not a JSON object"


def _table_rows(path: Path, suffix: str, say: Say) -> Iterator[tuple[Place, Row]]:
    delimiter = "\t" if suffix == ".tsv" else _delimiter(path, say)
    reader = csv.reader(_lines(path, say), delimiter=delimiter, strict=True)
    blank, first = 0, 1  # the line on which a row begins
    try:
        header = next((cells for cells in reader if not _is_blank(cells)), [])
        _check_names(f"{path}:{reader.line_num}", header)
        first = reader.line_num + 1
        for cells in reader:
            place, first = (f"{path}:", first), reader.line_num + 1
            if _is_blank(cells):
                blank += bool(cells)
            elif surplus := cells[len(header) :]:
                problem = "more cells than the header has columns"
                yield place, f"{problem}: {quoted(surplus)}; quote cells that hold {delimiter!r}"
            elif delimiter == "\t" and _holds_rows(cells):
                yield place, f"a cell holds the cells of other rows; {_QUOTES}"
            else:
                yield place, dict(zip_longest(header, cells))
    except csv.Error as error:
        most = csv.field_size_limit()
        what = f"a cell has more than {most:,} characters, which .jsonl may have" if "limit" in str(error) else _QUOTES
        raise DataError([f"{path}:{first}: not a table: {what}"]) from error
    _say_blank(path, blank, say)


def _check_names(place: str, header: list[str]) -> None:
    if twice := [name for name in header if name.strip() and header.count(name) > 1]:
        raise DataError([f"{place}: column {quoted(twice[0])} is there twice; rename one of both, or take it out"])


def _holds_rows(cells: list[str]) -> bool:
    """Whether a cell has line breaks and tabs where rows have theirs.

    A quote that begins a text and one that ends another row's make one cell of all that is between them.
    """
    after = len(cells) - 1
    for before, cell in enumerate(cells):
        lines = [line.split("\t") for line in cell.splitlines()] if "\t" in cell else []
        tabs = [after - before, *[after] * (len(lines) - 2), before]
        if [len(parts) - 1 for parts in lines] == tabs and all(part.strip() for parts in lines for part in parts):
            return True
    return False


def _tagged_rows(path: Path, say: Say) -> Iterator[tuple[Place, Row]]:
    """Sentences of CoNLL's form, each with the number of its first line: a line has a token and its tag, the first and
    the last of its columns, and blank lines are between sentences. Comments before a sentence are left out.
    """
    sentence, columns, comments = list[str](), 2, 0
    for number, line in enumerate(chain(_lines(path, say), [""]), start=1):
        if line.strip():
            sentence += [line] if line.split()[0] != "-DOCSTART-" else []
            continue
        columns = next((len(one.split()) for one in sentence if not one.startswith("# ")), columns)
        before = next((i for i, one in enumerate(sentence) if not _is_comment(one, columns)), len(sentence))
        cells, comments, sentence = [one.split() for one in sentence[before:]], comments + before, []
        if (widths := sorted({*map(len, cells)}))[1:]:
            found = ", ".join(map(str, widths))
            yield (
                (f"{path}:", number - len(cells)),
                f"its lines have {found} columns; each must have as many as the others",
            )
        elif cells:
            tags = [one[-1] for one in cells] if widths[0] > 1 else []
            record = {"tokens": [one[0] for one in cells]} | ({"tags": tags} if tags else {})
            yield (f"{path}:", number - len(cells)), record
    if comments:
        say(f"{path}: left out {comments} comment line{'' if comments == 1 else 's'}")


def _is_comment(line: str, columns: int) -> bool:
    """Whether a line before a sentence's first word of so many columns is a comment; "#" may be a word, with a tag."""
    return line.startswith("# ") and (len(line.split()) != columns or line.split()[2:3] == ["="])


def _is_blank(cells: Iterable[Any]) -> bool:
    return all(cell is None or (isinstance(cell, str) and not cell.strip()) for cell in cells)


def _say_blank(path: Path, blank: int, say: Say) -> None:
    if blank:
        say(f"{path}: left out {blank} blank row{'' if blank == 1 else 's'}")


def _delimiter(path: Path, say: Say) -> str:
    """What separates most columns of the header; a comma where none does."""
    header = next((line for line in _lines(path, lambda _: None) if line.strip()), "")[: csv.field_size_limit()]
    counts = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in _DELIMITERS}
    found = max(counts, key=counts.__getitem__)
    if found != ",":
        say(f"{path}: read as cells between {_DELIMITERS[found]}")
    return found


def _sheet_rows(path: Path, say: Say) -> Iterator[tuple[Place, Row]]:
    """The rows of a workbook's first sheet, below its first row that isn't blank; numbers as texts."""
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise DataError([f"{path}: .xlsx needs openpyxl: pip install 'bloblora[xlsx]', or save it as .csv"]) from error
    with _seekable(path) as file, _readable(path, "as .xlsx"):
        with ZipFile(file) as parts:
            if sum(part.file_size for part in parts.infolist()) > _most_unpacked(path):
                raise _bomb(path)
        book = load_workbook(file, read_only=True, data_only=True)
        sheet = book.worksheets[0]
        if len(book.worksheets) > 1:
            others = ", ".join(other.title for other in book.worksheets[1:])
            say(f"{path}: read the first sheet, {sheet.title}; not {others}")
        header, blank = None, 0
        for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
            if _is_blank(cells):
                blank += header is not None
            elif header is None:
                _check_names(f"{path}: row {number}", header := ["" if cell is None else str(cell) for cell in cells])
            else:
                row = {name: _cell(cell) for name, cell in zip(header, cells, strict=False) if name}
                yield (f"{path}: row ", number), row
        _say_blank(path, blank, say)


def _cell(value: Any) -> str | None:
    if isinstance(value, bool) or value is None:
        return None if value is None else str(value).lower()
    if isinstance(value, date | time):
        return date_text(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _lines(path: Path, say: Say) -> Iterator[str]:
    """Lines of a text file in whatever encoding it is; one that isn't UTF-8 is said."""
    encoding = _encoding(path)
    if encoding != "utf-8-sig":
        say(f"{path}: not UTF-8, read as {encoding}")
    with _bytes(path) as file:
        try:
            yield from TextIOWrapper(file, encoding=encoding, newline="")
        except UnicodeDecodeError as error:
            raise DataError([f"{path}: not readable as {encoding}: {error.reason}"]) from error


def _encoding(path: Path) -> str:
    """By the file's first bytes; or the whole file is UTF-8; or each byte is a letter, of Windows' set or latin-1.

    Raises:
        DataError: most of what isn't ASCII is UTF-8, but not all of it; the message names the first line.
    """
    with _bytes(path) as file:
        start = file.read(4096)
        if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            return "utf-16"
        # without a BOM: of ASCII letters every other byte is 0
        for place, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
            if len(start) > 1 and start[place::2].count(0) > 0.4 * len(start[place::2]):
                return encoding
        decoder, chunk, lines, plain = getincrementaldecoder("utf-8")(), start, 1, True
        try:
            while chunk:
                text = decoder.decode(chunk)
                lines, plain = lines + text.count("\n"), plain and text.isascii()
                chunk = file.read(_BUFFER)
            decoder.decode(b"", final=True)
            return "utf-8-sig"
        except UnicodeDecodeError as error:
            if not plain or _mostly_utf8(error.object):
                lines, byte = lines + error.object[: error.start].count(b"\n"), error.object[error.start]
                raise DataError([f"{path}:{lines}: not UTF-8: byte 0x{byte:02x}"]) from error
            rest = error.object
        while rest:
            if _NOT_IN_CP1252.search(rest):
                return "latin-1"
            rest = file.read(_BUFFER)
        return "cp1252"


def _mostly_utf8(content: bytes) -> bool:
    letters = [letter for letter in content.decode(errors="replace") if not letter.isascii()]
    return letters.count("\ufffd") < len(letters) / 2


@contextmanager
def _bytes(path: Path) -> Iterator[BinaryIO]:
    """A file as bytes, unpacked where it ends in .gz."""
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            yield file
        return
    try:
        with _Unpacked(path) as unpacked:
            yield unpacked  # type: ignore[misc]  # it reads as a BinaryIO does
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError([f"{path}: not readable as gzip: {error}"]) from error


class _Unpacked(gzip.GzipFile):
    """A packed file that stops where it turns out to be a bomb."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path, self._limit = path, _most_unpacked(path)

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        return self._checked(super().read1(size))

    def _checked(self, content: bytes) -> bytes:
        if self.tell() > self._limit:
            raise _bomb(self._path)
        return content


def _most_unpacked(path: Path) -> int:
    """More bytes than records would be packed in a file of this size."""
    return max(_MOST_UNPACKED, _MOST_TIMES * path.stat().st_size)


def _bomb(path: Path) -> DataError:
    return DataError(
        [f"{path}: unpacks to more than {_MOST_TIMES} times its size; if it is what it should be, give it unpacked"]
    )


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """The same, for a form whose index stands at its end."""
    with _bytes(path) as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        with TemporaryFile() as copy:
            copyfileobj(file, copy)
            copy.seek(0)
            yield copy


def _parquet_rows(path: Path) -> Iterator[Row]:
    # Not through `datasets`, which would copy the file into its cache first.
    from pyarrow import parquet

    with (
        _seekable(path) as unpacked,
        _readable(path, "as Parquet"),
        parquet.ParquetFile(unpacked, buffer_size=_BUFFER) as file,
    ):
        names = _class_names(file.schema_arrow)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            yield from (with_names(row, names) for row in batch.to_pylist())


def _dataset_rows(path: Path) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    with _readable(path, "as a folder that `datasets` saved"):
        rows = load_from_disk(str(path))
        if isinstance(rows, DatasetDict):
            raise DataError([f"{path}: has several splits; give one of {', '.join(str(path / name) for name in rows)}"])
        names = _class_names(rows.features.arrow_schema)
        yield from (with_names(row, names) for row in rows)


@contextmanager
def _readable(path: Path, form: str) -> Iterator[None]:
    """Raise a DataError for what other libraries raise of a damaged file, which can be anything."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        said = shortened(str(error)) or type(error).__name__
        raise DataError([f"{path}: not readable {form}: {said}"]) from error


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes of each column of `datasets.ClassLabel`, which a file keeps in its metadata."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    features = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features") or {}
    inner = {name: (f.get("feature") or f) if isinstance(f, dict) else {} for name, f in features.items()}
    return {
        name: feature["names"]
        for name, feature in inner.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def with_names(row: Record, names: Mapping[str, list[str]]) -> Record:
    """A row with its classes, or lists of them, by name; -1, which stands for none, is missing."""

    def named(value: Any, of: list[str]) -> Any:
        if isinstance(value, list):
            return [named(item, of) for item in value]
        return value if not isinstance(value, int) else of[value] if 0 <= value < len(of) else None

    return row | {name: named(row[name], of) for name, of in names.items() if name in row}

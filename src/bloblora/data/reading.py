"""Reading records from files, folders and names, each row checked; and what is said of how they were read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

from ..messages import quoted
from .columns import (
    ReadingOptions,
    find_columns,
    is_boolean,
    is_whole_float,
    missing_hint,
    obvious_kind,
    option,
    said_of,
    to_record,
    typed,
)
from .records import (
    KINDS,
    DataError,
    Place,
    Problems,
    Record,
    first_field,
    of_kind,
    other_kinds,
    record_kind,
    record_problems,
)
from .sources import Row, Say, rows_of

_log = logging.getLogger("bloblora")
_AHEAD = 256  # rows of which the columns are known before the first is a record: not every row needs to have all
_MOST_LABELS = 10_000  # of which it is known which differ by case alone


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of records before they are read, as a run knows it of those that it is for.

    Attributes:
        columns: the column of each field, used where it is there and options name no other.
        kind: one of `KINDS`; fields of other kinds are left out. Default: what the records' fields say.
        labels: one of them that a source writes in another form (True, 1.0) is meant by it. Without them, labels of a
            .csv or .tsv that are all booleans, or all whole floats, become what they are elsewhere.
        answer: the field of the answer: with ``label`` a list of one label is that label.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    kind: str | None = None
    labels: Sequence[str] | None = None
    answer: str | None = None


class Reader:
    """The records of one source, read again each time they are iterated over; none is kept.

    What had to be assumed of the source is logged by the logger ``bloblora``, and so is what was left out.

    Args:
        source: a file: .jsonl, .json, .csv, .tsv, .xlsx, .parquet, .conll, or Rasa's .yml, also with .gz; a `datasets`
            folder; ``-`` for JSON lines on standard input; ``support_desk``, or a set of the paper such as ``arc_easy``
            or ``mmlu/college_physics``, with an optional ``:split`` (default train).
        options: which columns hold the fields, and whether rows that can't be used are left out.
        known: of the records, as of a run.
        require_labels: whether each record must have its label or answer.
        silent: log nothing.
        ahead: rows that are read before the first is a record, to find columns that not every row has.

    Attributes:
        columns: the column of each field that isn't called as its field; known once the first row was read.

    Raises:
        DataError: lists every problem with file, line, field and value; after the last row, when iterated over.
    """

    def __init__(
        self,
        source: str | Path,
        options: ReadingOptions = ReadingOptions(),  # noqa: B008  # frozen
        *,
        known: Known = Known(),  # frozen
        require_labels: bool = True,
        silent: bool = False,
        ahead: int = _AHEAD,
    ) -> None:
        self.source, self.options, self.known = str(source), options, known
        self.require_labels, self._ahead = require_labels, ahead
        self.columns: dict[str, str] = {}
        self._say: Say = (lambda text: None) if silent else _log.info
        self._warn: Say = (lambda text: None) if silent else _log.warning
        self._present: list[str] = []
        self._name = "standard input" if self.source == "-" else self.source

    def __iter__(self) -> Iterator[Record]:
        problems, right = Problems(), False
        for place, record, found in self.checked():
            problems.add(place, found)
            if not found:
                right = True
                yield record
        self.report(problems, right)

    def report(self, problems: Problems, right: bool) -> None:
        """Raise a DataError for problems; or say how many rows are left out, where they may be and some are right."""
        lines = problems.lines()
        if lines and not (self.options.skip_invalid and right):
            raise DataError(lines, "--skip-invalid leaves such rows out" if right else "")
        if lines:
            shown = "; ".join(lines[:3]) + ("; …" if len(lines) > 3 else "")
            self._warn(f"{self._name}: left out {_count(problems.rows, 'invalid row')}: {shown}")

    def checked(self) -> Iterator[tuple[Place, Record, list[str]]]:
        """Each row as a record, with its place and its problems; a DataError where there is none."""
        first, stripped, rows = None, 0, self._rows()
        labels, retyped = set[str](), dict[str, str]()
        if not (ahead := [*islice(rows, self._ahead)]):
            raise DataError([f"{self._name}: there are no records in it"])
        if every := _fields(self._of_kind(row) for _, row in ahead if not isinstance(row, str)):
            self._find_columns(every)
        meant = self._meant(ahead)
        for place, row in chain(ahead, rows):
            if isinstance(row, str):
                yield place, {}, [row]
                continue
            record = to_record(self._of_kind(row), self.columns)
            if self.known.answer == "label" and isinstance(several := record.get("labels"), list) and len(several) == 1:
                (record["label"],) = record.pop("labels")
            kind = record_kind(record)
            if kind == "text" and isinstance(label := record.get("label"), str):
                record["label"] = label.strip()
                stripped += record["label"] != label
                if (label := meant(record["label"])) != record["label"]:
                    retyped[record["label"]] = record["label"] = label
                if len(labels) < _MOST_LABELS:
                    labels.add(record["label"])
            problems = record_problems(record, kind, require_answer=self.require_labels)
            if kind and not problems:
                first = first or kind
                if kind != first:
                    fields = f"it has {first_field(kind)}, those before {first_field(first)}"
                    problems = [f"{fields}; keep the kinds in separate files"]
            yield place, record, [problem + self._hint(problem) for problem in problems]
        if stripped:
            self._say(f"{self._name}: took white space off {_count(stripped, 'label')}")
        if retyped:
            forms = ", ".join(f"{quoted(text)} as {quoted(label)}" for text, label in [*retyped.items()][:5])
            self._say(f"{self._name}: read label {forms}{', …' if len(retyped) > 5 else ''}")
        if same := _same_but_for_case(labels):
            self._warn(f"{self._name}: labels that differ by case alone are different labels: {same}")

    def _meant(self, ahead: Sequence[tuple[Place, Row]]) -> Callable[[str], str]:
        """What makes of a label as it is written the one that is meant."""
        if self.known.labels is None:
            return typed if self._all_typed(ahead) else str
        by_form: dict[str, list[str]] = {}
        for known in self.known.labels:
            by_form.setdefault(typed(known), []).append(known)
        single = {form: of[0] for form, of in by_form.items() if len(of) == 1}
        return lambda label: label if label in by_form.get(typed(label), ()) else single.get(typed(label), label)

    def _all_typed(self, ahead: Sequence[tuple[Place, Row]]) -> bool:
        """Whether a table of texts has labels that are all booleans, or all whole floats, by all of its rows."""
        if Path(Path(self.source).name.removesuffix(".gz")).suffix.lower() not in (".csv", ".tsv"):
            return False

        def labels(rows: Iterable[tuple[Place, Row]]) -> Iterator[str]:
            found = (
                to_record(self._of_kind(row), self.columns).get("label")
                for _, row in rows
                if row and isinstance(row, dict)
            )
            return (label.strip() for label in found if isinstance(label, str))

        return any(
            any(labels(ahead))
            and all(map(form, labels(ahead)))
            and all(map(form, labels(rows_of(self.source, _unsaid))))
            for form in (is_boolean, is_whole_float)
        )

    def _rows(self) -> Iterator[tuple[Place, Row]]:
        return rows_of(self.source, self._say)

    def _of_kind(self, row: Record) -> Record:
        """The row without fields of other kinds than are asked for, where it is then of this kind."""
        if self.known.kind is None:
            return row
        columns = {*self.options.columns().values(), *self.known.columns.values()}
        rest = of_kind(row, self.known.kind) | {name: row[name] for name in row if name in columns}
        return rest if obvious_kind([*map(str, rest)]) == self.known.kind else row

    def _find_columns(self, row: Record) -> None:
        given, named = self.options.columns(), self._option
        self._present = [str(column) for column in row]
        self.columns = find_columns(self._name, self._present, given, self.known.columns, named)
        if text := said_of(self.columns, given, self.known.columns, named):
            self._say(f"{self._name}: {text}")
        kind = record_kind(to_record(row, self.columns))
        if self.known.kind is None and kind and (others := other_kinds(row, kind)):
            also = " and ".join(KINDS[other] for other in others)
            self._say(f"{self._name}: read as records with {KINDS[kind]}; it also has {also} (--task to read them)")

    def _option(self, name: str) -> str:
        """What messages call the option that names a field's column."""
        return option(name)

    def _hint(self, problem: str) -> str:
        """What to do about a field that is missing because no column holds it."""
        if not problem.startswith("field '") or ": missing" not in problem:
            return ""
        name = problem.split("'")[1]
        unknown = name not in self.columns and name not in self._present
        return missing_hint(name, self._present) if unknown else ""


def read_records(
    source: str | Path,
    options: ReadingOptions = ReadingOptions(),  # noqa: B008  # frozen
    *,
    known: Known = Known(),  # frozen
    require_labels: bool = True,
) -> list[Record]:
    """Read and check labelled records, given as for `Reader`.

    In a table, ``choices`` is a JSON list, or columns ``choice_0``, ``choice_1``, … Numbers and booleans as labels
    become texts; an answer may be a letter, or the text of a choice. ``docs/data.md`` lists all forms.

    Returns:
        The records, all of one kind, with extra fields as they are.

    Raises:
        DataError: lists every problem with file, line, field and value.
    """
    return [*Reader(source, options, known=known, require_labels=require_labels)]


def read_batches(
    source: str | Path,
    size: int,
    options: ReadingOptions = ReadingOptions(),  # noqa: B008  # frozen
    *,
    known: Known = Known(),  # frozen
    require_labels: bool = True,
) -> Iterator[list[Record]]:
    """The records of `read_records`, ``size`` at a time.

    A file is checked whole before its first batch, and read again for them: but for .json and .yml, memory holds a
    batch, however long the file is. Standard input is a stream: it is read and checked a batch at a time, so that
    answers don't wait for its end.

    Raises:
        DataError: as `read_records`.
    """
    read = partial(Reader, source, options, known=known, require_labels=require_labels)
    stream = str(source) == "-"
    if not stream:
        for _ in read():
            pass
    reader = read(silent=not stream, ahead=size if stream else _AHEAD)
    rows = reader.checked()
    while batch := [*islice(rows, size)]:
        problems = Problems()
        for place, _, found in batch:
            problems.add(place, found)
        reader.report(problems, right=True)
        if records := [record for _, record, found in batch if not found]:
            yield records


def _unsaid(text: str) -> None:
    """Say nothing."""


def _fields(rows: Iterable[Record]) -> Record:
    """All fields of the rows, with the first value of each that isn't null."""
    found: Record = {}
    for row in rows:
        found |= {name: value for name, value in row.items() if found.get(name) is None}
    return found


def _same_but_for_case(labels: set[str]) -> str:
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        groups.setdefault(label.casefold(), []).append(label)
    same = [" and ".join(map(quoted, group)) for group in groups.values() if len(group) > 1]
    return ", ".join(same[:5]) + (f" and {len(same) - 5} more" if len(same) > 5 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

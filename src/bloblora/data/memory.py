"""Records from what Python programs hold in memory."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .columns import find_columns, said_of, to_record
from .records import DataError, Record, record_kind, record_problems
from .sources import with_names

_log = logging.getLogger("bloblora")

IN_MEMORY = "in memory"
"""What a run's files say of records that came from no file."""


def as_records(source: Any, *, texts_are: str = "text", require_labels: bool = False) -> list[Record]:
    """Records of whatever holds them.

    Args:
        source: a list of dicts, of texts, or of both; a pandas or Polars table, of which each row is a record; a
            ``datasets.Dataset``, whose ``ClassLabel`` columns become names; a column of texts; one dict or text.
        texts_are: the field that a text alone stands for: ``text``, or ``prompt`` where the model writes.
        require_labels: whether each record must have its label or answer.

    Returns:
        The records, with extra fields as they are. As in tables on the disk, numbers as labels become texts, an answer
        may be a letter, and what is null is missing.

    Raises:
        DataError: lists every problem with row, field and value; or ``source`` is nothing that holds records.
    """
    records: list[Record] = []
    problems: list[str] = []
    columns: dict[str, str] | None = None
    for number, row in enumerate(_rows(source), start=1):
        row = {texts_are: str(row)} if isinstance(row, str) else row
        if not isinstance(row, Mapping):
            problems.append(f"row {number}: {row!r} is neither a dict nor a text")
            continue
        if columns is None:
            columns = find_columns("the records", [*map(str, row)], {})
            if said := said_of(columns, {}, {}):
                _log.info(f"the records: {said}")
        records.append(to_record({str(name): _plain(value) for name, value in row.items()}, columns))
        found = record_problems(records[-1], record_kind(records[-1]), require_answer=require_labels)
        problems += [f"row {number}: {problem}" for problem in found]
    if problems:
        raise DataError(problems)
    return records


def _rows(source: Any) -> Iterator[Any]:
    if isinstance(source, Mapping) and any(hasattr(value, "column_names") for value in source.values()):
        raise DataError([f"the data has several splits; give one of {', '.join(map(repr, source))}"])
    if isinstance(source, str | Mapping):
        yield source
    elif hasattr(source, "to_dicts"):  # Polars
        yield from source.to_dicts()
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        yield from source.to_dict("records")
    elif hasattr(source, "column_names"):
        yield from _dataset_rows(source)
    elif isinstance(source, Iterable) and not isinstance(source, bytes):
        yield from source
    else:
        kinds = "a list of dicts or texts, a table, or a datasets.Dataset"
        raise DataError([f"{source!r} of type {type(source).__name__} holds no records; give {kinds}"])


def _dataset_rows(source: Any) -> Iterator[Record]:
    """Rows of a `datasets.Dataset`, with its classes by name."""
    names = {name: feature.names for name, feature in (source.features or {}).items() if hasattr(feature, "names")}
    return (with_names(row, names) for row in source)


def _plain(value: Any) -> Any:
    """A cell of a table as Python has it: numpy's numbers and arrays, and what pandas has for null."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    return value.tolist() if hasattr(value, "tolist") else value

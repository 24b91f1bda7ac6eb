"""Records from what Python programs hold in memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..messages import quoted
from .columns import ReadingOptions
from .reading import Known, Reader
from .records import DataError, Place, Record
from .sources import Row, with_names

IN_MEMORY = "in memory"
"""What a run's files say of records that came from no file."""


def as_records(
    source: Any,
    options: ReadingOptions = ReadingOptions(),  # noqa: B008  # frozen
    *,
    known: Known = Known(),  # noqa: B008  # frozen
    require_labels: bool = False,
) -> list[Record]:
    """Records of whatever holds them.

    Args:
        source: a list of dicts, of texts, or of both; a pandas or Polars table, of which each row is a record; a
            ``datasets.Dataset``, whose ``ClassLabel`` columns, also of lists, become names; a column of texts; one dict
            or text. A text alone is a ``text``, or a ``prompt`` where the records are known to be for writing.
        options: which columns hold the fields, and whether rows that can't be used are left out.
        known: of the records, as of a run.
        require_labels: whether each record must have its label or answer.

    Returns:
        The records, with extra fields as they are. As in tables on the disk, numbers as labels become texts, labels
        lose white space around them, an answer may be a letter, and what is null is missing.

    Raises:
        DataError: lists every problem with rows, field and value; or ``source`` is nothing that holds records.
    """
    rows = [*_rows(source)]
    return [*_Held(rows, options, known=known, require_labels=require_labels)] if rows else []


class _Held(Reader):
    """The records of rows in memory, of which there is at least one."""

    def __init__(self, rows: Sequence[Any], options: ReadingOptions, **how: Any) -> None:
        super().__init__("the records", options, **how)
        self._given = rows

    def _rows(self) -> Iterator[tuple[Place, Row]]:
        alone = "prompt" if self.known.kind == "generation" else "text"
        for number, row in enumerate(self._given, start=1):
            row = {alone: str(row)} if isinstance(row, str) else row
            if isinstance(row, Mapping):
                yield ("row ", number), {str(name): _plain(value) for name, value in row.items()}
            else:
                yield ("row ", number), f"{quoted(row)} is neither a dict nor a text"

    def _option(self, name: str) -> str:
        return f"{name}_column"


def _rows(source: Any) -> Iterator[Any]:
    if isinstance(source, Mapping) and any(hasattr(value, "column_names") for value in source.values()):
        raise DataError([f"the data has several splits; give one of {', '.join(map(quoted, source))}"])
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
        raise DataError([f"{quoted(source)} of type {type(source).__name__} holds no records; give {kinds}"])


def _dataset_rows(source: Any) -> Iterator[Record]:
    """Rows of a `datasets.Dataset`, with its classes by name."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in (source.features or {}).items()}
    names = {name: feature.names for name, feature in inner.items() if hasattr(feature, "names")}
    return (with_names(row, names) for row in source)


def _plain(value: Any) -> Any:
    """A cell of a table as Python has it: numpy's numbers and arrays, and what pandas has for null."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    return value.tolist() if hasattr(value, "tolist") else value

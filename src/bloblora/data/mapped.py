"""Rows that stay on the disk, for data that needn't fit into memory."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

Row = dict[str, Any]
_COLUMN = "json"
_ROWS_AT_A_TIME = 1000


class MappedRows(Sequence[Row]):
    """The rows of a file that `write_rows` wrote: mapped into memory, not read into it.

    A row is JSON in an Arrow column, because rows need not have the same fields.

    Args:
        file: Arrow.
    """

    def __init__(self, file: Path) -> None:
        from datasets import Dataset

        self._table: Any = Dataset.from_file(str(file))
        self._indices: Sequence[int] = range(len(self._table))

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "MappedRows": ...
    def __getitem__(self, index: int | slice) -> "Row | MappedRows":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self.__getitems__([index])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Row]:
        # By this name torch's DataLoader asks for a batch at once.
        return [json.loads(row) for row in self._table[[self._indices[i] for i in positions]][_COLUMN]]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _ROWS_AT_A_TIME):
            yield from self.__getitems__(range(len(self))[start : start + _ROWS_AT_A_TIME])

    def select(self, positions: Sequence[int]) -> "MappedRows":
        """The rows at these positions, in this order; the file stays as it is."""
        chosen = object.__new__(MappedRows)
        chosen._table, chosen._indices = self._table, [self._indices[i] for i in positions]
        return chosen


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write rows, one at a time, in the form that `MappedRows` maps; what a row holds must be what JSON takes."""
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({_COLUMN: Value("string")})
    with ArrowWriter(path=str(file), features=features, writer_batch_size=_ROWS_AT_A_TIME) as writer:
        for row in rows:
            writer.write({_COLUMN: json.dumps(row)})
        writer.finalize()

"""Labelled records: files, what is in memory, the paper's public sets, and the embedded support desk."""

from .columns import ReadingOptions
from .memory import IN_MEMORY, as_records
from .reading import Known, Reader, read_batches, read_records
from .records import KINDS, DataError, MappedRows, kind_of, unanswered, write_rows
from .sets import PAPER_SETS, SPLITS, hub_source, support_desk

__all__ = [
    "IN_MEMORY",
    "KINDS",
    "PAPER_SETS",
    "SPLITS",
    "DataError",
    "Known",
    "MappedRows",
    "Reader",
    "ReadingOptions",
    "as_records",
    "hub_source",
    "kind_of",
    "read_batches",
    "read_records",
    "support_desk",
    "unanswered",
    "write_rows",
]

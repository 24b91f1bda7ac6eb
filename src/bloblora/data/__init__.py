"""Labelled records: files, the paper's public sets, and the embedded support desk."""

from .columns import ReadingOptions
from .reading import Reader, read_batches, read_records
from .records import KINDS, DataError, MappedRows, kind_of, unanswered, write_rows
from .sets import PAPER_SETS, SPLITS, hub_source, support_desk

__all__ = [
    "KINDS",
    "PAPER_SETS",
    "SPLITS",
    "DataError",
    "MappedRows",
    "Reader",
    "ReadingOptions",
    "hub_source",
    "kind_of",
    "read_batches",
    "read_records",
    "support_desk",
    "unanswered",
    "write_rows",
]

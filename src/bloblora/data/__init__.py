"""Labelled records: files, the paper's public sets, and the embedded support desk."""

from .reading import read_batches, read_each, read_records
from .records import KINDS, DataError, MappedRows, kind_of, unanswered, write_rows
from .sets import PAPER_SETS, SPLITS, hub_source, support_desk

__all__ = [
    "KINDS",
    "PAPER_SETS",
    "SPLITS",
    "DataError",
    "MappedRows",
    "hub_source",
    "kind_of",
    "read_batches",
    "read_each",
    "read_records",
    "support_desk",
    "unanswered",
    "write_rows",
]

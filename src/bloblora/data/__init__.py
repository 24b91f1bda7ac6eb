"""Labelled records: files, the paper's public sets, and the embedded support desk."""

from .mapped import MappedRows, write_rows
from .paper import PAPER_SETS
from .records import DataError, kind_of, read_batches, read_each, read_records
from .support_desk import SPLITS, support_desk

__all__ = [
    "PAPER_SETS",
    "SPLITS",
    "DataError",
    "MappedRows",
    "kind_of",
    "read_batches",
    "read_each",
    "read_records",
    "support_desk",
    "write_rows",
]

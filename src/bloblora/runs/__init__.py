"""A run: one fine-tuned adapter in one folder, from data file to saved adapter and back.

The folder holds the adapter (see `bloblora.adapter.storage`), ``task.json`` (how records become logits),
``run.json`` (the whole configuration, and what the training took) and, while it lasts, ``checkpoints/``.
"""

from ..files import write_json
from .approximation import Approximation
from .checks import check_kind, targets_of
from .config import RunConfig, RunError, different
from .distance import fit_distance, open_distance, training_records
from .evaluate import describe, evaluate
from .folder import RunDescription, alone, check_writable, open_run
from .importing import import_adapter
from .processes import CHUNK, check_alone, join_parts, part_of, processes, share_of
from .run import CodeOptions, PredictionOptions, Run, load_run
from .selection import select, unused
from .train import peak_memory, train

__all__ = [
    "CHUNK",
    "Approximation",
    "CodeOptions",
    "PredictionOptions",
    "Run",
    "RunConfig",
    "RunDescription",
    "RunError",
    "alone",
    "check_alone",
    "check_kind",
    "check_writable",
    "describe",
    "different",
    "evaluate",
    "fit_distance",
    "import_adapter",
    "join_parts",
    "load_run",
    "open_distance",
    "open_run",
    "part_of",
    "peak_memory",
    "processes",
    "select",
    "share_of",
    "targets_of",
    "train",
    "training_records",
    "unused",
    "write_json",
]

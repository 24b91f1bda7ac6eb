"""A run: one fine-tuned adapter in one folder, from data file to saved adapter and back.

The folder holds the adapter (see `bloblora.adapter.storage`), ``task.json`` (how records become logits),
``run.json`` (the whole configuration, and what the training took) and, while it lasts, ``checkpoints/``.
"""

from ..files import write_json
from .approximation import check_approximation
from .checks import check_kind, check_samples
from .config import RunError, TrainConfig
from .evaluate import describe, evaluate, targets_of
from .folder import RunDescription, check_writable, open_run
from .lines import CHUNK, join_parts, part_of, share_of
from .processes import check_alone, processes
from .run import Run, load_run
from .train import peak_memory, select, train, unused

__all__ = [
    "CHUNK",
    "Run",
    "RunDescription",
    "RunError",
    "TrainConfig",
    "check_alone",
    "check_approximation",
    "check_kind",
    "check_samples",
    "check_writable",
    "describe",
    "evaluate",
    "join_parts",
    "load_run",
    "open_run",
    "part_of",
    "peak_memory",
    "processes",
    "select",
    "share_of",
    "targets_of",
    "train",
    "unused",
    "write_json",
]

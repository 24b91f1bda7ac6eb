"""A run: one fine-tuned adapter in one folder, from data file to saved adapter and back.

The folder holds the adapter (see `bloblora.adapter.storage`), ``task.json`` (how records become logits),
``run.json`` (the whole configuration, and what the training took) and, while it lasts, ``checkpoints/``.
"""

from ..files import write_json
from .checks import check_kind, check_samples
from .config import RunError, TrainConfig
from .evaluate import describe, evaluate, targets_of
from .folder import RunDescription, check_writable, open_run
from .run import Run, load_run
from .train import peak_memory, select, train

__all__ = [
    "Run",
    "RunDescription",
    "RunError",
    "TrainConfig",
    "check_kind",
    "check_samples",
    "check_writable",
    "describe",
    "evaluate",
    "load_run",
    "open_run",
    "peak_memory",
    "select",
    "targets_of",
    "train",
    "write_json",
]

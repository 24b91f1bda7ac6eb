"""Training on the evidence lower bound with transformers' own loop."""

from typing import TYPE_CHECKING, Any

from .arguments import (
    OBJECTIVE,
    BlobTrainingArguments,
    Objective,
    check_style,
)
from .callbacks import PosteriorHistograms
from .checkpoints import last_checkpoint
from .divergence import DivergedError

if TYPE_CHECKING:
    from .trainer import BlobTrainer, BlobTrainerMixin
else:

    def __getattr__(name: str) -> Any:
        """Import the Trainer, which takes a second, when it is first used: what predicts doesn't need it."""
        if name not in ("BlobTrainer", "BlobTrainerMixin"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import trainer

        return getattr(trainer, name)


__all__ = [
    "OBJECTIVE",
    "BlobTrainer",
    "BlobTrainerMixin",
    "BlobTrainingArguments",
    "DivergedError",
    "Objective",
    "PosteriorHistograms",
    "check_style",
    "last_checkpoint",
]

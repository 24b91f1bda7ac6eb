"""Training on the evidence lower bound with transformers' own loop."""

from typing import TYPE_CHECKING, Any

from .arguments import (
    OBJECTIVE,
    BlobTrainingArguments,
    Objective,
    check_positive,
    check_std_learning_rate,
    check_style,
    kl_weight,
    rescaled_dataset_size,
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
    "check_positive",
    "check_std_learning_rate",
    "check_style",
    "kl_weight",
    "last_checkpoint",
    "rescaled_dataset_size",
]

"""Training on the evidence lower bound with transformers' own loop."""

from .arguments import (
    OBJECTIVE,
    BlobTrainingArguments,
    Objective,
    check_positive,
    check_style,
    kl_weight,
    rescaled_dataset_size,
)
from .callbacks import PosteriorHistograms
from .checkpoints import last_checkpoint
from .divergence import DivergedError
from .trainer import BlobTrainer, BlobTrainerMixin

__all__ = [
    "OBJECTIVE",
    "BlobTrainer",
    "BlobTrainerMixin",
    "BlobTrainingArguments",
    "DivergedError",
    "Objective",
    "PosteriorHistograms",
    "check_positive",
    "check_style",
    "kl_weight",
    "last_checkpoint",
    "rescaled_dataset_size",
]

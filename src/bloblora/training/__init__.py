"""Training on the evidence lower bound with transformers' own loop."""

from .arguments import BlobTrainingArguments, check_style
from .checkpoints import last_checkpoint
from .divergence import DivergedError
from .histograms import PosteriorHistograms
from .kl_weights import kl_weight, rescaled_dataset_size
from .trainer import BlobTrainer

__all__ = [
    "BlobTrainer",
    "BlobTrainingArguments",
    "DivergedError",
    "PosteriorHistograms",
    "check_style",
    "kl_weight",
    "last_checkpoint",
    "rescaled_dataset_size",
]

"""Bayesian low-rank adaptation for language models."""

from .adapter import BlobConfig, Posterior, bayesianize, find_posterior, load, save
from .generation import Generation, posterior_generate
from .prediction import Prediction, predict
from .runs.pipeline import pipeline
from .training import BlobTrainer, BlobTrainerMixin, BlobTrainingArguments

__version__ = "0.2.0"

__all__ = [
    "BlobConfig",
    "BlobTrainer",
    "BlobTrainerMixin",
    "BlobTrainingArguments",
    "Generation",
    "Posterior",
    "Prediction",
    "bayesianize",
    "find_posterior",
    "load",
    "pipeline",
    "posterior_generate",
    "predict",
    "save",
]

"""Bayesian low-rank adaptation for language models."""

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .adapter import BlobConfig, Posterior, find_posterior, load, save
    from .adapter.bayesianize import bayesianize
    from .generation import Generation, posterior_generate
    from .prediction import Prediction, predict
    from .runs.pipeline import pipeline
    from .training import BlobTrainer, BlobTrainerMixin, BlobTrainingArguments
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "adapter": ("BlobConfig", "Posterior", "bayesianize", "find_posterior", "load", "save"),
            "generation": ("Generation", "posterior_generate"),
            "prediction": ("Prediction", "predict"),
            "runs.pipeline": ("pipeline",),
            "training": ("BlobTrainer", "BlobTrainerMixin", "BlobTrainingArguments"),
        },
    )

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

"""Bayesian low-rank adaptation for language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import BlobConfig, Posterior, find_posterior, load, save
    from .adapter.bayesianize import bayesianize
    from .generation import Generation, posterior_generate
    from .prediction import Prediction, predict, set_temperature
    from .runs.pipeline import pipeline
    from .training import BlobTrainer, BlobTrainerMixin, BlobTrainingArguments

_PLACES = {
    "adapter": ("BlobConfig", "Posterior", "bayesianize", "find_posterior", "load", "save"),
    "generation": ("Generation", "posterior_generate"),
    "prediction": ("Prediction", "predict", "set_temperature"),
    "runs.pipeline": ("pipeline",),
    "training": ("BlobTrainer", "BlobTrainerMixin", "BlobTrainingArguments"),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used, and with it PyTorch and Transformers (PEP 562)."""
        for module, names in _PLACES.items():
            if name in names:
                return globals().setdefault(name, getattr(import_module(f".{module}", __name__), name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
    "set_temperature",
]

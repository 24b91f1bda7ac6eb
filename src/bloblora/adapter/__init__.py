"""A posterior inside a PEFT model: configuration, the LoRA variant, saving and loading."""

from .bayesianize import Posterior, bayesianize, find_posterior
from .config import BlobConfig
from .storage import AdapterFileError, check_folder, load, load_posterior, save, save_posterior

__all__ = [
    "AdapterFileError",
    "BlobConfig",
    "Posterior",
    "bayesianize",
    "check_folder",
    "find_posterior",
    "load",
    "load_posterior",
    "save",
    "save_posterior",
]

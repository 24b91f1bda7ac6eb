"""A posterior inside a PEFT model: configuration, the LoRA variant, saving and loading."""

from .bayesianize import Posterior, bayesianize, debayesianize, find_posterior
from .config import BlobConfig
from .storage import (
    AdapterFileError,
    check_folder,
    continue_from,
    library_versions,
    load,
    load_beside,
    load_posterior,
    matching,
    posterior_config,
    save,
    save_posterior,
)
from .variant import UnevenPartsError

__all__ = [
    "AdapterFileError",
    "BlobConfig",
    "Posterior",
    "UnevenPartsError",
    "bayesianize",
    "check_folder",
    "continue_from",
    "debayesianize",
    "find_posterior",
    "library_versions",
    "load",
    "load_beside",
    "load_posterior",
    "matching",
    "posterior_config",
    "save",
    "save_posterior",
]

"""Where base models come from: a hub id, a folder, a GGUF file, or the bundled default."""

from .bundled import DEFAULT_MODEL, ModelError, cache_folder
from .loading import layer_names, load_model, load_tokenizer, resolve

__all__ = ["DEFAULT_MODEL", "ModelError", "cache_folder", "layer_names", "load_model", "load_tokenizer", "resolve"]

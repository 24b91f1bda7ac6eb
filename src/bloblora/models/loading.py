"""Names to models and tokenizers."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .bundled import DEFAULT_MODEL, ModelError, bundled_model, cache_folder, convert_gguf, gguf_folder

# what transformers raises for a model that is away, damaged, of an unknown type, or in need of another library
_UNREADABLE = (ImportError, OSError, ValueError, LookupError, RuntimeError, SafetensorError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str, *, cache: Path | None = None, progress: bool = True) -> str:
    """What ``from_pretrained`` takes for a model's name: a local folder, or a hub id.

    Args:
        name: ``smollm2-135m``, a folder, a .gguf file, or a hub id.
        cache: where conversions are kept; default `cache_folder`.
        progress: show what takes time.

    Raises:
        ModelError: a file that isn't there or can't be read.
    """
    cache = cache or cache_folder()
    if name == DEFAULT_MODEL:
        return str(bundled_model(cache, progress=progress))
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {name!r}: no such file")
        return str(convert_gguf(path, gguf_folder(path, cache), progress=progress))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model {name!r}: the folder has no config.json")
        return str(path)
    if path.is_file():
        raise ModelError(f"model {name!r}: a file, but not a .gguf one; give a folder, a .gguf file or a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model {name!r}: no such folder")
    return name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model; where it has no pad token, the end-of-text token serves.

    Raises:
        ModelError: it can't be had.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    except _UNREADABLE as error:
        raise _unavailable(name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(name: str, *, num_labels: int | None = None, dtype: str = "float32") -> PreTrainedModel:
    """Base model: a causal language model, or with ``num_labels`` one with a fresh classification head.

    The head is drawn from torch's global generator, so seed it before.

    Raises:
        ModelError: it can't be had, or ``dtype`` is unknown.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = resolve(name)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that the head is new, which is what was asked for
    try:
        if num_labels is None:
            return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=DTYPES[dtype], num_labels=num_labels)
    except _UNREADABLE as error:
        raise _unavailable(name, error) from error
    finally:
        logging.set_verbosity(verbosity)
    model.config.pad_token_id = load_tokenizer(name).pad_token_id
    return model


def layer_names(name: str, *, num_labels: int | None = None) -> list[str]:
    """Names of a base model's modules, without its weights.

    Raises:
        ModelError: it can't be had.
    """
    kind: Any = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(resolve(name), **({} if num_labels is None else {"num_labels": num_labels}))
        with torch.device("meta"):
            return [layer for layer, _ in kind.from_config(config).named_modules()]
    except _UNREADABLE as error:
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: Exception) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"model {name!r} can't be loaded: {reason} (give {DEFAULT_MODEL!r}, a hub id, a folder, or a .gguf file)"
    )

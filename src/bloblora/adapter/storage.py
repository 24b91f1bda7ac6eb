"""A Bayesian adapter on disk: a stock LoRA of the mean, and the posterior beside it.

``adapter_config.json`` and ``adapter_model.safetensors`` are what PEFT writes for the mean: any LoRA server loads them
(N = 0). ``posterior.safetensors`` holds the unconstrained Ω of each layer, ``blob_config.json`` what they mean and the
hashes by which a torn, mixed or altered folder is recognized.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .bayesianize import Posterior, bayesianize, find_posterior
from .config import BlobConfig

FORMAT_VERSION = 1
MEAN_CONFIG, MEAN_FILE = "adapter_config.json", "adapter_model.safetensors"
BLOB_CONFIG, POSTERIOR_FILE = "blob_config.json", "posterior.safetensors"
_LIBRARIES = ("bloblora", "torch", "transformers", "peft")


class AdapterFileError(ValueError):
    """A file of a saved adapter is missing, truncated, altered, or belongs to another adapter or model."""


def save(
    model: PeftModel,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    save_embedding_layers: bool = False,
) -> None:
    """Write an adapter, Bayesian or plain, so that a reader never sees half a file.

    Everything is written to a folder beside ``directory`` first and moved in when it is complete; the file with the
    hashes moves last, so that a write that was cut off between two moves is noticed by `load`.

    Args:
        model: the PEFT model.
        directory: where to; made where it is missing, other files in it stay.
        adapter_name: which adapter; default the active one.
        save_embedding_layers: also write the base model's embeddings (needed only where they were resized or trained).
    """
    adapter_name = adapter_name or model.active_adapter
    posterior = find_posterior(model, adapter_name)
    with _staged(Path(directory)) as staging:
        model.save_pretrained(
            str(staging), selected_adapters=[adapter_name], save_embedding_layers=save_embedding_layers
        )
        if adapter_name != "default":  # PEFT puts other adapters in a folder of their name
            for file in (staging / adapter_name).iterdir():
                file.rename(staging / file.name)
            (staging / adapter_name).rmdir()
        if posterior is not None:
            save_posterior(posterior, staging)


def load(
    base_model: PreTrainedModel,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter that `save` wrote onto its base model; the posterior with it, where the folder has one.

    Returns:
        The PEFT model, in eval mode; ``find_posterior(model)`` is its posterior.

    Raises:
        AdapterFileError: a file is missing, truncated, altered or doesn't belong to the others or to ``base_model``.
    """
    directory = Path(directory)
    check_folder(directory)
    try:
        model = PeftModel.from_pretrained(base_model, str(directory), adapter_name, is_trainable=is_trainable)
    except (RuntimeError, ValueError) as error:
        raise AdapterFileError(f"{directory}: this adapter doesn't fit {type(base_model).__name__}: {error}") from error
    if (directory / BLOB_CONFIG).exists():
        bayesianize(model, _read_config(directory), adapter_name)
        load_posterior(model, directory, adapter_name)
    return model.eval()


@torch.no_grad()
def load_posterior(model: PeftModel, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Posterior:
    """Copy a saved Ω into the posterior that ``model`` has already.

    Raises:
        AdapterFileError: as for `load`, or layers or shapes differ from the model's.
    """
    directory = Path(directory)
    check_folder(directory)
    posterior = find_posterior(model, adapter_name)
    if posterior is None:
        raise AdapterFileError(
            f"{directory}: the model's adapter isn't Bayesian, so {POSTERIOR_FILE} has no place in it"
        )
    saved, wanted = _read_tensors(directory / POSTERIOR_FILE), posterior.named_std_parameters()
    if saved.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
        raise AdapterFileError(
            f"{directory / POSTERIOR_FILE}: its layers aren't the model's; missing {missing[:3]}, unknown {extra[:3]}"
        )
    for name, parameter in wanted.items():
        if saved[name].shape != parameter.shape:
            raise AdapterFileError(
                f"{directory / POSTERIOR_FILE}: {name} has shape {tuple(saved[name].shape)}, "
                f"the model's has {tuple(parameter.shape)}"
            )
        parameter.copy_(saved[name])
    return posterior


def check_folder(directory: Path) -> None:
    """Check all that can be checked without a model.

    Raises:
        AdapterFileError: a file is missing, truncated, altered, or doesn't belong to the others.
    """
    if not directory.is_dir():
        raise AdapterFileError(f"{directory}: no such folder")
    for name in (MEAN_CONFIG, MEAN_FILE):
        if not (directory / name).is_file():
            raise AdapterFileError(f"{directory}: {name} is missing; a saved adapter has it")
    mean = _read_tensors(directory / MEAN_FILE)
    bayesian = [(directory / name).is_file() for name in (BLOB_CONFIG, POSTERIOR_FILE)]
    if not any(bayesian):
        return
    if not all(bayesian):
        lost, kept = (BLOB_CONFIG, POSTERIOR_FILE) if bayesian[1] else (POSTERIOR_FILE, BLOB_CONFIG)
        raise AdapterFileError(f"{directory}: {lost} is missing although {kept} is there; restore it or save again")
    description = _read_json(directory / BLOB_CONFIG)
    for name, key, tensors in (
        (MEAN_FILE, "mean_sha256", mean),
        (POSTERIOR_FILE, "posterior_sha256", _read_tensors(directory / POSTERIOR_FILE)),
    ):
        if (found := _content_hash(tensors)) != description.get(key):
            raise AdapterFileError(
                f"{directory / name}: its SHA-256 is {found}, but {BLOB_CONFIG} ({key}) says {description.get(key)!r}: "
                "the file was altered, or comes from another save"
            )


def save_posterior(posterior: Posterior, directory: str | os.PathLike[str]) -> None:
    """Write a posterior beside the mean that PEFT has saved in ``directory``."""
    directory = Path(directory)
    tensors = {name: p.detach().cpu().contiguous() for name, p in posterior.named_std_parameters().items()}
    save_file(tensors, directory / POSTERIOR_FILE, metadata={"format": "pt"})
    description = {
        "format_version": FORMAT_VERSION,
        "prior": {"family": "normal", "std": posterior.config.prior_std},
        "config": posterior.config.to_dict(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "mean_sha256": _content_hash(load_file(directory / MEAN_FILE)),
        "posterior_sha256": _content_hash(tensors),
    }
    (directory / BLOB_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _read_config(directory: Path) -> BlobConfig:
    file = directory / BLOB_CONFIG
    description = _read_json(file)
    if (found := description.get("format_version")) != FORMAT_VERSION:
        raise AdapterFileError(f"{file}: format_version is {found!r}; this bloblora reads {FORMAT_VERSION}")
    try:
        return BlobConfig(**description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{file}: field 'config' can't be used: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{file}: not readable as safetensors (truncated?): {error}") from error


def _content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes: independent of the order and layout of the file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A folder to write into; its files move into ``directory`` when the block ends without an error."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as name:
        staging = Path(name)
        yield staging
        for file in sorted(staging.iterdir(), key=lambda file: file.name == BLOB_CONFIG):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, directory / file.name)

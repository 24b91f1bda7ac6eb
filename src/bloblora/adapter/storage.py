"""A Bayesian adapter on disk: a stock LoRA of the mean, and the posterior beside it.

``adapter_config.json`` and ``adapter_model.safetensors`` are what PEFT writes for the mean: any LoRA server loads them
(N = 0). ``posterior.safetensors`` holds the unconstrained Ω of each layer, ``blob_config.json`` what they mean and the
hashes, its own among them, by which a torn, mixed or altered folder is recognized.

Several files can't be replaced at once, so a save goes through two hidden folders inside the directory::

    .saving/   being written             a kill here: the old files are untouched, the next save starts over
    .saved/    complete, moved in        a kill here: `load` reads this folder, the next save finishes the move
"""

import hashlib
import json
import os
import shutil
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

from ..files import read_json
from .bayesianize import Posterior, bayesianize, find_posterior
from .config import BlobConfig
from .sharding import is_sharded, put_
from .variant import STD_PARAMETER

FORMAT_VERSION = 2
MEAN_CONFIG, MEAN_FILE = "adapter_config.json", "adapter_model.safetensors"
BLOB_CONFIG, POSTERIOR_FILE = "blob_config.json", "posterior.safetensors"
_README = "README.md"
_SAVING, _SAVED = ".saving", ".saved"
_LIBRARIES = ("bloblora", "torch", "transformers", "peft")
_HASHED = {"mean_config_sha256": MEAN_CONFIG, "mean_sha256": MEAN_FILE, "posterior_sha256": POSTERIOR_FILE}
_DESCRIPTION = ("format_version", "prior", "config", "libraries", *_HASHED, "sha256")
_SETS = ("target_modules", "exclude_modules")


class AdapterFileError(ValueError):
    """A file of a saved adapter is missing, truncated, altered, or belongs to another adapter or model."""


def save(
    model: PeftModel,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    save_embedding_layers: bool = False,
) -> None:
    """Write an adapter, Bayesian or plain, in place of the one that ``directory`` may hold.

    However a save ends (an error, a kill), `load` then finds the whole old adapter or the whole new one. One process
    saves to a directory at a time.

    Args:
        model: the PEFT model.
        directory: where to; made where it is missing. Files that aren't the adapter's stay, a README.md too.
        adapter_name: which adapter; default the active one.
        save_embedding_layers: also write the base model's embeddings (needed only where they were resized or trained).

    Raises:
        ValueError: FSDP has split the adapter over the processes.
    """
    if is_sharded(model):
        raise ValueError("model: each process holds a part of it (FSDP); call BlobTrainer.save_model in all of them")
    adapter_name = adapter_name or model.active_adapter
    posterior = find_posterior(model, adapter_name)
    with _replacing(Path(directory)) as staging:
        model.save_pretrained(
            str(staging), selected_adapters=[adapter_name], save_embedding_layers=save_embedding_layers
        )
        if adapter_name != "default":  # PEFT puts other adapters in a folder of their name
            for file in (staging / adapter_name).iterdir():
                file.rename(staging / file.name)
            (staging / adapter_name).rmdir()
        _sort_sets(staging / MEAN_CONFIG)
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

    As always with PEFT, an adapter saved in half precision comes back in float32, with the same values.

    Args:
        base_model: the model that the adapter was trained on; the adapter is put into it.
        directory: where from.
        adapter_name: what to call the adapter in the model, whatever it was called when saved.
        is_trainable: whether training goes on: A, B and Ω then require gradients.

    Returns:
        The PEFT model, in eval mode; ``find_posterior(model)`` is its posterior.

    Raises:
        AdapterFileError: a file is missing, truncated, altered or doesn't belong to the others or to ``base_model``.
    """
    folder = check_folder(directory)
    try:
        model = PeftModel.from_pretrained(base_model, str(folder), adapter_name, is_trainable=is_trainable)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(
            f"{folder}: this adapter doesn't fit {type(base_model).__name__}; load it onto the model that it was "
            f"trained on: {error}"
        ) from error
    if (folder / BLOB_CONFIG).exists():
        posterior = bayesianize(model, BlobConfig(**_read_description(folder / BLOB_CONFIG)["config"]), adapter_name)
        _copy_std_parameters(folder / POSTERIOR_FILE, posterior)
    return model.eval()


def load_posterior(model: PeftModel, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Posterior:
    """Copy a saved Ω into the posterior that ``model`` has already.

    The posterior keeps its own prior and estimator; its ``std_parameterization`` must be the saved one.

    Raises:
        AdapterFileError: as for `load`, or layers, shapes or parameterization differ from the model's.
    """
    folder = check_folder(directory)
    posterior = find_posterior(model, adapter_name)
    if posterior is None:
        raise AdapterFileError(f"{folder}: the model's adapter isn't Bayesian, so {POSTERIOR_FILE} has no place in it")
    if not (folder / BLOB_CONFIG).exists():
        raise AdapterFileError(f"{folder}: {BLOB_CONFIG} is missing: this is a plain LoRA, which has no posterior")
    saved = _read_description(folder / BLOB_CONFIG)["config"]["std_parameterization"]
    if saved != (wanted := posterior.config.std_parameterization):
        raise AdapterFileError(
            f"{folder / BLOB_CONFIG}: std_parameterization is {saved!r}, the model's posterior has {wanted!r}; "
            f"bayesianize the model with BlobConfig(std_parameterization={saved!r})"
        )
    _copy_std_parameters(folder / POSTERIOR_FILE, posterior)
    return posterior


def check_folder(directory: str | os.PathLike[str]) -> Path:
    """Check all that can be checked without a model.

    Returns:
        The folder to read: ``directory``, or a complete newer save in it that a killed process didn't finish moving.

    Raises:
        AdapterFileError: a file is missing, truncated, altered, or doesn't belong to the others.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: no such folder; give one that an adapter was saved to")
    if (folder / _SAVED).is_dir():
        folder = folder / _SAVED
    for name in (MEAN_CONFIG, MEAN_FILE):
        if not (folder / name).is_file():
            raise AdapterFileError(f"{folder}: {name} is missing; a saved adapter has it")
    read_json(folder / MEAN_CONFIG, AdapterFileError)
    hashes = {"mean_sha256": _content_hash(_read_tensors(folder / MEAN_FILE))}
    bayesian = [(folder / name).is_file() for name in (BLOB_CONFIG, POSTERIOR_FILE)]
    if not any(bayesian):
        return folder
    if not all(bayesian):
        lost, kept = (BLOB_CONFIG, POSTERIOR_FILE) if bayesian[1] else (POSTERIOR_FILE, BLOB_CONFIG)
        raise AdapterFileError(f"{folder}: {lost} is missing although {kept} is there; restore it or save again")
    description = _read_description(folder / BLOB_CONFIG)
    hashes["mean_config_sha256"] = _mean_config_hash(folder / MEAN_CONFIG)
    hashes["posterior_sha256"] = _content_hash(_read_tensors(folder / POSTERIOR_FILE))
    for key, name in _HASHED.items():
        if description[key] != hashes[key]:
            raise AdapterFileError(
                f"{folder / name}: its SHA-256 is {hashes[key]}, but {BLOB_CONFIG} ({key}) says {description[key]!r}: "
                "the file was altered, or comes from another save; restore it or save again"
            )
    return folder


def save_posterior(posterior: Posterior, directory: str | os.PathLike[str]) -> None:
    """Write a posterior beside the mean that PEFT has saved in ``directory``, and make that a stock LoRA."""
    directory = Path(directory)
    mean, std_parameters = _split(directory / MEAN_FILE)
    save_file(mean, directory / MEAN_FILE, metadata={"format": "pt"})
    save_file(std_parameters, directory / POSTERIOR_FILE, metadata={"format": "pt"})
    description = {
        "format_version": FORMAT_VERSION,
        "prior": {"family": posterior.config.prior, "std": posterior.config.prior_std},
        "config": posterior.config.to_dict(),
        "libraries": library_versions(),
        "mean_config_sha256": _mean_config_hash(directory / MEAN_CONFIG),
        "mean_sha256": _content_hash(mean),
        "posterior_sha256": _content_hash(std_parameters),
    }
    description["sha256"] = _json_hash(description)
    (directory / BLOB_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def library_versions() -> dict[str, str]:
    """Versions of this package and of those that decide what its files and results are."""
    return {name: version(name) for name in _LIBRARIES}


def _split(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of what PEFT saved: since 0.21 that is all that a layer holds, and LoRA servers refuse unknown names.

    Returns:
        The stock LoRA; and the unconstrained Ω of each factor, by `Posterior.named_std_parameters`' names.
    """
    stock, std_parameters = {}, {}
    for name, tensor in load_file(file).items():
        layer, found, factor = name.rpartition(f".{STD_PARAMETER}")
        if found:
            std_parameters[f"{layer}.lora_{factor}"] = tensor
        else:
            stock[name] = tensor
    return stock, std_parameters


def _read_description(file: Path) -> dict[str, Any]:
    """``blob_config.json``, checked: its version first, then its fields, then whether it was altered."""
    description = read_json(file, AdapterFileError)
    if (found := description.get("format_version")) != FORMAT_VERSION:
        raise AdapterFileError(
            f"{file}: format_version is {found!r}; this bloblora reads {FORMAT_VERSION}, another may read this file"
        )
    if description.keys() != set(_DESCRIPTION):
        missing, unknown = sorted(set(_DESCRIPTION) - description.keys()), sorted(description.keys() - _DESCRIPTION)
        raise AdapterFileError(f"{file}: missing fields {missing}, unknown fields {unknown}; restore it or save again")
    try:
        config = BlobConfig(**description["config"])
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{file}: field 'config' can't be used: {error}") from error
    if missing := sorted(config.to_dict().keys() - description["config"].keys()):
        raise AdapterFileError(f"{file}: field 'config' lacks {missing}; restore it or save again")
    content = {key: value for key, value in description.items() if key != "sha256"}
    if (found := _json_hash(content)) != description["sha256"]:
        raise AdapterFileError(
            f"{file}: its content has the SHA-256 {found}, but its field 'sha256' says {description['sha256']!r}: it "
            "was altered; restore it, or load the adapter with PEFT and bayesianize it with another BlobConfig"
        )
    return description


@torch.no_grad()
def _copy_std_parameters(file: Path, posterior: Posterior) -> None:
    """Copy the saved Ω of every layer into a posterior of the same layers."""
    saved, wanted = _read_tensors(file), posterior.named_std_parameters()
    if saved.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
        raise AdapterFileError(
            f"{file}: its layers aren't the model's; missing {missing[:3]}, unknown {extra[:3]}; "
            "load it onto the model that it was trained on"
        )
    for name, parameter in wanted.items():
        if saved[name].shape != parameter.shape:
            raise AdapterFileError(
                f"{file}: {name} has shape {tuple(saved[name].shape)}, the model's has {tuple(parameter.shape)}; "
                "load it onto the model that it was trained on"
            )
        put_(parameter, saved[name])


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


def _mean_config_hash(file: Path) -> str:
    """SHA-256 of PEFT's configuration, which has the mean's scaling; where the base model lies may change."""
    content = read_json(file, AdapterFileError)
    return _json_hash({key: value for key, value in content.items() if key != "base_model_name_or_path"})


def _json_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sort_sets(file: Path) -> None:
    """Sort what PEFT keeps as sets, whose order differs from process to process, so that equal saves are equal."""
    content = read_json(file, AdapterFileError)
    content.update({key: sorted(content[key]) for key in _SETS if isinstance(content.get(key), list)})
    file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A folder to write a whole adapter into; it replaces the one in ``directory`` if the block ends without error."""
    directory.mkdir(parents=True, exist_ok=True)
    saving, saved = directory / _SAVING, directory / _SAVED
    _remove(saving)
    _move_in(directory)  # an earlier save that was killed on its way
    try:
        saving.mkdir()
        yield saving
        for file in saving.iterdir():
            _flush(file)
        saving.rename(saved)  # from here on the new adapter is the one that is read
        _move_in(directory)
    finally:
        _remove(saving)


def _move_in(directory: Path) -> None:
    """Put the files of a complete save in their places; where this is cut off, it can be done again."""
    saving, saved = directory / _SAVING, directory / _SAVED
    if not saved.is_dir():
        return
    names = {file.name for file in saved.iterdir()}
    for name in names:
        if name == _README and (directory / name).exists():
            continue
        # A copy, so that ``saved`` stays whole until all files are in place.
        shutil.copyfile(saved / name, directory / f".{name}")
        _flush(directory / f".{name}")
        os.replace(directory / f".{name}", directory / name)
    for name in {BLOB_CONFIG, POSTERIOR_FILE} - names:
        (directory / name).unlink(missing_ok=True)
    saved.rename(saving)  # removed under another name: half of it must not pass for a complete save
    _remove(saving)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _flush(file: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())

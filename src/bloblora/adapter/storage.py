"""A Bayesian adapter on disk: a stock LoRA of the mean, and the posterior beside it.

``adapter_config.json`` and ``adapter_model.safetensors`` are what PEFT writes for the mean: any LoRA server loads them
(N = 0). ``posterior.safetensors`` holds the unconstrained Ω of each layer, ``prior.safetensors``, where a prior has a
mean and a width of its own for each entry or layer, both of these; ``blob_config.json`` what they mean and the hashes,
its own among them, by which a torn, mixed or altered folder is recognized. A field of `BlobConfig` that is
missing in it has its default; an unknown one is an error that names the version of bloblora that wrote it.

Several files can't be replaced at once, so a save goes through two hidden folders inside the directory::

    .saving/   being written             a kill here: the old files are untouched, the next save starts over
    .saved/    complete, moved in        a kill here: `load` reads this folder, the next save finishes the move
"""

import inspect
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .. import posterior as q
from ..files import (
    as_os_error,
    check_fields,
    check_finite_tensors,
    file_sha256,
    json_sha256,
    read_json,
    read_tensors,
    share,
    tensors_sha256,
)
from ..limits import time_limit
from ..messages import quoted, shortened
from .bayesianize import Posterior, bayesianize, check_exact_start, find_posterior, is_head, key_of
from .config import BlobConfig
from .sharding import is_sharded, put_
from .variant import STD_PARAMETER

FORMAT_VERSION = 2
MEAN_CONFIG, MEAN_FILE = "adapter_config.json", "adapter_model.safetensors"
BLOB_CONFIG, POSTERIOR_FILE, PRIOR_FILE = "blob_config.json", "posterior.safetensors", "prior.safetensors"
_PARTS = ("mean", "std")
_WITH_HEAD = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering")
_README = "README.md"
_SAVING, SAVED = ".saving", ".saved"
_LIBRARIES = ("bloblora", "torch", "transformers", "peft")
_HASHED = {"mean_config_sha256": MEAN_CONFIG, "mean_sha256": MEAN_FILE, "posterior_sha256": POSTERIOR_FILE}
_DESCRIPTION = ("format_version", "prior", "config", "libraries", *_HASHED, "sha256")
_PRIOR = "prior_sha256"  # of the description, where there is such a file
_TEMPERATURES = "temperatures"  # of the description, where some were fitted
_SETS = ("target_modules", "exclude_modules")
_LORA_TYPES = {"lora_alpha": float, "init_lora_weights": bool | str | None}
_OF_PEFT = inspect.signature(PeftModel.save_pretrained)


class AdapterFileError(ValueError):
    """A file of a saved adapter is missing, truncated, altered, or belongs to another adapter or model."""


def save(
    model: PeftModel,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> None:
    """Write an adapter, Bayesian or plain, in place of the one that ``directory`` may hold.

    However a save ends (an error, a kill), `load` then finds the whole old adapter or the whole new one. One process
    saves to a directory at a time.

    Args:
        model: the PEFT model.
        directory: where to; made where it is missing. Files that aren't the adapter's stay, a README.md too.
        adapter_name: which adapter; default the active one.
        save_embedding_layers: also write the base model's embeddings. ``auto``: where they are trained, or resized: the
            vocabulary isn't that of the base model's files. The base model must be resized before `load` as well.

    Raises:
        ValueError: FSDP has split the adapter over the processes, or its ``init_lora_weights`` moved a part
            of the base weights that can't be found again at loading: ``pissa_niter_N``, ``corda``, ``lora_ga``.
        FloatingPointError: a number of it is NaN or infinite.

    Warns:
        UserWarning: as `save_pretrained`.
    """
    _refuse_sharded(model)
    adapter_name = adapter_name or model.active_adapter
    check_exact_start(getattr(model.peft_config[adapter_name], "init_lora_weights", None))
    if save_embedding_layers == "auto":
        save_embedding_layers = _embeddings_differ(model)
        if save_embedding_layers and any("lm_head" in name and "lora_A" in name for name, _ in model.named_modules()):
            warnings.warn(
                f"adapter {adapter_name!r}: the embedding was resized or trained, and PEFT doesn't save it beside a "
                "LoRA on lm_head; make the adapter with modules_to_save=['embed_tokens']",
                stacklevel=2,
            )
    with _replacing(Path(directory)) as staging, as_os_error(directory):
        save_pretrained(
            model, str(staging), selected_adapters=[adapter_name], save_embedding_layers=save_embedding_layers
        )
        if (folder := adapter_folder(staging, adapter_name)) != staging:
            for file in folder.iterdir():
                file.rename(staging / file.name)
            folder.rmdir()
        _sort_sets(staging / MEAN_CONFIG)


def save_pretrained(model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """``PeftModel.save_pretrained`` with the posterior beside the mean of each Bayesian adapter that it saves.

    `bayesianize` puts it in the place of the model's own, so that ``push_to_hub``, the Trainer's checkpoints and TRL's
    trainers keep the posterior too. Files that are there already are replaced one by one; `save` replaces all or none.

    Args:
        model: the PEFT model.
        *args: as PEFT's.
        **kwargs: as PEFT's.

    Raises:
        ValueError: a Bayesian adapter is to be saved without safetensors, converted to another start, with a
            ``state_dict`` that lacks Ω, or while FSDP has split it over the processes.
        FloatingPointError: a number of an adapter is NaN or infinite.

    Warns:
        UserWarning: a part of the model's head isn't saved.
    """
    given = _OF_PEFT.bind(model, *args, **kwargs)
    given.apply_defaults()
    options = given.arguments
    names = model.peft_config if options["selected_adapters"] is None else options["selected_adapters"]
    posteriors = [posterior for name in names if (posterior := find_posterior(model, name))]
    if posteriors:
        if not options["safe_serialization"]:
            raise ValueError("safe_serialization is False; a Bayesian adapter is saved as safetensors: leave it True")
        if (start := options["path_initial_model_for_weight_conversion"]) is not None:
            raise ValueError(
                f"path_initial_model_for_weight_conversion is {start!r}; it must be None: it doubles the rank, and Ω "
                "doesn't follow"
            )
        if kwargs.get("state_dict") is None:
            _refuse_sharded(model)
    if options["is_main_process"]:
        embeddings = options["save_embedding_layers"] is True
        for name in (name for name in names if name in model.peft_config):  # PEFT says what it thinks of others
            check_finite_tensors(_numbers(model, name, kwargs.get("state_dict"), embeddings), f"adapter {name!r}")
            _warn_of_head(model, name)
    type(model).save_pretrained(model, *args, **kwargs)
    if options["is_main_process"]:
        for posterior in posteriors:
            save_posterior(posterior, adapter_folder(options["save_directory"], posterior.adapter_name))


def load(
    base_model: PreTrainedModel,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    checked: bool = False,
) -> PeftModel:
    """Load an adapter that `save` wrote onto its base model; the posterior with it, where the folder has one.

    As always with PEFT, an adapter saved in half precision comes back in float32, with the same values.

    Args:
        base_model: the model that the adapter was trained on, without an adapter; this one is put into it.
        directory: where from.
        adapter_name: what to call the adapter in the model, whatever it was called when saved.
        is_trainable: whether training goes on: A, B and Ω then require gradients.
        checked: whether `check_folder` has just been called, so that files needn't be hashed again.

    Returns:
        The PEFT model, in eval mode; ``find_posterior(model)`` is its posterior.

    Raises:
        ValueError: ``base_model`` has an adapter already.
        AdapterFileError: a file is missing, truncated, altered or doesn't belong to the others or to ``base_model``.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise ValueError(
            f"base_model: {type(base_model).__name__} has an adapter already; pass the base model: a fresh one from "
            "from_pretrained, or model.unload()"
        )
    folder = _current(directory) if checked else check_folder(directory)
    _check_patterns(folder, base_model)
    try:
        model = PeftModel.from_pretrained(base_model, str(folder), adapter_name, is_trainable=is_trainable)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(
            f"{folder}: this adapter doesn't fit {type(base_model).__name__}; load it onto the model that it was "
            f"trained on: {error}"
        ) from error
    _restore_posterior(model, folder, adapter_name)
    return model.eval()


def load_beside(model: PeftModel, directory: str | os.PathLike[str], adapter_name: str) -> None:
    """Load one more adapter that `save` wrote into a model that has others; the posterior with it.

    Raises:
        AdapterFileError: as for `load`.
    """
    folder = check_folder(directory)
    _check_patterns(folder, model)
    try:
        model.load_adapter(str(folder), adapter_name)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{folder}: this adapter doesn't fit beside the others of the model: {error}") from error
    _restore_posterior(model, folder, adapter_name)


def _restore_posterior(model: PeftModel, folder: Path, adapter_name: str) -> None:
    if (folder / BLOB_CONFIG).exists():
        description, config = _read_description(folder / BLOB_CONFIG)
        posterior = bayesianize(model, config, adapter_name)
        _copy_std_parameters(folder / POSTERIOR_FILE, posterior, config)
        _copy_prior(folder, description, posterior)
        try:
            posterior.temperatures = description.get(_TEMPERATURES)
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"{folder / BLOB_CONFIG}: field {_TEMPERATURES!r}: {error}") from error


def load_posterior(model: PeftModel, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Posterior:
    """Copy a saved Ω into the posterior that ``model`` has already, and the prior of its entries, where one was saved.

    The posterior keeps its own configuration; its ``std_parameterization`` must be the saved one.

    Raises:
        AdapterFileError: as for `load`, or layers, shapes or parameterization differ from the model's.
    """
    folder = check_folder(directory)
    posterior = find_posterior(model, adapter_name)
    if posterior is None:
        raise AdapterFileError(f"{folder}: the model's adapter isn't Bayesian, so {POSTERIOR_FILE} has no place in it")
    if not (folder / BLOB_CONFIG).exists():
        raise AdapterFileError(f"{folder}: {BLOB_CONFIG} is missing: this is a plain LoRA, which has no posterior")
    description, config = _read_description(folder / BLOB_CONFIG)
    if (saved := config.std_parameterization) != (wanted := posterior.config.std_parameterization):
        raise AdapterFileError(
            f"{folder / BLOB_CONFIG}: std_parameterization is {quoted(saved)}, the model's posterior has {wanted!r}; "
            f"bayesianize the model with BlobConfig(std_parameterization={quoted(saved)})"
        )
    _copy_std_parameters(folder / POSTERIOR_FILE, posterior, config)
    _copy_prior(folder, description, posterior)
    return posterior


def continue_from(posterior: Posterior, directory: str | os.PathLike[str], factor: float = 1.0) -> None:
    """Make a saved posterior the prior of this one, and its Ω the start; its means have been loaded already.

    Its Ω is divided by ``factor``.

    Raises:
        AdapterFileError: as for `load`, or its layers or shapes differ from the model's.
        ValueError: by `Posterior.update_prior`.
    """
    folder = check_folder(directory)
    _copy_std_parameters(folder / POSTERIOR_FILE, posterior, posterior_config(folder))
    if factor != 1:
        posterior.scale_(1 / factor)
    posterior.update_prior()


def posterior_config(directory: str | os.PathLike[str]) -> BlobConfig:
    """The configuration of a saved posterior.

    Raises:
        AdapterFileError: there is none, or it can't be read.
    """
    return _read_description(_current(directory) / BLOB_CONFIG)[1]


def check_folder(directory: str | os.PathLike[str]) -> Path:
    """Check all that can be checked without a model.

    Returns:
        The folder to read: ``directory``, or a complete newer save in it that a killed process didn't finish moving.

    Raises:
        AdapterFileError: a file is missing, truncated, altered, or doesn't belong to the others.
    """
    folder = _current(directory)
    for name in (MEAN_CONFIG, MEAN_FILE):
        if not (folder / name).is_file():
            raise AdapterFileError(f"{folder}: {name} is missing; a saved adapter has it")
    _check_peft(folder / MEAN_CONFIG)
    mean = read_tensors(folder / MEAN_FILE, AdapterFileError)
    bayesian = [(folder / name).is_file() for name in (BLOB_CONFIG, POSTERIOR_FILE)]
    if not any(bayesian):
        if any(STD_PARAMETER in name for name in mean):
            raise AdapterFileError(
                f"{folder / MEAN_FILE}: it holds a posterior's Ω under names that nothing reads, and {BLOB_CONFIG} and "
                f"{POSTERIOR_FILE} are missing: it was written neither by model.save_pretrained of the model that was "
                "bayesianized nor by bloblora.save. PeftModel.from_pretrained loads its mean; for the posterior, "
                "bayesianize that model with the BlobConfig of the training, then call model.load_adapter(folder, "
                "adapter_name) and save it again"
            )
        return folder
    if not all(bayesian):
        lost, kept = (BLOB_CONFIG, POSTERIOR_FILE) if bayesian[1] else (POSTERIOR_FILE, BLOB_CONFIG)
        raise AdapterFileError(f"{folder}: {lost} is missing although {kept} is there; restore it or save again")
    description, _ = _read_description(folder / BLOB_CONFIG)
    hashes = {
        "mean_config_sha256": content_sha256(folder / MEAN_CONFIG),
        "mean_sha256": tensors_sha256(mean),
        "posterior_sha256": tensors_sha256(read_tensors(folder / POSTERIOR_FILE, AdapterFileError)),
    }
    files = dict(_HASHED)
    if _PRIOR in description:
        files[_PRIOR] = PRIOR_FILE
        if not (folder / PRIOR_FILE).is_file():
            raise AdapterFileError(
                f"{folder}: {PRIOR_FILE} is missing although {BLOB_CONFIG} names it; restore it or save again"
            )
        hashes[_PRIOR] = tensors_sha256(read_tensors(folder / PRIOR_FILE, AdapterFileError))
    for key, name in files.items():
        if description[key] != hashes[key]:
            raise AdapterFileError(
                f"{folder / name}: its SHA-256 is {hashes[key]}, but {BLOB_CONFIG} ({key}) says "
                f"{quoted(description[key])}: it was altered, or comes from another save; restore it or save again"
            )
    return folder


def _current(directory: str | os.PathLike[str]) -> Path:
    """The folder to read: a complete newer save in it, where a killed process didn't finish moving that."""
    folder = Path(directory)
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: no such folder; give one that an adapter was saved to")
    return folder / SAVED if (folder / SAVED).is_dir() else folder


def save_posterior(posterior: Posterior, directory: str | os.PathLike[str]) -> None:
    """Write a posterior beside the mean that PEFT has saved in ``directory``, and make that a stock LoRA.

    Raises:
        ValueError: PEFT was given a ``state_dict`` without Ω.
    """
    directory = Path(directory)
    mean, std_parameters = _split(directory / MEAN_FILE)
    if missing := sorted(posterior.named_std_parameters().keys() - std_parameters.keys()):
        raise ValueError(
            f"state_dict: Ω of {missing[0]} and {len(missing) - 1} others is missing; give all of the model's"
        )
    _sort_sets(directory / MEAN_CONFIG)
    save_file(mean, directory / MEAN_FILE, metadata={"format": "pt"})
    save_file(std_parameters, directory / POSTERIOR_FILE, metadata={"format": "pt"})
    prior = _of_priors(posterior)
    description = {
        "format_version": FORMAT_VERSION,
        "prior": {"family": posterior.config.prior, "std": PRIOR_FILE if prior else posterior.config.prior_std},
        "config": posterior.config.to_dict(),
        "libraries": library_versions(),
        "mean_config_sha256": content_sha256(directory / MEAN_CONFIG),
        "mean_sha256": tensors_sha256(mean),
        "posterior_sha256": tensors_sha256(std_parameters),
    }
    if prior:
        save_file(prior, directory / PRIOR_FILE, metadata={"format": "pt"})
        description[_PRIOR] = tensors_sha256(prior)
    else:
        (directory / PRIOR_FILE).unlink(missing_ok=True)
    share(*directory.glob("*.safetensors"))
    if posterior.temperatures:
        description[_TEMPERATURES] = [*posterior.temperatures]
    description["sha256"] = json_sha256(description)
    (directory / BLOB_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def adapter_folder(folder: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where in ``folder`` PEFT puts an adapter."""
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def content_sha256(file: Path) -> str:
    """SHA-256 of a file, hexadecimal: of JSON its content, of PEFT's without where the base model lies, else its bytes.

    Raises:
        AdapterFileError: it isn't JSON, although it is called so.
    """
    if file.suffix != ".json":
        return file_sha256(file)
    content = read_json(file, AdapterFileError)
    if file.name == MEAN_CONFIG:
        content.pop("base_model_name_or_path", None)
    return json_sha256(content)


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
            std_parameters[key_of(layer, factor)] = tensor
        else:
            stock[name] = tensor
    return stock, std_parameters


def _numbers(
    model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor] | None, embeddings: bool
) -> dict[str, Tensor]:
    """All that is saved of an adapter: the LoRA, a head, Ω, the prior of each entry, and embeddings where asked for."""
    numbers = get_peft_model_state_dict(model, state_dict, adapter_name, save_embedding_layers=embeddings)
    posterior = find_posterior(model, adapter_name)
    return numbers | (_of_priors(posterior) if posterior else {})


def _embeddings_differ(model: PeftModel) -> bool:
    """Whether the embedding is trained itself, or its vocabulary isn't that of the base model's files here."""
    base: Any = model.get_base_model()
    if not hasattr(base, "get_input_embeddings"):
        return False
    embedding = base.get_input_embeddings()
    if getattr(getattr(embedding, "weight", None), "requires_grad", False):
        return True
    try:
        stored = type(base.config).from_pretrained(base.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    return base.config.get_text_config().vocab_size != stored.get_text_config().vocab_size


def _warn_of_head(model: PeftModel, adapter_name: str) -> None:
    """Warn where a loaded model would have another head, of which the base model's files have no weights."""
    base: Any = model.get_base_model()
    kind, trunk = type(base).__name__, getattr(base, "base_model", base)
    lost = []
    for name, part in base.named_children() if kind.endswith(_WITH_HEAD) and trunk is not base else ():
        saved = [p for m in part.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()]
        kept = {*saved, *(p for weight, p in part.named_parameters() if "lora_" in weight)}
        # transformers marks what it has read
        if part is not trunk and any(
            p.requires_grad or not getattr(p, "_is_hf_initialized", False) for p in part.parameters() if p not in kept
        ):
            lost.append(name)
    if lost:
        warnings.warn(
            f"adapter {adapter_name!r}: the head {' and '.join(map(repr, lost))} of {kind} is not part of it and isn't "
            "saved: a loaded model has the base model's, which is random where its files have none. Make the adapter "
            f"with LoraConfig(modules_to_save={lost})",
            stacklevel=3,
        )


def _refuse_sharded(model: PeftModel) -> None:
    if is_sharded(model):
        raise ValueError("model: each process holds a part of it (FSDP); call BlobTrainer.save_model in all of them")


def _read_description(file: Path) -> tuple[dict[str, Any], BlobConfig]:
    """``blob_config.json``, checked: its version first, then its fields, then whether it was altered."""
    description = read_json(file, AdapterFileError)
    libraries = description.get("libraries")
    writer = libraries.get("bloblora") if isinstance(libraries, dict) else None
    versions = f"bloblora {writer or 'of an unknown version'} wrote it, this is {version('bloblora')}"
    if (found := description.get("format_version")) != FORMAT_VERSION:
        reads = f"this bloblora reads {FORMAT_VERSION}"
        raise AdapterFileError(f"{file}: format_version is {quoted(found)}; {reads}; {versions}")

    def check_known(found: Set[str], known: Set[str], place: str) -> None:
        if unknown := sorted(found - known):
            raise AdapterFileError(
                f"{file}: {place}unknown fields {unknown}; {versions}: load it with a version that has them"
            )

    check_known(description.keys(), {*_DESCRIPTION, _PRIOR, _TEMPERATURES}, "")
    if missing := sorted(set(_DESCRIPTION) - description.keys()):
        raise AdapterFileError(f"{file}: missing fields {missing}; restore it or save again")
    if not isinstance(description["config"], dict):
        raise AdapterFileError(f"{file}: field 'config' must be an object, got {quoted(description['config'])}")
    check_known(description["config"].keys(), {field.name for field in fields(BlobConfig)}, "field 'config' has ")
    try:
        config = BlobConfig(**description["config"])
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{file}: field 'config' can't be used: {error}") from error
    content = {key: value for key, value in description.items() if key != "sha256"}
    if (found := json_sha256(content)) != description["sha256"]:
        raise AdapterFileError(
            f"{file}: its content has the SHA-256 {found}, but its field 'sha256' says "
            f"{quoted(description['sha256'])}: it was altered; restore it, or load the adapter with PEFT and "
            "bayesianize it with another BlobConfig"
        )
    return description, config


@torch.no_grad()
def _copy_std_parameters(file: Path, posterior: Posterior, config: BlobConfig) -> None:
    """Copy the saved Ω of every layer, of a posterior with ``config``, into a posterior of the same layers."""
    wanted = posterior.named_std_parameters()
    saved = _read_layers(file, {name: parameter.shape for name, parameter in wanted.items()})
    there, here = config.std_parameterization, posterior.config.std_parameterization
    for name, parameter in wanted.items():
        put_(parameter, saved[name] if there == here else q.std_parameter(q.std(saved[name], there), here))


def _copy_prior(folder: Path, description: dict[str, Any], posterior: Posterior) -> None:
    """Copy the saved prior of every entry, where there is one, into a posterior of the same layers."""
    if _PRIOR not in description:
        return
    means, mean, std = posterior.named_means(), *_PARTS
    with safe_open(folder / PRIOR_FILE, "pt") as file:
        names = [key.removesuffix(f".{mean}") for key in file.keys() if key.endswith(f".{mean}")]  # noqa: SIM118
    shapes = {f"{name}.{part}": means[name].shape for name in names if name in means for part in _PARTS}
    saved = _read_layers(folder / PRIOR_FILE, shapes, numbers=True)
    posterior.set_priors({name: (saved[f"{name}.{mean}"], saved[f"{name}.{std}"]) for name in names})


def _of_priors(posterior: Posterior) -> dict[str, Tensor]:
    """What ``prior.safetensors`` holds: a number where all entries of a factor are equal.

    A head's prior that is as the configuration says isn't in it.
    """
    priors = posterior.named_priors()
    for name in [*filter(is_head, priors)]:
        mean, std = priors[name]
        if not mean.any() and (std == torch.tensor(posterior.config.head_prior_std)).all():
            del priors[name]
    return {
        f"{name}.{part}": (tensor.flatten()[0] if (tensor == tensor.flatten()[0]).all() else tensor).cpu().clone()
        for name, prior in priors.items()
        for part, tensor in zip(_PARTS, prior, strict=True)
    }


def _read_layers(file: Path, shapes: Mapping[str, torch.Size], *, numbers: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, which must have these names and shapes; with ``numbers`` one may stand for all entries."""
    saved = read_tensors(file, AdapterFileError)
    if saved.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - saved.keys()), sorted(saved.keys() - shapes.keys())
        raise AdapterFileError(
            f"{file}: its layers aren't the model's; missing {missing[:3]}, unknown {extra[:3]}; "
            "load it onto the model that it was trained on"
        )
    for name, shape in shapes.items():
        if saved[name].shape != shape and not (numbers and saved[name].ndim == 0):
            raise AdapterFileError(
                f"{file}: {name} has shape {tuple(saved[name].shape)}, the model's has {tuple(shape)}; "
                "load it onto the model that it was trained on"
            )
    return saved


def _check_peft(file: Path) -> None:
    """Check the types of what PEFT reads: it doesn't, and stops somewhere."""
    content = read_json(file, AdapterFileError)
    if content.get("megatron_config"):  # PEFT would import what it names
        raise AdapterFileError(f"{file}: megatron_config isn't taken from a file; it must be null")
    if (found := content.get("peft_type")) not in [*PeftType]:
        raise AdapterFileError(f"{file}: field 'peft_type' must be one of PEFT's, such as 'LORA', got {quoted(found)}")
    if found == PeftType.LORA:
        check_fields(content, LoraConfig, file, AdapterFileError, besides=_LORA_TYPES)
        try:
            check_exact_start(content.get("init_lora_weights"))
        except ValueError as error:
            raise AdapterFileError(f"{file}: {error}") from error


def matching(lora: PeftConfig, names: Sequence[str]) -> list[str]:
    """Those of a model's modules that an adapter's configuration names, alone or by a regular expression.

    Raises:
        ValueError: an expression isn't one, or doesn't end.
    """
    patterns = [*getattr(lora, "rank_pattern", {}), *getattr(lora, "alpha_pattern", {})]
    try:
        with time_limit("matching the names of the model's layers"):
            for name in names:
                get_pattern_key(patterns, name)
            targets = getattr(lora, "target_modules", None)
            return [name for name in names if targets and check_target_module_exists(lora, name)]
    except (re.error, TimeoutError) as error:
        raise ValueError(
            f"target_modules, or another regular expression of the adapter's configuration: {shortened(str(error))}"
        ) from error


def _check_patterns(folder: Path, model: PreTrainedModel | PeftModel) -> None:
    """Raise an AdapterFileError for what `matching` raises, before the model is changed."""
    try:
        matching(PeftConfig.from_pretrained(str(folder)), [name for name, _ in model.named_modules()])
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{folder / MEAN_CONFIG}: {error}") from error


def _sort_sets(file: Path) -> None:
    """Sort what PEFT keeps as sets, whose order differs from process to process, so that equal saves are equal."""
    content = read_json(file, AdapterFileError)
    content.update({key: sorted(content[key]) for key in _SETS if isinstance(content.get(key), list)})
    file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A folder to write a whole adapter into; it replaces the one in ``directory`` if the block ends without error."""
    directory.mkdir(parents=True, exist_ok=True)
    saving, saved = directory / _SAVING, directory / SAVED
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
    saving, saved = directory / _SAVING, directory / SAVED
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
    for name in {BLOB_CONFIG, POSTERIOR_FILE, PRIOR_FILE} - names:
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

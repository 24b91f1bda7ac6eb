"""Small files, written whole or not at all, and read with an error that says which one is wrong."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from threading import Lock
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from .messages import quoted, shortened

if TYPE_CHECKING:
    from torch import Tensor

MOST_LEVELS = 64
"""Of lists and objects in one another, in a JSON file: many more exhaust the stack of what reads or writes them."""
MOST_REPEATED = 100_000
"""Values that the aliases of a YAML file may repeat: a few lines of them can stand for billions."""
_REMEMBERED = 64 << 20  # bytes of a file from which its hash is kept: 0.05 s
_SETTLED = 2.0  # seconds; a file that was written later may change again within one tick of its clock
_UMASK = Lock()


def cache_folder() -> Path:
    """Where what can be made again is kept, such as converted models: $BLOBLORA_CACHE, or ~/.cache/bloblora.

    Raises:
        OSError: there is neither $BLOBLORA_CACHE nor a home folder.
    """
    if folder := os.environ.get("BLOBLORA_CACHE"):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "bloblora"
    except RuntimeError as error:
        raise OSError("this user has no home folder for the cache; set HOME, or BLOBLORA_CACHE to a folder") from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A partial file to write, which takes the place of ``file`` when it is complete, and is gone where it isn't.

    No two writers share one. What a kill leaves of it is removed by the next that holds the file's or folder's lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with naming(file):
            yield partial
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(output: Path, *, inside: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the lock of an output, which one thread of one process can hold at a time.

    The lock of a process that ends, in whatever way, is released. Partial files that such a process left are removed.

    Args:
        output: a file, or a folder that appears when it is complete: the lock is beside it.
        inside: whether the output is a folder that is written into; the lock is then in it.
        wait: whether to wait while another holds the lock.

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


@contextmanager
def naming(place: str | os.PathLike[str]) -> Iterator[None]:
    """Name the place in an OSError that names none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(place)) from error


@contextmanager
def as_os_error(place: str | os.PathLike[str]) -> Iterator[None]:
    """Raise an OSError where other libraries can't write: torch, safetensors and tokenizers have errors of their own.

    Errors of what is to be written pass. What is raised says what the system says, such as that the disk is full: torch
    doesn't.
    """
    try:
        yield
    except (OSError, ValueError, ArithmeticError, NotImplementedError):
        raise
    except Exception as error:
        raise OSError(f"{place}: can't be written: {_refusal(Path(place)) or shortened(str(error))}") from error


def _refusal(place: Path) -> str | None:
    """Why nothing more can be written to a file or a folder, as the system says it; None where something can."""
    try:
        with tempfile.TemporaryFile(dir=place if place.is_dir() else place.parent) as probe:
            probe.write(bytes(1 << 20))
    except OSError as error:
        return error.strerror
    return None


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_hashed_json(
    file: Path, content: dict[str, Any], hashed: Callable[[dict[str, Any]], dict[str, Any]] = lambda content: content
) -> None:
    """Write a JSON file with a SHA-256 of its own content, or of what ``hashed`` makes of it, as the last field."""
    content = json.loads(json.dumps(content))  # keys that are numbers are texts in the file, and in another order
    write_json(file, content | {"sha256": json_sha256(hashed(content))})


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    from safetensors.torch import save_file

    with replacing(file) as partial, as_os_error(file):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        share(partial)


def share(*files: Path) -> None:
    """Give files the mode that new files have by the umask; safetensors writes them for their owner alone."""
    with _UMASK:
        mask = os.umask(0o077)  # it can only be read by setting it
        os.umask(mask)
    for file in files:
        with suppress(OSError):  # a file system without modes
            file.chmod(0o666 & ~mask)


def check_finite_tensors(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise a FloatingPointError where a tensor has an entry that is NaN or infinite: before anything is written."""
    for name, tensor in tensors.items():
        if not tensor.is_meta and not (finite := tensor.isfinite()).all():
            raise FloatingPointError(
                f"{what}: {name} has {int((~finite).sum())} of {tensor.numel()} entries that are NaN or infinite, so "
                "nothing was written; train with a lower learning rate, or with dtype float32 or bfloat16 in the place "
                "of float16"
            )


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it isn't JSON, has a key twice in an object, or more than `MOST_LEVELS` levels.
    """
    try:
        content = json.loads(text, object_pairs_hook=_once_each)
    except RecursionError:
        content, levels = None, MOST_LEVELS + 1
    else:
        levels = _levels(content)
    if levels > MOST_LEVELS:
        raise ValueError(f"lists and objects are nested in more than {MOST_LEVELS} levels")
    return content


def read_json(file: Path, error_type: type[ValueError]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error_type: there is none.
    """
    try:
        content = parse_json(regular(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise error_type(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise error_type(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def parse_yaml(text: str, *, as_texts: bool = False) -> Any:
    """What a YAML document says; with ``as_texts`` whatever isn't a list or a mapping is a text.

    Raises:
        ValueError: it isn't YAML, or its aliases repeat more than `MOST_REPEATED` values.
    """
    import yaml

    loader = None
    try:
        loader = (yaml.BaseLoader if as_texts else yaml.SafeLoader)(text)  # which reads the first characters
        node = loader.get_single_node()
        sizes: dict[int, float] = {}
        if node is not None and _size(node, sizes) > MOST_REPEATED + len(sizes):
            raise ValueError(f"its aliases repeat more than {MOST_REPEATED} values")
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("lists and mappings are nested too deep") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: Any, sizes: dict[int, float]) -> float:
    """Values in a node of YAML with all that its aliases stand for; infinite where one stands for what it is in."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # while its parts are counted
        parts = node.value if isinstance(node.value, list) else ()
        pairs = (part if isinstance(part, tuple) else (part,) for part in parts)
        sizes[id(node)] = 1 + sum(_size(part, sizes) for pair in pairs for part in pair)
    return sizes[id(node)]


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as ``object_pairs_hook`` of `json.loads`, which by itself takes the last of equal keys.

    Raises:
        ValueError: a key is there twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {quoted(next(name for name in names if names.count(name) > 1))} is there twice")
    return content


def regular(file: Path) -> Path:
    """The file itself; an OSError for a pipe or a device, whose reading need not end."""
    if file.exists() and not file.is_file():
        raise OSError(f"{file}: is not a regular file")
    return file


def read_hashed_json(
    file: Path,
    error_type: type[ValueError],
    kind: type[Any] | None = None,
    hashed: Callable[[dict[str, Any]], dict[str, Any]] = lambda content: content,
) -> dict[str, Any]:
    """What `write_hashed_json` wrote, without its hash.

    Raises:
        error_type: it isn't readable, its fields aren't those of the dataclass ``kind``, or it was altered.
    """
    content = read_json(file, error_type)
    written = content.pop("sha256", None)
    if kind is not None:
        check_fields(content, kind, file, error_type)
    if written is None:
        raise error_type(f"{file}: field 'sha256' is missing: bloblora before 0.2 wrote it, or it was altered")
    if (found := json_sha256(hashed(content))) != written:
        raise error_type(
            f"{file}: its content has the SHA-256 {found}, but its field 'sha256' says {quoted(written)}: it was "
            "altered; restore it"
        )
    return content


def check_fields(
    content: Mapping[str, Any],
    kind: type[Any],
    place: object,
    error_type: type[ValueError],
    *,
    besides: Mapping[str, Any] | None = None,
) -> None:
    """Check a JSON object against the fields of a dataclass.

    Args:
        content: the object.
        kind: the dataclass, whose types say what a field may be. A type that JSON lacks is taken for any value.
        place: what the message begins with, the file.
        error_type: what is raised.
        besides: of a class of another library: types that it doesn't declare as it takes them; other fields may be
            there, which other versions of it have.

    Raises:
        error_type: a field is missing, unknown, or of another type.
    """
    hints = get_type_hints(kind) | dict(besides or {})
    declared = {field.name: field for field in fields(kind)}
    for name, field in declared.items():
        if name not in content and field.default is MISSING and field.default_factory is MISSING:
            raise error_type(f"{place}: field {name!r} is missing")
    for name, value in content.items():
        if name not in declared:
            if besides is None:
                raise error_type(f"{place}: unknown field {quoted(name)}; it has {', '.join(declared)}")
            continue
        hint = hints[name]
        if not _is_of(value, hint):
            raise error_type(f"{place}: field {name!r} must be {_words(hint)}, got {quoted(value)}")
        nested: Any = next(filter(is_dataclass, (hint, *get_args(hint))), None)
        for item in value if isinstance(value, list) else [value]:
            if besides is None and nested and item is not None:
                check_fields(item, nested, f"{place}: {name}", error_type)


def _levels(content: Any) -> int:
    """How deep lists and objects are nested, up to one more than `MOST_LEVELS`."""
    level, inside = 0, [content]
    while inside and level <= MOST_LEVELS:
        nested = [part for part in inside if isinstance(part, dict | list)]
        inside = [item for part in nested for item in (part.values() if isinstance(part, dict) else part)]
        level += bool(nested)
    return level


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, option) for option in arguments)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    kind = origin or hint
    if not isinstance(kind, type) or kind is object:
        return True
    if kind is bool or kind is str or kind is type(None):
        return isinstance(value, kind)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if is_dataclass(kind):
        return isinstance(value, dict)
    if issubclass(kind, Mapping):
        return isinstance(value, dict) and all(_is_of(item, arguments[1]) for item in value.values() if arguments)
    if issubclass(kind, Sequence):
        return isinstance(value, list) and all(_is_of(item, arguments[0]) for item in value if arguments)
    return True


def _words(hint: Any) -> str:
    """A type as a message names it."""
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the values that are finite numbers."""
    return {name: value for name, value in values.items() if is_finite(value)}


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number, which a float can be."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def read_tensors(file: Path, error_type: type[ValueError]) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        error_type: there is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(regular(file))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's for a file that is deleted meanwhile
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
    """SHA-256 of a file's bytes, hexadecimal; the file is never in memory as a whole.

    That of a large file is kept in `cache_folder`, and found there as long as the file has the same size, inode, and
    times of modification and of change: the last of these no program can set.
    """
    status = file.stat()
    if status.st_size < _REMEMBERED:
        return _sha256(file)
    try:
        hashes = cache_folder() / "sha256"
    except OSError:
        return _sha256(file)
    state = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    known = hashes / f"{name[:32]}.json"
    with suppress(ValueError):
        if (kept := read_json(known, ValueError)).get("state") == state and isinstance(kept.get("sha256"), str):
            return kept["sha256"]
    digest = _sha256(file)
    if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED:
        with suppress(OSError):  # a folder that can't be written costs time alone
            write_json(known, {"state": state, "sha256": digest})
    return digest


def _sha256(file: Path) -> str:
    with regular(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

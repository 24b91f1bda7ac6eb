"""A run's folder, here or on the hub: its files, read and checked without a model, and written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HTTPError  # the HTTP library's: it differs between versions

from .. import tasks
from ..adapter import library_versions
from ..files import file_sha256, locked, read_json
from ..methods import Method
from .config import RunConfig, RunError, different

TASK_FILE, RUN_FILE, CONFIG_FILE, CHECKPOINTS = "task.json", "run.json", "config.yaml", "checkpoints"
VALIDATION_FIGURE = "validation.png"
HUB = "hub:"
_FIELDS = ("text", "text_pair", "label", "question", "choices", "answer", "prompt", "response", "messages")
_HUB_FILES = ["*.json", "*.safetensors", "*.png"]  # nothing that could be run


@dataclass(frozen=True)
class RunDescription:
    """What a finished run's folder says, read once and without its model.

    Attributes:
        folder: on this machine; of a run on the hub, the copy.
        name: what the run is called where nothing else is said: its folder's name, or its repository's.
        config: what it was trained with.
        method: its method, with the defaults of the version that trained it.
        task: how records become logits.
        training: what the training took.
        adapter_sha256: of the trained weights' file, which was checked.
        records_sha256: of the training records.
        remote: whether it is on the hub.
        columns: of the training data, by field, where they aren't called as their field.
    """

    folder: Path
    name: str
    config: RunConfig
    method: Method
    task: tasks.Task
    training: dict[str, Any]
    adapter_sha256: str
    records_sha256: str | None = None
    remote: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)


def open_run(directory: str | os.PathLike[str] | RunDescription) -> RunDescription:
    """Read and check a finished run's folder, or ``hub:user/name``; no model is loaded.

    Raises:
        RunError: the folder isn't one, its training isn't finished, it was written by a version with other options, or
            its adapter was altered.
        AdapterFileError: the adapter's files are damaged.
    """
    if isinstance(directory, RunDescription):
        return directory
    folder = local_folder(directory)
    if not (folder / RUN_FILE).is_file():
        raise RunError(f"{folder}: no {RUN_FILE} in it; give a folder that `bloblora train` wrote")
    stored = read_json(folder / RUN_FILE, RunError)
    config, method = _read_config(folder / RUN_FILE, stored)
    if not stored.get("training"):
        raise RunError(f"{folder}: its training isn't finished; run the same `bloblora train` again to continue")
    try:
        task = tasks.task_from_dict(read_json(folder / TASK_FILE, RunError))
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder}: can't be read: {error}") from error
    weights = method.weights_file(folder)
    actual = file_sha256(weights)
    if stored.get("adapter_sha256", actual) != actual:
        raise RunError(
            f"{weights}: its SHA-256 isn't the one in {RUN_FILE}: the file was altered, or comes from another run"
        )
    remote = is_remote(directory)
    repository = os.fspath(directory).removeprefix(HUB).partition("@")[0] if remote else ""
    name = repository.rpartition("/")[2] if remote else folder.resolve().name
    return RunDescription(
        folder,
        name,
        config,
        method,
        task,
        stored["training"],
        actual,
        stored.get("records_sha256"),
        remote,
        stored.get("columns", {}),
    )


def described(config: RunConfig) -> dict[str, Any]:
    """What ``run.json`` says of a configuration: what was given, and the method's options with their defaults."""
    return {"libraries": library_versions(), "config": config.given(), "options": config.build_method().described()}


def read_description(output: Path, config: RunConfig, besides: Collection[str] = ()) -> dict[str, Any]:
    """What the folder says of its run, if any; a RunError where that has another configuration, ``besides`` options."""
    if not (output / RUN_FILE).is_file():
        return {}
    stored = read_json(output / RUN_FILE, RunError)
    if found := different(
        _read_config(output / RUN_FILE, stored)[0].given(), config.given(), besides=("output", *besides)
    ):
        raise RunError(f"{output} holds a run of another configuration ({'; '.join(found)}); choose another output")
    return stored


def _read_config(file: Path, stored: dict[str, Any]) -> tuple[RunConfig, Method]:
    """What was given, and the method with the defaults of the version that wrote the file."""
    try:
        config = RunConfig(**stored["config"])
        method = {"name": config.method["name"], **stored.get("options", {})}
        return config, config.with_options(method=method).build_method()
    except (KeyError, TypeError, AttributeError, RunError) as error:
        here, there = library_versions()["bloblora"], stored.get("libraries", {}).get("bloblora", "0.1")
        raise RunError(f"{file}: written by bloblora {there}, this is {here}: {error}") from error


def check_writable(file: str | os.PathLike[str]) -> None:
    """Make a file's folder, and raise a RunError when the file can't be written there: before hours of work."""
    file = Path(file)
    if file.is_dir():
        raise RunError(f"{file}: is a folder; give a file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise RunError(f"{file}: can't be written: {error.strerror or error}") from error


@contextmanager
def alone(output: Path, *, inside: bool = False) -> Iterator[None]:
    """Raise a RunError while another process writes the same file, or the same folder or ``inside`` it."""
    try:
        with locked(output, inside=inside, wait=False):
            yield
    except Timeout as error:
        raise RunError(f"{output}: another process is at work in it; wait for it, or choose another output") from error


def read_fields(record: dict[str, Any]) -> dict[str, Any]:
    """What tasks read of a record."""
    return {name: record[name] for name in _FIELDS if name in record}


def records_sha256(records: Iterable[dict[str, Any]]) -> str:
    """Hash of what tasks read of the records, as one JSON list."""
    digest = hashlib.sha256(b"[")
    for number, record in enumerate(records):
        digest.update(f"{', ' if number else ''}{json.dumps(read_fields(record))}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def local_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder itself, or a copy of the hub's: of ``hub:user/name``, or ``hub:user/name@revision``.

    Copies are kept in huggingface_hub's cache, which also serves without a network. A process sees one state of a
    repository, however often it asks.

    Raises:
        RunError: the hub can't be reached or has no such repository or revision, and no copy is there.
    """
    name = os.fspath(directory)
    return _fetched(name) if is_remote(name) else Path(name)


def is_remote(directory: str | os.PathLike[str]) -> bool:
    """Whether this stands for a repository of the hub."""
    return os.fspath(directory).startswith(HUB)


@cache
def _fetched(name: str) -> Path:
    repo_id, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=_HUB_FILES))
    except (OSError, ValueError, HTTPError) as error:
        raise RunError(f"{name}: can't be fetched from {constants.ENDPOINT}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What a hub's client says was wrong, on one line."""
    return " ".join(str(error).split()) or type(error).__name__

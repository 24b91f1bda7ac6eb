"""A run's folder: its files, read and checked without a model, and written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import tasks
from ..files import file_sha256, read_json
from ..methods import Method
from .config import RunError, TrainConfig
from .remote import local_folder

TASK_FILE, RUN_FILE, CONFIG_FILE, CHECKPOINTS = "task.json", "run.json", "config.yaml", "checkpoints"
_FIELDS = ("text", "label", "question", "choices", "answer", "prompt", "response", "messages")


@dataclass(frozen=True)
class RunDescription:
    """What a finished run's folder says, without its model: enough to check arguments by."""

    config: TrainConfig
    method: Method
    task: tasks.Task
    training: dict[str, Any]
    adapter_sha256: str


def open_run(directory: str | os.PathLike[str]) -> RunDescription:
    """Read and check a finished run's folder, or ``hub:user/name``; no model is loaded.

    Raises:
        RunError: the folder isn't one, its training isn't finished, or its adapter was altered.
        AdapterFileError: the adapter's files are damaged.
    """
    directory = local_folder(directory)
    if not (directory / RUN_FILE).is_file():
        raise RunError(f"{directory}: no {RUN_FILE} in it; give a folder that `bloblora train` wrote")
    stored = read_json(directory / RUN_FILE, RunError)
    if not stored.get("training"):
        raise RunError(f"{directory}: its training isn't finished; run the same `bloblora train` again to go on")
    try:
        config = TrainConfig(**stored["config"])
        # with the defaults of then
        method = replace(config, **stored.get("options", {})).build_method()
        task = tasks.task_from_dict(read_json(directory / TASK_FILE, RunError))
    except (KeyError, TypeError) as error:
        raise RunError(f"{directory / RUN_FILE}: not what this version of bloblora writes: {error}") from error
    weights = method.weights_file(directory)
    actual = file_sha256(weights)
    if stored.get("adapter_sha256", actual) != actual:
        raise RunError(
            f"{weights}: its SHA-256 isn't the one in {RUN_FILE}: the file was altered, or comes from another run"
        )
    return RunDescription(config, method, task, stored["training"], actual)


def read_description(output: Path, config: TrainConfig) -> dict[str, Any]:
    """What the folder says of its run, if any; a RunError where that has another configuration."""
    if not (output / RUN_FILE).is_file():
        return {}
    stored = read_json(output / RUN_FILE, RunError)
    old, new = stored.get("config", {}), asdict(config)
    different = [f"{k}: {old.get(k)!r} there, {new[k]!r} now" for k in new if k != "output" and old.get(k) != new[k]]
    if different:
        raise RunError(f"{output} holds a run of another configuration ({'; '.join(different)}); choose another output")
    return stored


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

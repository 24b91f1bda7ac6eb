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

from .. import models, tasks
from ..adapter import BlobConfig, library_versions, posterior_config
from ..adapter.storage import BLOB_CONFIG, SAVED, content_sha256
from ..data import Known
from ..files import json_sha256, locked, read_hashed_json, read_json, write_hashed_json
from ..methods import Method
from .config import RunConfig, RunError, different

TASK_FILE, RUN_FILE, CONFIG_FILE, CHECKPOINTS = "task.json", "run.json", "config.yaml", "checkpoints"
VALIDATION_FIGURE = "validation.png"
HUB = "hub:"
_FIELDS = (
    "text",
    "text_pair",
    "label",
    "labels",
    "value",
    "tokens",
    "tags",
    "question",
    "choices",
    "answer",
    "prompt",
    "response",
    "messages",
    "chosen",
    "rejected",
    "margin",
    "responses",
)
_HUB_FILES = ["*.json", "*.safetensors", "*.png"]  # nothing that could be run
PLACES = ("model", "data", "validation", "output", "trunk_cache")
"""Options that may say where something lies, which can change: no hash is over them."""
_LATER = ("distance.safetensors",)  # made for a finished run; its own JSON file has its hash


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What ``run.json`` holds, besides its own hash; until the training is finished only what it is to be.

    Attributes:
        libraries: versions of those that wrote it.
        config: what was given.
        options: the method's options with their defaults.
        records_sha256: of the training records.
        validation_sha256: of the validation records.
        columns: of the training data, by field, where they aren't called as their field.
        base: SHA-256 of the base model's files by name, see `bloblora.models.fingerprint`.
        files: SHA-256 of each file of the folder that decides an answer.
        training: what the training took.
    """

    libraries: dict[str, str]
    config: dict[str, Any]
    options: dict[str, Any]
    records_sha256: str | None = None
    validation_sha256: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


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
        adapter_sha256: of the trained weights' file.
        files: SHA-256 of each file that decides an answer; all were checked.
        base: SHA-256 of the base model's files, which `load_run` checks.
        records_sha256: of the training records.
        remote: whether it is on the hub.
        columns: of the training data, by field, where they aren't called as their field.
        validation_sha256: of the validation records.
    """

    folder: Path
    name: str
    config: RunConfig
    method: Method
    task: tasks.Task
    training: dict[str, Any]
    adapter_sha256: str
    files: Mapping[str, str]
    base: Mapping[str, str]
    records_sha256: str | None = None
    remote: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    validation_sha256: str | None = None

    @property
    def known(self) -> Known:
        """Of records for the run: the columns of its own, and what its task says."""
        return known_of(self.task, {**self.config.reading_options().columns(), **self.columns})

    @property
    def posterior(self) -> BlobConfig | None:
        """Of what the Gaussian is; None of a method that has none."""
        return posterior_config(self.folder) if (self.folder / BLOB_CONFIG).is_file() else None

    def check_base(self) -> None:
        """Raise a ModelError where the base model is gone, or isn't the one of the training."""
        try:
            models.check_folder(self.config.model)
        except models.ModelError as error:
            there = self.folder / RUN_FILE
            raise models.ModelError(f"{error}; if it has moved, name its place in {there}, as 'model'") from error
        models.check_fingerprint(self.config.model, self.base)


def known_of(task: tasks.Task, columns: Mapping[str, str]) -> Known:
    """What a run's task says of records for it, whose fields may be in these columns."""
    return Known(columns=columns, kind=task.kind, labels=task.labels, answer=task.answer)


def is_deterministic(method: Method, training: dict[str, Any]) -> bool:
    """Whether all draws of a run are one function: of its method, or since no width, τ = 0, was best."""
    return method.deterministic or training.get("rescaling", {}).get("width") == 0


def open_run(directory: str | os.PathLike[str] | RunDescription) -> RunDescription:
    """Read and check a finished run's folder, or ``hub:user/name``; no model is loaded.

    Raises:
        RunError: the folder isn't one, its training isn't finished, it was written by a version with other options, or
            a file was altered.
        AdapterFileError: the adapter's files are damaged.
    """
    if isinstance(directory, RunDescription):
        return directory
    folder = local_folder(directory)
    if not (folder / RUN_FILE).is_file():
        raise RunError(f"{folder}: no {RUN_FILE} in it; give a folder that `bloblora train` wrote")
    stored = read_run_file(folder)
    config, method = _read_config(folder / RUN_FILE, stored)
    if not stored.training:
        raise RunError(f"{folder}: its training isn't finished; run the same `bloblora train` again to continue")
    described = read_json(folder / TASK_FILE, RunError)
    try:
        task = tasks.task_from_dict(described)
    except tasks.TaskError as error:
        raise RunError(f"{folder / TASK_FILE}: {error}") from error
    weights = method.weights_file(folder)
    _check_files(folder, method, stored.files, {TASK_FILE: json_sha256(described)})
    remote = is_remote(directory)
    repository = os.fspath(directory).removeprefix(HUB).partition("@")[0] if remote else ""
    name = repository.rpartition("/")[2] if remote else folder.resolve().name
    return RunDescription(
        folder,
        name,
        config,
        method,
        task,
        stored.training,
        stored.files[weights.name],
        stored.files,
        stored.base,
        stored.records_sha256,
        remote,
        stored.columns,
        stored.validation_sha256,
    )


def read_run_file(folder: Path) -> RunFile:
    """What ``run.json`` says; a RunError where it isn't one, or was altered."""
    return RunFile(**read_hashed_json(folder / RUN_FILE, RunError, RunFile, _without_places))


def write_run_file(folder: Path, content: RunFile) -> None:
    """Write ``run.json`` with its own hash; what is empty is left out."""
    needed = ("libraries", "config", "options")
    given = {name: value for name, value in vars(content).items() if name in needed or value}
    write_hashed_json(folder / RUN_FILE, given, _without_places)


def files_sha256(folder: Path, method: Method) -> dict[str, str]:
    """SHA-256 of each file of a run's folder that decides an answer, by its path; what PEFT and bloblora read there.

    Of ``adapter_config.json`` it leaves out where the base model lies.
    """
    return {name: content_sha256(folder / name) for name in _deciding(folder, method)}


def _deciding(folder: Path, method: Method) -> list[str]:
    files = {file for pattern in (TASK_FILE, *method.files) for file in folder.glob(pattern)}
    return sorted(name for file in files if (name := file.relative_to(folder).as_posix()) not in _LATER)


def _check_files(folder: Path, method: Method, expected: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Raise a RunError for a file that isn't the one of the training; of some the hash is ``known``."""
    if not expected:
        raise RunError(f"{folder / RUN_FILE}: field 'files' is missing: bloblora before 0.2 wrote it; train again")
    for name in sorted({*expected, *_deciding(folder, method)}):
        if not (file := folder / name).is_file():
            raise RunError(f"{file}: missing; {RUN_FILE} has its SHA-256")
        if name not in expected:
            raise RunError(f"{file}: isn't one of the run's files, by {RUN_FILE}; remove it")
        if (known.get(name) or content_sha256(file)) != expected[name]:
            raise RunError(f"{file}: its SHA-256 isn't the one in {RUN_FILE}: it was altered, or is of another run")
    for place in sorted({(folder / name).parent / SAVED for name in expected}):
        if place.exists():  # which would be read in the place of the files
            raise RunError(f"{place}: isn't one of the run's files; remove it")


def _without_places(content: dict[str, Any]) -> dict[str, Any]:
    """What the hash of ``run.json`` is over: all but where the data and the base model lie."""
    config = {k: "" if k in PLACES and isinstance(v, str) else v for k, v in content["config"].items()}
    return content | {"config": config}


def described(config: RunConfig) -> RunFile:
    """What ``run.json`` says of a configuration: what was given, and the method's options with their defaults."""
    return RunFile(libraries=library_versions(), config=config.given(), options=config.build_method().described())


def read_description(output: Path, config: RunConfig, besides: Collection[str] = ()) -> RunFile | None:
    """What the folder says of its run, if any; a RunError where that has another configuration, ``besides`` options.

    Data may have moved: their records are compared.
    """
    if not (output / RUN_FILE).is_file():
        return None
    stored = read_run_file(output)
    given = _read_config(output / RUN_FILE, stored)[0].given(), config.given()
    moved = [name for name in ("data", "validation") if all(isinstance(one.get(name), str) for one in given)]
    if found := different(*given, besides=("output", *moved, *besides)):
        only_model = all(problem.startswith("model: ") for problem in found)
        advice = f"; or if that has only moved, name its place in {output / RUN_FILE}" if only_model else ""
        raise RunError(
            f"{output} holds a run of another configuration ({'; '.join(found)}); choose another output{advice}"
        )
    return stored


def _read_config(file: Path, stored: RunFile) -> tuple[RunConfig, Method]:
    """What was given, and the method with the defaults of the version that wrote the file."""
    try:
        config = RunConfig(**stored.config)
        return config, config.with_options(method={"name": config.method["name"], **stored.options}).build_method()
    except (KeyError, TypeError, AttributeError, RunError) as error:
        here, there = library_versions()["bloblora"], stored.libraries.get("bloblora", "0.1")
        raise RunError(f"{file}: written by bloblora {there}, this is {here}: {error}") from error


def check_writable(file: str | os.PathLike[str]) -> None:
    """Make a file's folder, and raise a RunError when the file can't be written there: before hours of work."""
    file = Path(file)
    device = Path(os.path.abspath(file)).parent == Path("/dev")  # as /dev/stdout, a link that may lead to a file
    if file.exists() and (device or not file.is_file()):  # a device or a pipe would be replaced by a file
        raise RunError(f"{file}: is {'a folder' if file.is_dir() else 'no regular file'}; give a file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise RunError(f"{file}: can't be written: {error.strerror or error}") from error


def check_local(description: RunDescription) -> None:
    """Raise a RunError for a run on the hub, where nothing can be saved."""
    if description.remote:
        raise RunError(f"{description.name}: is on the hub; calibrate in a folder, and push that")


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

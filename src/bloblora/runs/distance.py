"""The distance of hidden states of a run: fitted on its training records, and kept in its folder."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import data
from ..adapter import AdapterFileError
from ..files import locked
from ..methods.method import Training, read_state, write_state
from ..prediction import Distance, hidden_states
from .checks import targets_of
from .config import RunError
from .folder import RunDescription, read_fields, records_sha256
from .selection import hold_out, select_for

if TYPE_CHECKING:
    from .run import Run

_STATE = "distance"


def open_distance(description: RunDescription) -> Distance | None:
    """The distance in a finished run's folder, or None where none was fitted for its adapter; no model is loaded.

    Raises:
        AdapterFileError: its files are damaged.
    """
    if not (description.folder / f"{_STATE}.json").is_file():
        return None
    values, tensors = read_state(description.folder, _STATE)
    if values.get("adapter_sha256") != description.adapter_sha256:
        return None
    try:
        return Distance(**tensors)
    except TypeError as error:
        raise AdapterFileError(f"{description.folder / _STATE}.safetensors: {error}") from error


def training_records(description: RunDescription) -> list[dict[str, Any]]:
    """The records that a run was trained on, read again.

    Raises:
        DataError: they can't be read.
        RunError: they were in memory, or are others by now.
    """
    config = description.config
    if (source := config.source("data")) == data.IN_MEMORY:
        raise RunError(
            f"{description.folder}: its training records were in memory, and distances need them: call "
            "runs.fit_distance(run, description, records) once, which saves the distance in the folder"
        )
    reader = data.Reader(source, config.reading_options(), known=config.known(), silent=True)
    records = select_for(config, [*map(read_fields, reader)])
    if description.records_sha256 not in (None, records_sha256(records)):
        raise RunError(f"{source}: changed since the run was trained on it; distances need the training records")
    return hold_out(config, description.method, records)[0]


def fit_distance(
    run: Run,
    description: RunDescription,
    records: Any,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Distance:
    """Fit the distance on training records, for what the run predicts from now on.

    It is saved in the run's folder unless that is a copy of the hub's. Texts have the classes of their labels;
    questions are one class. ``records`` are what `bloblora.data.as_records` takes.

    Raises:
        ValueError: there are too few records, or their hidden states are all equal.

    Warns:
        UserWarning: the folder can't be written, so that the distance isn't saved.
    """
    records = data.as_records(records, known=description.known, require_labels=True)
    states = run.hidden_states(records, batch_size=batch_size, progress=progress)
    classes = targets_of(run.task, records) if run.task.answer == "label" else None
    run.distance = Distance.fit(states, classes)
    if not description.remote:
        try:
            save_distance(run, description.folder)
        except OSError as error:  # a folder that others share, for reading
            warnings.warn(f"the distance isn't in the run's folder, which can't be written: {error}", stacklevel=2)
    return run.distance


def distance_of(run: Run, training: Training) -> Distance | None:
    """That of a run that has just been trained; None where its records can't tell one."""
    how: dict[str, Any] = {"task": training.task, "sampler": run.sampler}
    states = hidden_states(run.model, training.examples, batch_size=32, **how)
    labels = run.task.likelihood.targets([example["label"] for example in training.examples])
    with suppress(ValueError):  # all records of a label are alike
        return Distance.fit(states, labels)
    return None


def save_distance(run: Run, folder: Path) -> None:
    """Write a run's distance beside its adapter; an OSError where that can't be."""
    values = {"adapter_sha256": run.adapter_sha256}
    with locked(folder / f"{_STATE}.json"), locked(folder / f"{_STATE}.safetensors"):
        write_state(folder, _STATE, values, vars(run.distance))

"""The distance of hidden states of a run: fitted on its training records, and kept in its folder."""

import warnings
from typing import Any

from .. import data
from ..adapter import AdapterFileError
from ..evaluation import Distance
from ..files import locked
from ..methods.method import read_state, write_state
from .config import RunError
from .evaluate import targets_of
from .folder import RunDescription, read_fields, records_sha256
from .run import Run
from .selection import hold_out, select_for

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
    """Fit the distance on training records, and save it in the run's folder unless that is a copy of the hub's.

    Texts have the classes of their labels; questions are one class. ``records`` are what `bloblora.data.as_records`
    takes.

    Raises:
        ValueError: there are too few records, or their hidden states are all equal.

    Warns:
        UserWarning: the folder can't be written, so that the distance isn't saved.
    """
    records = data.as_records(records, known=description.known, require_labels=True)
    states = run.hidden_states(records, batch_size=batch_size, progress=progress)
    classes = targets_of(run.task, records) if run.task.answer == "label" else None
    distance = Distance.fit(states, classes)
    if not description.remote:
        folder, values = description.folder, {"adapter_sha256": description.adapter_sha256}
        try:
            with locked(folder / f"{_STATE}.json"), locked(folder / f"{_STATE}.safetensors"):
                write_state(folder, _STATE, values, vars(distance))
        except OSError as error:  # a folder that others share, for reading
            warnings.warn(f"the distance isn't in the run's folder, which can't be written: {error}", stacklevel=2)
    return distance

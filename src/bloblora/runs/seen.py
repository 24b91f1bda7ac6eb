"""Which records a run has seen: its folder has short hashes of them, so that nothing is calibrated on them."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import json_sha256, read_hashed_json, write_hashed_json
from .config import RunError
from .folder import RunDescription, read_fields

SEEN_FILE = "seen.json"
# Hexadecimal. Of a million records and a million others two agree by chance with a probability of 5e-8.
_DIGITS = 16
_WHY = "it was trained on them, or they chose its checkpoint"


@dataclass(frozen=True)
class _File:
    """The hashes one after the other."""

    records: str


def write_seen(folder: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write hashes of the records that a run is trained on, or stopped in time on; they aren't uploaded."""
    write_hashed_json(folder / SEEN_FILE, {"records": "".join(sorted({*map(_short, records)}))})


def seen(description: RunDescription, records: Sequence[dict[str, Any]]) -> list[int]:
    """Positions of the records that the run has seen, with the same input and answer.

    None where its folder has no hashes, as that of a run from the hub.

    Raises:
        RunError: the file with them is damaged.
    """
    if not (file := description.folder / SEEN_FILE).is_file():
        return []
    stored = read_hashed_json(file, RunError, _File)["records"]
    known = {stored[start : start + _DIGITS] for start in range(0, len(stored), _DIGITS)}
    return [position for position, record in enumerate(records) if _short(record) in known]


def unseen(description: RunDescription, records: Sequence[dict[str, Any]]) -> list[int]:
    """Positions of the other records, on which the run can be calibrated.

    Raises:
        RunError: the run has seen at least half of the records: without them they would be others than were meant.

    Warns:
        UserWarning: some are left out.
    """
    known = {*seen(description, records)}
    if known and 2 * len(known) >= len(records):
        raise RunError(f"{said(len(known), len(records))}; calibrate on records that it has not seen")
    if known:
        warnings.warn(f"{said(len(known), len(records))}; these are left out", stacklevel=3)
    return [position for position in range(len(records)) if position not in known]


def unseen_predictions(description: RunDescription, file: Path, records: Sequence[dict[str, Any] | None]) -> list[int]:
    """As `unseen`, of the records whose predictions a file has; None of one that its line doesn't say.

    Warns:
        UserWarning: also where there are such lines, of which nothing is known.
    """
    if lacking := sum(record is None for record in records):
        warnings.warn(
            f"{file}: {lacking} of {len(records)} lines don't say their whole record, and the run may have seen it, "
            "which would make the promises worthless; give the records with --data",
            stacklevel=2,
        )
    return unseen(description, [record or {} for record in records])


def said(num_seen: int, num_records: int) -> str:
    """How many of the records a run has seen, and why that matters."""
    return f"the run has seen {num_seen} of the {num_records} records: {_WHY}"


def _short(record: dict[str, Any]) -> str:
    return json_sha256(read_fields(record))[:_DIGITS]

"""A run's decisions: calibrated on held-out records, kept in its folder, used by what predicts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..decision import Decision, fit_decision
from ..files import read_json, write_json
from .checks import check_kind
from .config import RunError
from .evaluate import targets_of
from .folder import RUN_FILE
from .remote import is_remote, local_folder
from .run import Run

DECISION_FILE, FORMAT_VERSION = "decision.json", 1


def calibrate(
    run: Run,
    directory: str | os.PathLike[str],
    records: Sequence[dict[str, Any]],
    outside: Sequence[dict[str, Any]] | None = None,
    num_samples: int = 10,
    seed: int = 0,
    *,
    batch_size: int = 32,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Fit a run's decisions on held-out labelled records, and save them in its folder.

    Args:
        run: what `load_run` gave.
        directory: its folder.
        records: in scope, used for nothing else: not for training or a temperature, not to choose settings.
        outside: out of scope; they decide nothing.
        num_samples: weight draws N; the decisions are for this N, seed and approximation only.
        seed: of the draws.
        batch_size: inputs a forward.
        progress: show a bar.
        options: of `bloblora.decision.fit_decision`.

    Returns:
        What the file says: what the decisions are for, their thresholds and promises, and ``realized``, what became of
        them on the same records.

    Raises:
        RunError: records of the other kind, or a label that the run doesn't know.
        ValueError: a promise can't be made on these records; nothing is saved.
    """
    if is_remote(directory):
        raise RunError(f"{directory}: is on the hub; calibrate in a folder, and push that")
    check_kind(run.task, records)
    targets = targets_of(run.task, records)
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    inside = run.predict(records, num_samples, seed, **settings)
    decision = fit_decision(inside, targets, **options)
    far = None
    if outside is not None:
        check_kind(run.task, outside)
        far = run.predict(outside, num_samples, seed, **settings)
    content = {
        "format_version": FORMAT_VERSION,
        **_described(directory, num_samples, seed, run.approximate),
        "decision": decision.to_dict(),
        "promises": decision.promises,
        "realized": decision.realized(inside, targets, far),
    }
    write_json(Path(directory) / DECISION_FILE, content)
    return content


def open_decision(
    directory: str | os.PathLike[str], num_samples: int, seed: int, approximate: str | None = None
) -> Decision | None:
    """The decisions in a finished run's folder, or None where it was never calibrated; no model is loaded.

    Raises:
        RunError: they are for another N, seed, approximation or adapter, or the file is damaged.
    """
    file = local_folder(directory) / DECISION_FILE
    if not file.is_file():
        return None
    stored = read_json(file, RunError)
    if (found := stored.get("format_version")) != FORMAT_VERSION:
        raise RunError(f"{file}: format_version is {found!r}; this bloblora reads {FORMAT_VERSION}")
    here = _described(directory, num_samples, seed, approximate)
    different = [
        f"{name} {stored.get(name)} there, {value} now" for name, value in here.items() if stored.get(name) != value
    ]
    if different:
        raise RunError(
            f"{file} is for other predictions ({'; '.join(different)}); run `bloblora calibrate` again with these, or "
            "remove the file to predict without decisions"
        )
    try:
        return Decision.from_dict(stored["decision"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file}: not what this version of bloblora writes: {error}") from error


def _described(
    directory: str | os.PathLike[str], num_samples: int, seed: int, approximate: str | None
) -> dict[str, Any]:
    """Which predictions the decisions are for."""
    adapter = read_json(local_folder(directory) / RUN_FILE, RunError).get("adapter_sha256")
    return {"num_samples": num_samples, "seed": seed, "approximate": approximate, "adapter_sha256": adapter}

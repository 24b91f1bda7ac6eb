"""A run's decisions: calibrated on held-out records, kept in its folder, used by what predicts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import as_records, unanswered
from ..decision import Decision, check_promises, fit_decision
from ..files import json_sha256
from ..messages import quoted
from ..prediction import DISTANCES, KINDS, Prediction
from .checks import check_kind, targets_of, warn_of_copies
from .config import RunError
from .distance import open_distance
from .entries import EntriesFile, changes, has, there_and_now
from .folder import RunDescription, check_local, check_writable
from .predictions import SCALES, identity_of, keep_predictions, kept_prediction, state_of
from .run import PredictionOptions, Run, load_run
from .seen import unseen

DECISION_FILE = "decision.json"


@dataclass(frozen=True)
class _Entry:
    """Decisions and which predictions they are for, as the file has them."""

    num_samples: int
    seed: int
    approximate: str | None
    adapter_sha256: str
    files_sha256: str
    decision: Decision
    promises: dict[str, str]
    realized: dict[str, float]
    temperature: float | None = None
    width: float | None = None
    text: dict[str, Any] | None = None
    correctness_sha256: str | None = None


@dataclass(frozen=True)
class _File:
    format_version: int
    decisions: list[_Entry]


DECISIONS = EntriesFile(_File, 2, "calibrate")
KEPT_PREDICTIONS = "calibration"
"""Folder in a run's own with the predictions of calibration records, which hold the records' texts."""


def calibrate(
    description: RunDescription,
    records: Any,
    outside: Any = None,
    options: PredictionOptions = PredictionOptions(),  # noqa: B008  # frozen
    *,
    progress: bool = False,
    **promises: Any,
) -> dict[str, Any]:
    """Fit a run's decisions on held-out labelled records, and save them in its folder.

    The predictions are kept there too: other promises on the same records need no model.

    Args:
        description: of the run.
        records: in scope, what `bloblora.data.as_records` takes, used for nothing else: not for training or a
            temperature, not to choose settings. A few that the run has seen are left out, with a warning.
        outside: out of scope; they decide nothing.
        options: of the predictions; the decisions are for these samples, seed and approximation only.
        progress: show a bar.
        promises: of `bloblora.decision.fit_decision`.

    Returns:
        As `calibrate_on`.

    Raises:
        RunError: records of the other kind, of which the run has seen at least half, or with a label that it doesn't
            know; a run on the hub, or one whose folder can't be written.
        DataError: records that can't be used.
        PromiseError: none of the promises can be made on these records; nothing is saved.
        ValueError: a promise is out of its range.
    """
    check_place(description)
    records = as_records(records, known=description.known, require_labels=True)
    outside = None if outside is None else as_records(outside, known=description.known)
    for side in (records, outside):
        if side is not None:
            check_kind(description.task, side)
    targets_of(description.task, records)  # errors number all records
    distance = open_distance(description)
    if (score := promises.get("score")) in DISTANCES and distance is None:
        raise RunError(
            f"score {quoted(score)}: of this run no distance from its training records is known; `bloblora evaluate` "
            "with --distances fits it"
        )
    records = [records[position] for position in unseen(description, records)]
    warn_of_copies([unanswered(record) for record in records])
    check_promises(len(records), predicted=KINDS[description.task.likelihood.name], **promises)
    targets = targets_of(description.task, records)

    @cache
    def run() -> Run:
        return load_run(description, options.approximate, trust_remote_code=options.trust_remote_code)

    def predict(chunk: Sequence[dict[str, Any]]) -> Prediction:
        return run().predict(chunk, options.samples, options.seed, batch_size=options.batch_size)

    def kept(side: Sequence[dict[str, Any]]) -> Prediction:
        identity = {**identity_of(description, side, options), "distances": distance is not None}
        named = json_sha256({**identity, "ids": [record.get("id") for record in side]})
        file = description.folder / KEPT_PREDICTIONS / f"{named[:12]}.jsonl"
        file.parent.mkdir(exist_ok=True)
        keep_predictions(file, description.task, side, predict, identity, progress=progress)
        with file.open(encoding="utf-8") as lines:
            return kept_prediction(map(json.loads, lines), options.samples, description.task)

    inside = kept(records)
    return calibrate_on(inside, targets, None if outside is None else kept(outside), description, options, **promises)


def calibrate_on(
    inside: Prediction,
    targets: Tensor,
    outside: Prediction | None = None,
    description: RunDescription | None = None,
    options: PredictionOptions = PredictionOptions(),  # noqa: B008  # frozen
    **promises: Any,
) -> dict[str, Any]:
    """Fit decisions on predictions that are at hand, and save them in the run's folder where there is one.

    Decisions for another N, seed or approximation stay there; those for another adapter, T or τ go.

    Args:
        inside: of inputs in scope.
        targets: (n,), their right columns.
        outside: of inputs out of scope; they decide nothing.
        description: of the run that predicted; None for any other model.
        options: with which.
        promises: of `bloblora.decision.fit_decision`; the default of ``score`` is
            `bloblora.prediction.Prediction.usual_score`.

    Returns:
        What the file says: what the decisions are for, their thresholds and promises, why others can't be promised, and
        ``realized``, what became of them on the same records.

    Raises:
        RunError: a run on the hub, or one whose folder can't be written.
        PromiseError: none of the promises can be made; nothing is saved.
        ValueError: a promise is out of its range.
    """
    if description is not None:
        check_place(description)
        promises["score"] = promises.get("score") or _usual_score(description, inside)
    decision = fit_decision(inside, targets, **promises)
    content = {
        "decision": decision.to_dict(),
        "promises": decision.promises,
        "realized": decision.realized(inside, targets, outside),
    }
    if description is None:
        return content
    return save_decision(description, options.how(), content)


def _usual_score(description: RunDescription, inside: Prediction) -> str:
    """As `Prediction.usual_score`, which what was kept of a prediction doesn't know."""
    over_head = (posterior := description.posterior) is not None and posterior.head_prior_std != "none"
    if inside.num_samples and over_head and not inside.distances and not inside.mutual_information.isnan().any():
        return "mutual_information"
    return inside.usual_score


def save_decision(description: RunDescription, how: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Write what was decided beside the decisions for other predictions than ``how`` says; the whole entry."""
    state = state_of(description)
    entry = {**how, **state, **content}
    DECISIONS.put(description.folder / DECISION_FILE, entry, how, state)
    return entry


def open_decision(description: RunDescription, options: PredictionOptions) -> Decision | None:
    """The decisions in a finished run's folder, or None where it was never calibrated; no model is loaded.

    Args:
        description: of the run.
        options: of the predictions.

    Raises:
        RunError: they are for another N, seed, approximation, adapter, T or τ, or the file is damaged.
    """
    file = description.folder / DECISION_FILE
    here, entries = options.how(), open_decisions(description)
    if not file.is_file():
        return None
    for entry, decision in entries:
        if has(entry, here):
            return decision
    there = there_and_now((entry for entry, _ in entries), here)
    raise RunError(
        f"{file} is for other predictions ({there}); run `bloblora calibrate` again with these, or remove the file to "
        "predict without decisions"
    )


def open_decisions(description: RunDescription) -> list[tuple[dict[str, Any], Decision]]:
    """All decisions in a finished run's folder, and for which N, seed and approximation each is.

    Raises:
        RunError: they are for another adapter, T or τ, or the file is damaged.
    """
    file = description.folder / DECISION_FILE
    if not file.is_file():
        return []
    return [*_checked(file, state_of(description))]


def open_realized(description: RunDescription, options: PredictionOptions) -> dict[str, float]:
    """What became of the decisions for these options on the records that they were fitted on; none without them.

    Raises:
        RunError: as `open_decisions`.
    """
    here = options.how()
    return next((entry["realized"] for entry, _ in open_decisions(description) if has(entry, here)), {})


def _checked(file: Path, state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Decision]]:
    for entry in DECISIONS.read(file):
        if found := changes(entry, {**dict.fromkeys(SCALES), **state}):
            raise RunError(
                f"{file} is for other predictions ({'; '.join(found)}); run `bloblora calibrate` again with these, "
                "or remove the file to predict without decisions"
            )
        try:
            yield entry, Decision.from_dict(entry["decision"])
        except ValueError as error:
            raise RunError(f"{file}: not what this version of bloblora writes: {error}") from error


def check_place(description: RunDescription) -> None:
    """Raise a RunError for a run on the hub, or one whose folder can't be written."""
    check_local(description)
    check_writable(description.folder / DECISION_FILE)

"""What a run's predictions are worth, and what they say."""

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..decision import Decision
from ..evaluation import reliability, reliability_diagram, summary
from ..files import locked, read_json, replacing, write_json
from .checks import check_kind, targets_of
from .config import RunError
from .folder import RunDescription, records_sha256
from .lines import lines_of
from .predictions import keep_predictions, kept_prediction, state_of
from .run import PredictionOptions, Run

METRICS_FILE = "metrics.json"


def evaluate(
    run: Run,
    records: Any,
    outside: Any = None,
    options: PredictionOptions = PredictionOptions(),  # noqa: B008  # frozen
    *,
    progress: bool = False,
    diagram: Path | None = None,
    decision: Decision | None = None,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Metrics of a run on labelled records; ``outside`` are records out of its scope, whose labels don't matter.

    Both are what `bloblora.data.as_records` takes: a list of dicts, a table, a dataset.
    With ``diagram`` a reliability diagram is written to that PNG; with ``decision`` also what became of its promises.
    With ``predictions`` the lines of `describe` are written to that file as they are made, those of ``outside`` last
    and marked as such, with ``log_probabilities`` and ``num_draws``; what a call that was stopped has written isn't
    predicted again.

    Raises:
        RunError: records of the other kind, a label that the run doesn't know, or ``predictions`` of something else.
        DataError: records that can't be used.
    """
    records = run.records(records, require_labels=True)
    check_kind(run.task, records)
    targets = targets_of(run.task, records)
    if outside is not None:
        outside = run.records(outside)
        check_kind(run.task, outside)
    settings: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
    if predictions is None:
        inside = run.predict(records, options.samples, options.seed, **settings)
        far = None if outside is None else run.predict(outside, options.samples, options.seed, **settings)
    else:
        both = [*records, *(outside or [])]
        identity = {
            "adapter_sha256": run.adapter_sha256,
            **run.scales,
            "records_sha256": records_sha256(both),
            "num_samples": options.samples,
            "seed": options.seed,
            "approximate": run.approximation.name if run.approximation else None,
            "decision": decision.to_dict() if decision else None,
            "distances": run.distance is not None,
        }
        predict = partial(run.predict, num_samples=options.samples, seed=options.seed, batch_size=options.batch_size)
        how: dict[str, Any] = {"num_inside": len(records), "progress": progress}
        keep_predictions(predictions, run.task, both, predict, identity, decision, **how)
        with predictions.open(encoding="utf-8") as lines:
            rows = map(json.loads, lines)
            inside = kept_prediction(islice(rows, len(records)), options.samples, run.task)
            far = None if outside is None else kept_prediction(rows, options.samples, run.task)
    if diagram is not None:
        name = f"{run.config.method['name']}, N = {inside.num_samples}"
        reliability_diagram({name: reliability(inside.probabilities, targets)}, diagram)
    result = summary(inside, targets, far) | run.scales
    return result | (decision.realized(inside, targets, far) if decision else {})


def describe(
    run: Run,
    records: Any,
    options: PredictionOptions = PredictionOptions(),  # noqa: B008  # frozen
    decision: Decision | None = None,
) -> Iterator[dict[str, Any]]:
    """For each record its answer, how uncertain it is, and decisions: what `Prediction.answers` says, and `Decided`."""
    records = run.records(records)
    prediction = run.predict(records, options.samples, options.seed, batch_size=options.batch_size)
    yield from lines_of(run.task, records, prediction, decision)


def metrics_source(data: str) -> str:
    """What the metrics of data are called: its name, and of a file or folder its whole path."""
    return str(Path(data).absolute()) if Path(data).exists() else data


def save_metrics(
    description: RunDescription,
    result: dict[str, Any],
    options: PredictionOptions,
    data: str,
    ood: str | None = None,
    diagram: Path | None = None,
) -> None:
    """Put what `evaluate` found into the run's ``metrics.json``: an entry for each data set, N, seed and approximation.

    It takes the place of an earlier one of the same, and those of another adapter, T or τ go. A ``diagram`` that is
    elsewhere is copied to ``reliability-NAME.png``, where the card finds it.

    Raises:
        RunError: the file can't be read.
        OSError: it can't be written.
    """
    place: dict[str, Any] = {"data": metrics_source(data)}
    if ood is not None:
        place["out_of_scope"] = metrics_source(ood)
    place |= options.how()
    state = state_of(description)
    file = description.folder / METRICS_FILE
    with locked(file):
        kept = [
            entry
            for entry in read_metrics(description.folder)
            if {**entry, **state} == entry
            and any(entry.get(name) != place.get(name) for name in (*place, "out_of_scope"))
        ]
        write_json(file, {"evaluations": [*kept, {**place, **state, "metrics": result}]})
    if diagram is not None and diagram.absolute().parent != description.folder.absolute():
        name = re.sub(r"[^\w.-]+", "-", Path(data).stem if Path(data).exists() else data)
        with replacing(description.folder / f"reliability-{name}.png") as partial:
            shutil.copyfile(diagram, partial)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's ``metrics.json``, the latest last; none where it was never evaluated.

    An entry has ``data``, ``out_of_scope`` where there was some, ``num_samples``, ``seed``, ``approximate``, what
    `state_of` says, and ``metrics``.

    Raises:
        RunError: the file is damaged.
    """
    if not (file := folder / METRICS_FILE).is_file():
        return []
    entries = read_json(file, RunError).get("evaluations")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("metrics"), dict) and "data" in entry for entry in entries
    ):
        raise RunError(f"{file}: not what `bloblora evaluate` writes; move it away, and evaluate again")
    return entries

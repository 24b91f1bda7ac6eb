"""A run's decisions: calibrated on held-out records, kept in its folder, used by what predicts."""

from typing import Any

from ..data import as_records
from ..decision import Decision, fit_decision
from ..files import read_json, write_json
from .checks import check_kind
from .config import RunError
from .evaluate import targets_of
from .folder import RunDescription
from .run import PredictionOptions, load_run

DECISION_FILE, FORMAT_VERSION = "decision.json", 1


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

    Args:
        description: of the run.
        records: in scope, what `bloblora.data.as_records` takes, used for nothing else: not for training or a
            temperature, not to choose settings.
        outside: out of scope; they decide nothing.
        options: of the predictions; the decisions are for these samples, seed and approximation only.
        progress: show a bar.
        promises: of `bloblora.decision.fit_decision`.

    Returns:
        What the file says: what the decisions are for, their thresholds and promises, and ``realized``, what became of
        them on the same records.

    Raises:
        RunError: records of the other kind, a label that the run doesn't know, or a run on the hub.
        DataError: records that can't be used.
        ValueError: a promise can't be made on these records; nothing is saved.
    """
    if description.remote:
        raise RunError(f"{description.name}: is on the hub; calibrate in a folder, and push that")
    records = as_records(records, require_labels=True)
    outside = None if outside is None else as_records(outside)
    for side in (records, outside):
        if side is not None:
            check_kind(description.task, side)
    targets = targets_of(description.task, records)
    run = load_run(description, options.approximate)
    settings: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
    inside = run.predict(records, options.samples, options.seed, **settings)
    decision = fit_decision(inside, targets, **promises)
    far = None if outside is None else run.predict(outside, options.samples, options.seed, **settings)
    content = {
        "format_version": FORMAT_VERSION,
        **_predictions(description, options),
        "decision": decision.to_dict(),
        "promises": decision.promises,
        "realized": decision.realized(inside, targets, far),
    }
    write_json(description.folder / DECISION_FILE, content)
    return content


def open_decision(description: RunDescription, options: PredictionOptions | None = None) -> Decision | None:
    """The decisions in a finished run's folder, or None where it was never calibrated; no model is loaded.

    Args:
        description: of the run.
        options: of the predictions; None for those that the file is for.

    Raises:
        RunError: they are for another N, seed, approximation or adapter, or the file is damaged.
    """
    file = description.folder / DECISION_FILE
    if not file.is_file():
        return None
    stored = read_json(file, RunError)
    if (found := stored.get("format_version")) != FORMAT_VERSION:
        raise RunError(f"{file}: format_version is {found!r}; this bloblora reads {FORMAT_VERSION}")
    here = {"adapter_sha256": description.adapter_sha256} if options is None else _predictions(description, options)
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


def _predictions(description: RunDescription, options: PredictionOptions) -> dict[str, Any]:
    """Which predictions the decisions are for."""
    return {
        "num_samples": options.samples,
        "seed": options.seed,
        "approximate": options.approximate,
        "adapter_sha256": description.adapter_sha256,
    }

"""What a run's predictions are worth, and what they say."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import tasks
from ..decision import Decided, Decision
from ..evaluation import reliability, reliability_diagram, summary, uncertainty
from .checks import check_kind
from .config import RunError
from .run import Run


def evaluate(
    run: Run,
    records: Sequence[dict[str, Any]],
    outside: Sequence[dict[str, Any]] | None = None,
    num_samples: int = 10,
    seed: int = 0,
    *,
    batch_size: int = 32,
    progress: bool = False,
    diagram: Path | None = None,
    decision: Decision | None = None,
) -> dict[str, Any]:
    """Metrics of a run on labelled records; ``outside`` are records out of its scope.

    With ``diagram`` a reliability diagram is written to that PNG; with ``decision`` also what became of its promises.

    Raises:
        RunError: records of the other kind, or a label that the run doesn't know.
    """
    check_kind(run.task, records)
    targets = targets_of(run.task, records)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    inside = run.predict(records, num_samples, seed, **options)
    far = None
    if outside is not None:
        check_kind(run.task, outside)
        far = run.predict(outside, num_samples, seed, **options)
    if diagram is not None:
        name = f"{run.config.method}, N = {inside.num_samples}"
        reliability_diagram({name: reliability(inside.probabilities, targets)}, diagram)
    return summary(inside, targets, far) | (decision.realized(inside, targets, far) if decision else {})


def describe(
    run: Run,
    records: Sequence[dict[str, Any]],
    num_samples: int = 10,
    seed: int = 0,
    *,
    batch_size: int = 32,
    decision: Decision | None = None,
) -> Iterator[dict[str, Any]]:
    """For each record its answer, the probability of each label or choice, the uncertainty in nats, and decisions."""
    prediction = run.predict(records, num_samples, seed, batch_size=batch_size)
    probabilities, answers = prediction.probabilities, prediction.labels
    scores = uncertainty(prediction) | {"expected_entropy": prediction.expected_entropy}
    decided = decision.decide(prediction) if decision else None
    for i, record in enumerate(records):
        columns = run.task.columns(record)
        if len(set(columns)) < len(columns):
            columns = [f"{index}: {column}" for index, column in enumerate(columns)]
        yield {
            **{key: record[key] for key in ("id", "text", "question") if key in record},
            "label": columns[int(answers[i])],
            "probabilities": {column: float(probabilities[i, j]) for j, column in enumerate(columns)},
            **{name: float(values[i]) for name, values in scores.items()},
            **(_decided(decided, i, columns, probabilities[i]) if decided else {}),
        }


def targets_of(task: tasks.Task, records: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Index of the right column of each labelled record, (n,)."""
    if task.labels is None:
        return torch.tensor([record["answer"] for record in records])
    index = {label: i for i, label in enumerate(task.labels)}
    unknown = [
        f"record {number}: field 'label': {record['label']!r}"
        for number, record in enumerate(records, start=1)
        if record["label"] not in index
    ]
    if unknown:
        more = f"\n… and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        known = ", ".join(task.labels[:10]) + (", …" if len(task.labels) > 10 else "")
        raise RunError("\n".join([f"labels that the model was not trained on (it has {known}):", *unknown[:10]]) + more)
    return torch.tensor([index[record["label"]] for record in records])


def _decided(decided: Decided, index: int, columns: Sequence[str], probabilities: torch.Tensor) -> dict[str, Any]:
    ranked = probabilities.argsort(descending=True, stable=True).tolist()
    return {
        "decision": "answer" if decided.answers[index] else "abstain",
        "label_set": [columns[j] for j in ranked if decided.label_sets[index, j]],
        "out_of_scope": bool(decided.out_of_scope[index]),
    }

"""What a run's predictions are worth, and what they say."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import tasks
from ..data import as_records
from ..decision import Decided, Decision
from ..evaluation import Distance, reliability, reliability_diagram, summary, uncertainty
from ..prediction import Prediction
from .checks import check_kind
from .config import RunError
from .folder import records_sha256
from .processes import append_lines
from .run import PredictionOptions, Run


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
    distance: Distance | None = None,
) -> dict[str, Any]:
    """Metrics of a run on labelled records; ``outside`` are records out of its scope, whose labels don't matter.

    Both are what `bloblora.data.as_records` takes: a list of dicts, a table, a dataset.
    With ``diagram`` a reliability diagram is written to that PNG; with ``decision`` also what became of its promises.
    With ``predictions`` the lines of `describe` are written to that file as they are made, those of ``outside`` last,
    with ``log_probabilities`` and ``num_draws``; what a call that was stopped has written isn't predicted again.
    With ``outside`` and a ``distance`` also how well the distance of hidden states tells the two apart.

    Raises:
        RunError: records of the other kind, a label that the run doesn't know, or ``predictions`` of something else.
        DataError: records that can't be used.
    """
    records = as_records(records, require_labels=True)
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
        _append_predictions(predictions, run, both, options, decision, progress=progress)
        with predictions.open(encoding="utf-8") as lines:
            inside = _Averages.read(islice(lines, len(records)), options.samples)
            far = None if outside is None else _Averages.read(lines, options.samples)
    if diagram is not None:
        name = f"{run.config.method['name']}, N = {inside.num_samples}"
        reliability_diagram({name: reliability(inside.probabilities, targets)}, diagram)
    distances = None
    if distance is not None and outside is not None:
        states = run.hidden_states([*records, *outside], **settings)
        distances = distance.scores(states[: len(records)]), distance.scores(states[len(records) :])
    result = summary(inside, targets, far, distances=distances) | {"num_draws": int(inside.num_draws.max())}
    result |= run.scales
    return result | (decision.realized(inside, targets, far) if decision else {})


def describe(
    run: Run,
    records: Any,
    options: PredictionOptions = PredictionOptions(),  # noqa: B008  # frozen
    decision: Decision | None = None,
) -> Iterator[dict[str, Any]]:
    """For each record its answer, the probability of each label or choice, the uncertainty in nats, and decisions."""
    records = run.records(records)
    prediction = run.predict(records, options.samples, options.seed, batch_size=options.batch_size)
    yield from lines_of(run.task, records, prediction, decision)


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


@dataclass(frozen=True)
class _Averages(Prediction):
    """A prediction of which the averages over the draws were kept: ``log_probs`` is log p̄ alone, (1, n, C)."""

    draws: Tensor
    aleatoric: Tensor

    @classmethod
    def read(cls, lines: Iterator[str], num_samples: int) -> "_Averages":
        """The one whose lines these are."""
        rows, draws, aleatoric = [], [], []
        for line in map(json.loads, lines):
            rows.append(torch.tensor(line["log_probabilities"]))
            draws.append(line["num_draws"])
            aleatoric.append(line["expected_entropy"])
        log_probs = pad_sequence(rows, batch_first=True, padding_value=-math.inf)
        return cls(log_probs[None], num_samples, torch.tensor(draws), torch.tensor(aleatoric))

    @property
    def num_draws(self) -> Tensor:
        return self.draws

    @property
    def log_probabilities(self) -> Tensor:
        return self.log_probs[0]

    @property
    def expected_entropy(self) -> Tensor:
        return self.aleatoric


def _append_predictions(
    file: Path,
    run: Run,
    records: Sequence[dict[str, Any]],
    options: PredictionOptions,
    decision: Decision | None,
    *,
    progress: bool,
) -> None:
    """Write what isn't there yet of the records' lines."""

    def described(chunk: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        prediction = run.predict(chunk, options.samples, options.seed, batch_size=options.batch_size)
        lines = lines_of(run.task, chunk, prediction, decision)
        rows, draws = prediction.log_probabilities.tolist(), prediction.num_draws.tolist()
        for line, row, count in zip(lines, rows, draws, strict=True):
            yield line | {"log_probabilities": row[: len(line["probabilities"])], "num_draws": count}

    identity = {
        "adapter_sha256": run.adapter_sha256,
        **run.scales,
        "records_sha256": records_sha256(records),
        "num_samples": options.samples,
        "seed": options.seed,
        "approximate": run.approximation.name if run.approximation else None,
        "decision": decision.to_dict() if decision else None,
    }
    append_lines(file, records, described, identity, progress=progress)


def lines_of(
    task: tasks.Task, records: Sequence[dict[str, Any]], prediction: Prediction, decision: Decision | None
) -> Iterator[dict[str, Any]]:
    """What `describe` says of each record, of a prediction that is at hand."""
    probabilities, answers = prediction.probabilities, prediction.labels
    scores = uncertainty(prediction) | {"expected_entropy": prediction.expected_entropy}
    decided = decision.decide(prediction) if decision else None
    for i, record in enumerate(records):
        columns = task.columns(record)
        if len(set(columns)) < len(columns):
            columns = [f"{index}: {column}" for index, column in enumerate(columns)]
        yield {
            **{key: record[key] for key in ("id", "text", "text_pair", "question") if key in record},
            "label": columns[int(answers[i])],
            "probabilities": {column: float(probabilities[i, j]) for j, column in enumerate(columns)},
            **{name: float(values[i]) for name, values in scores.items()},
            **(_decided(decided, i, columns, probabilities[i]) if decided else {}),
        }


def _decided(decided: Decided, index: int, columns: Sequence[str], probabilities: torch.Tensor) -> dict[str, Any]:
    ranked = probabilities.argsort(descending=True, stable=True).tolist()
    return {
        "decision": "answer" if decided.answers[index] else "abstain",
        "label_set": [columns[j] for j in ranked if decided.label_sets[index, j]],
        "out_of_scope": bool(decided.out_of_scope[index]),
    }

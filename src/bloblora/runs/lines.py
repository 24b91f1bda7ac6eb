"""What a run says of records, as JSON lines and tables have it."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import tasks
from ..decision import Decided, Decision
from ..files import replacing
from ..prediction import Prediction


def lines_of(
    task: tasks.Task, records: Sequence[dict[str, Any]], prediction: Prediction, decision: Decision | None
) -> Iterator[dict[str, Any]]:
    """What `describe` says of each record, of a prediction that is at hand."""
    columns = [columns_of(task, record) for record in records]
    decided = decision.decide(prediction) if decision else None
    for i, (record, answer) in enumerate(zip(records, prediction.answers(columns), strict=True)):
        answer |= {name: float(values[i]) for name, values in (prediction.distances or {}).items()}
        yield {**repeated(record), **answer, **(_decided(decided, i, answer, task.labels or ()) if decided else {})}


def repeated(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a line repeats of its record."""
    return {key: record[key] for key in ("id", "text", "text_pair", "tokens", "question", "prompt") if key in record}


def columns_of(task: tasks.Task, record: dict[str, Any]) -> Sequence[str]:
    """What a line calls the columns of its record; choices that are equal get a number each."""
    columns = task.columns(record)
    alike = task.labels is None and len(set(columns)) < len(columns)
    return [f"{index}: {column}" for index, column in enumerate(columns)] if alike else columns


def by_column(line: Mapping[str, Any], row: Tensor) -> dict[str, Any]:
    """What a row has for each column of a line with probabilities; it is as wide as the longest of its batch."""
    return dict(zip(line["probabilities"], row.tolist(), strict=False))


def lines_file(output: Path) -> Path:
    """Where lines are written to: the output, or of a table, .csv or .tsv by its name, a hidden file beside it."""
    return output.with_name(f".{output.name}.jsonl") if output.suffix.lower() in (".csv", ".tsv") else output


def write_table(lines: Path, table: Path) -> None:
    """JSON lines as a table, .tsv or .csv by its name, whole or not at all.

    Probabilities have a column each: ``probability_LABEL``, or ``probability_0``, … where lines differ in their
    choices. Other lists and objects are JSON in one cell.
    """
    columns: dict[str, None] = {}
    labels: dict[tuple[str, ...], None] = {}
    for line in _objects(lines):
        columns |= dict.fromkeys(name for name in line if name != "probabilities")
        if "probabilities" in line:
            labels[tuple(line["probabilities"])] = None
    named = next(iter(labels)) if len(labels) == 1 else tuple(map(str, range(max(map(len, labels), default=0))))
    header = [*columns, *(f"probability_{name}" for name in named)]
    with replacing(table) as partial, partial.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
        writer.writerow(header)
        for line in _objects(lines):
            cells = [_cell(line.get(name, "")) for name in columns]
            numbers = [*line.get("probabilities", {}).values()]
            writer.writerow([*cells, *numbers, *[""] * (len(named) - len(numbers))])


def _objects(lines: Path) -> Iterator[Mapping[str, Any]]:
    with lines.open(encoding="utf-8") as handle:
        yield from map(json.loads, handle)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _decided(decided: Decided, index: int, answer: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if decided.answers is not None:
        result["decision"] = "answer" if decided.answers[index] else "abstain"
    if decided.label_sets is not None:
        inside = [name for name, is_in in by_column(answer, decided.label_sets[index]).items() if is_in]
        result["label_set"] = sorted(inside, key=answer["probabilities"].get, reverse=True)
    if decided.out_of_scope is not None:
        result["out_of_scope"] = bool(decided.out_of_scope[index])
    if decided.named is not None:
        result["promised_labels"] = [name for name, named in by_column(answer, decided.named[index]).items() if named]
    if decided.tag_sets is not None:
        rows = decided.tag_sets[index, : len(answer["tags"])].tolist()
        result["tag_sets"] = [[name for name, inside in zip(labels, row, strict=True) if inside] for row in rows]
    if decided.intervals is not None:
        result["promised_interval"] = decided.intervals[index].tolist()
    return result

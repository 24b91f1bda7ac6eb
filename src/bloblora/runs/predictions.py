"""Predictions in files: kept while they are made, and read again, whichever program made them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import tasks
from ..data import DataError
from ..data.columns import label_list
from ..decision import Decision
from ..files import json_sha256, parse_json, read_json
from ..messages import quoted
from ..prediction import MultiLabelPrediction, Prediction, RewardPrediction, ValuePrediction
from ..prediction.kinds import OtherPrediction, prediction_of
from ..prediction.prediction import check_finite
from ..tasks import Bernoulli
from .config import RunError
from .folder import RunDescription, records_sha256
from .lines import columns_of, lines_of, repeated
from .processes import append_lines
from .run import PredictionOptions

_NOT_PROBABILITIES = ("target", "id", "text", "text_pair", "question", "label", "labels")
_PREFIX = "probability_"


@dataclass(frozen=True)
class Averages(Prediction):
    """A prediction of which the averages over the draws were kept: ``log_probs`` is log p̄ alone, (1, n, C).

    Attributes:
        draws: made for each input, (n,).
        aleatoric: mean entropy of the draws, nats, (n,).
        epistemic: mutual information, nats, (n,); NaN where it isn't known.
    """

    draws: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], num_samples: int) -> Averages:
        """The one whose lines these are; each has ``log_probabilities``."""
        rows, log_probs, aleatoric, epistemic = [*rows], [], [], []
        for row in rows:
            log_probs.append(torch.tensor(row["log_probabilities"]))
            aleatoric.append(row.get("expected_entropy", math.nan))
            epistemic.append(row.get("mutual_information", math.nan))
        padded = pad_sequence(log_probs, batch_first=True, padding_value=-math.inf)
        return cls(
            check_finite(padded)[None],
            num_samples,
            _draws(rows, num_samples),
            torch.tensor(aleatoric),
            torch.tensor(epistemic),
        )

    @property
    def num_draws(self) -> Tensor:
        """Draws that were made for each input, (n,)."""
        return self.draws

    @property
    def log_probabilities(self) -> Tensor:
        """log p̄, (n, C)."""
        return self.log_probs[0]

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric uncertainty, nats, (n,)."""
        return self.aleatoric

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty, nats, (n,); NaN where it is not known."""
        return self.epistemic


class ValueAverages(ValuePrediction):
    """Values of which mean and standard deviation were kept, (n,) each, and the epistemic one; NaN where unknown."""

    __init__ = object.__init__

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], num_samples: int) -> ValueAverages:
        """The one whose lines these are."""
        numbers = {name: [row.get(name, math.nan) for row in rows] for name in ("value", "std", "epistemic_std")}
        kept = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
        found = cls()
        found.__dict__ |= {"num_samples": num_samples, "kept": kept, "draws": _draws(rows, num_samples)}
        return found

    num_draws = property(lambda self: self.draws)
    mean = property(lambda self: self.kept["value"])
    std = property(lambda self: self.kept["std"])
    epistemic_std = property(lambda self: self.kept["epistemic_std"])


class LabelAverages(MultiLabelPrediction):
    """Several labels at once of which the probabilities were kept, and the mutual information; NaN where unknown."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], num_samples: int) -> LabelAverages:
        """The one whose lines these are; each has ``probabilities`` as a list."""
        probabilities = torch.tensor([row["probabilities"] for row in rows], dtype=torch.float64)
        found = cls(probabilities.logit()[None], num_samples, Bernoulli())
        epistemic = torch.tensor([row.get("mutual_information", math.nan) for row in rows])
        found.__dict__ |= {"draws": _draws(rows, num_samples), "epistemic": epistemic}
        return found

    num_draws = property(lambda self: self.draws)
    mutual_information = property(lambda self: self.epistemic)


def _draws(rows: Iterable[Mapping[str, Any]], num_samples: int) -> Tensor:
    return torch.tensor([row.get("num_draws", max(1, num_samples)) for row in rows])


def state_of(description: RunDescription) -> dict[str, Any]:
    """What a run's predictions depend on, of its folder: the adapter, all files that decide answers, and T and τ."""
    rescaling = description.training.get("rescaling", {})
    scales = {name: rescaling[name] for name in ("temperature", "width") if name in rescaling}
    files_sha256 = json_sha256(description.files)
    return {"adapter_sha256": description.adapter_sha256, **scales, "files_sha256": files_sha256}


def identity_of(
    description: RunDescription, records: Sequence[dict[str, Any]], options: PredictionOptions
) -> dict[str, Any]:
    """Whose predictions of what these are."""
    how = {"num_samples": options.samples, "seed": options.seed, "approximate": options.approximate}
    return {**state_of(description), "records_sha256": records_sha256(records), **how}


def keep_predictions(
    file: Path,
    task: tasks.Task,
    records: Sequence[dict[str, Any]],
    predict: Callable[[Sequence[dict[str, Any]]], Prediction],
    identity: dict[str, Any],
    decision: Decision | None = None,
    *,
    progress: bool = False,
) -> None:
    """Write what isn't there yet of the records' lines: those of `describe`, and what `kept_prediction` reads.

    Raises:
        RunError: the file holds predictions of another ``identity`` or of other records, or another process writes it.
    """

    def right(record: dict[str, Any]) -> dict[str, Any]:
        target = next((record[name] for name in (task.answer, "label") if record.get(name) is not None), None)
        return {} if target is None else {"target": target}

    def is_of(line: dict[str, Any], record: dict[str, Any]) -> bool:
        expected = json.loads(json.dumps(repeated(record) | right(record)))
        if {**line, **expected} != line:
            return False
        columns = [*columns_of(task, record)]
        if task.likelihood.name != Prediction.kind:
            draws = torch.tensor(line["logits"])
            return draws.shape[1:] == (task.width(record),) and bool(draws.isfinite().all())
        numbers = line["log_probabilities"]
        same = [*line["probabilities"]] == columns and len(numbers) == len(columns)
        return same and math.isclose(math.fsum(map(math.exp, numbers)), 1, abs_tol=1e-3)

    def described(chunk: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        prediction = predict(chunk)
        lines = lines_of(task, chunk, prediction, decision)
        for record, line, exact in zip(chunk, lines, _exact(prediction), strict=True):
            width = task.width(record)  # a row is as wide as the chunk's longest
            if "logits" in exact:
                exact["logits"] = [row[:width] for row in exact["logits"]]
            else:
                exact["log_probabilities"] = exact["log_probabilities"][:width]
            yield line | right(record) | exact

    append_lines(file, records, described, identity, is_of=is_of, progress=progress)


def _exact(prediction: Prediction) -> Iterator[dict[str, Any]]:
    """What `kept_prediction` needs of each input."""
    draws = prediction.num_draws.tolist()
    if isinstance(prediction, OtherPrediction | RewardPrediction):
        logits = prediction.logits.transpose(0, 1).tolist()
        return ({"logits": row, "num_draws": count} for row, count in zip(logits, draws, strict=True))
    rows = prediction.log_probabilities.tolist()
    return ({"log_probabilities": row, "num_draws": count} for row, count in zip(rows, draws, strict=True))


def kept_prediction(rows: Iterable[Mapping[str, Any]], num_samples: int, task: tasks.Task) -> Prediction:
    """The prediction whose lines `keep_predictions` wrote."""
    if task.likelihood.name == Prediction.kind:
        return Averages.of(rows, num_samples)
    each = [torch.tensor(row["logits"]).T for row in rows]
    logits = pad_sequence(each, batch_first=True, padding_value=-math.inf).permute(2, 0, 1)
    return prediction_of(check_finite(logits), num_samples, task.likelihood)


def read_predictions(
    file: Path,
    task: tasks.Task | None = None,
    num_samples: int = 0,
    *,
    targets: Sequence[Any] | None = None,
    labelled: bool = True,
) -> tuple[Prediction, Tensor]:
    """Probabilities or values, and right answers, of any model's predictions.

    A line of a .jsonl file has ``probabilities``, by label or as a list, and ``target``, the right label or its index;
    of several labels at once ``probabilities`` by label and in ``target`` the list of the right ones; of a value
    ``value``, its ``std``, and ``target``. Lines of `bloblora predict` need only the target added. A .csv or .tsv file
    has the same in columns, with one for each label, called as the label is, or ``probability_LABEL`` where there are
    others. Without a task, lines with a ``std`` are of values, and those with ``labels`` or a list as target are of
    several labels.

    Args:
        file: of the predictions.
        task: of the run that made them, whose labels they must have.
        num_samples: N that they were made with.
        targets: the right answers, where the file has none.
        labelled: whether a line needs a right answer; without, all are 0.

    Returns:
        The prediction, and the right columns, (n,), or values, (n,), or whether there is each label, (n, L).

    Raises:
        DataError: lists the lines that can't be used.
        RunError: predictions of another kind, or ``targets`` are more or fewer than the lines.
    """
    numbered = list(_rows(file))
    if targets is not None and len(targets) != len(numbered):
        raise RunError(
            f"{file}: has {len(numbered)} predictions, and there are {len(targets)} labels; give those of it"
        )
    if targets is not None:
        numbered = [(place, row | {"target": right}) for (place, row), right in zip(numbered, targets, strict=True)]
    if not numbered:
        raise DataError([f"{file}: there are no predictions in it"])
    kind, names = _kind(numbered[0][1]) if task is None else task.family.name, None if task is None else task.labels
    if kind not in _FORMS:
        only = "only those of labels, choices, several labels at once and values are read"
        raise RunError(f"predictions {quoted(str(file))}: {only}; give --data")
    form, rows, right, problems = _FORMS[kind], [], [], []
    if names is None and kind == "bernoulli" and isinstance(given := numbered[0][1].get("probabilities"), dict):
        names = tuple(given)
    for place, row in numbered:
        if not labelled:
            row = {**row, "target": form.unknown, "question": ""}
        try:
            read, answer = form.read(row, names)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        rows.append(read)
        right.append(answer)
    if problems:
        raise DataError(problems)
    return form.of(rows, num_samples), torch.tensor(right, dtype=form.dtype)


def check_made_by(file: Path, description: RunDescription, options: PredictionOptions) -> None:
    """Raise a RunError where the file beside predictions says that another state of the run made them, or another N."""
    if not (meta := file.with_name(f"{file.name}.meta.json")).is_file():
        return
    stored, here = read_json(meta, RunError), identity_of(description, [], options)
    # evaluate's file doesn't say the last one, and no records are here to compare
    names = [name for name in here if name != "records_sha256" and (name in stored or name != "files_sha256")]
    wrong = [f"{name} {stored.get(name)} there, {here[name]} now" for name in names if stored.get(name) != here[name]]
    if wrong:
        raise RunError(f"{file}: other predictions than this run's with these options ({'; '.join(wrong)})")


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its place."""
    if not file.is_file():
        raise DataError([f"predictions {quoted(str(file))}: no such file"])
    if (suffix := file.suffix.lower()) not in (".jsonl", ".csv", ".tsv"):
        ending = quoted(suffix)
        raise DataError([f"predictions {quoted(str(file))}: the ending {ending} is not one of .jsonl, .csv, .tsv"])
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if suffix != ".jsonl":
            reader = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
            header = reader.fieldnames or ()
            named = {name: name.removeprefix(_PREFIX) for name in header if name.startswith(_PREFIX)}
            named = named or {name: name for name in header if name not in _NOT_PROBABILITIES}
            for row in reader:
                # a choice that a question lacks is an empty cell
                probabilities = {label: row[name] for name, label in named.items() if row[name] not in ("", None)}
                yield f"{file}:{reader.line_num}", {**row, "probabilities": probabilities}
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found = parse_json(line)
            except ValueError as error:
                raise DataError([f"{file}:{number}: not valid JSON: {error}"]) from error
            if not isinstance(found, dict):
                raise DataError([f"{file}:{number}: {quoted(found)} is not a JSON object"])
            yield f"{file}:{number}", found


def _read_row(row: Mapping[str, Any], labels: Sequence[str] | None) -> tuple[dict[str, Any], int]:
    """What `Averages` takes of a row, and its right column; a ValueError says which field is wrong."""
    given = row.get("probabilities")
    names = [*map(str, given)] if isinstance(given, dict) else []
    if not isinstance(given, dict | list) or len(given) < 2:
        raise ValueError(f"field 'probabilities': {quoted(given)} must be at least 2 numbers, by label or as a list")
    if labels is not None and (len(given) != len(labels) or (names and {*names} != {*labels})):
        raise ValueError(
            f"field 'probabilities': of {', '.join(names) or len(given)}; the run's labels are {', '.join(labels)}"
        )
    probabilities = [
        _number(value, "probabilities") for value in (given.values() if isinstance(given, dict) else given)
    ]
    if min(probabilities) < 0 or not math.isclose(total := math.fsum(probabilities), 1, abs_tol=1e-3):
        raise ValueError(f"field 'probabilities': {quoted(given)} must be at least 0, with a sum of 1")
    log_probabilities = [math.log(p / total) if p else -math.inf for p in probabilities]
    if given := row.get("log_probabilities"):
        log_probabilities = _logs(given, len(probabilities))
    there = [name for name in ("mutual_information", "expected_entropy") if row.get(name) not in (None, "")]
    scores = {name: _number(row[name], name) for name in there}
    target = row.get("target")
    if target in (None, ""):
        raise ValueError("field 'target': missing; it is the right label, or its index")
    known = names or [*(labels or ())]
    index = "question" in row and isinstance(target, int)  # a choice may be called "1" too
    if str(target) in known and not index:
        column = known.index(str(target))
    elif str(target).isdecimal() and int(target) < len(probabilities):
        column = int(target)
    else:
        wrong = f"field 'target': {quoted(target)}"
        raise ValueError(f"{wrong} is none of the {len(probabilities)} labels {', '.join(known)}")
    return {"log_probabilities": log_probabilities, **scores, **_counted(row)}, column


def _read_value(row: Mapping[str, Any], _: Sequence[str] | None) -> tuple[dict[str, Any], float]:
    """What `ValueAverages` takes of a row, and the right value; a ValueError says which field is wrong."""
    found = {name: _number(row.get(name), name) for name in ("value", "std")}
    if found["std"] <= 0:
        raise ValueError(f"field 'std': {quoted(row['std'])} must be above 0")
    if row.get("epistemic_std") not in (None, ""):
        found["epistemic_std"] = _number(row["epistemic_std"], "epistemic_std")
    return found | _counted(row), _number(row.get("target"), "target")


def _read_labels(row: Mapping[str, Any], names: Sequence[str] | None) -> tuple[dict[str, Any], list[int]]:
    """What `LabelAverages` takes of a row, and whether there is each label; a ValueError says which field is wrong."""
    given = row.get("probabilities")
    if not isinstance(given, dict) or not given:
        raise ValueError(f"field 'probabilities': {quoted(given)} must be numbers by label")
    if names is None or {*given} != {*names}:
        raise ValueError(f"field 'probabilities': of {', '.join(given)}; the labels are {', '.join(names or ())}")
    found: dict[str, Any] = {"probabilities": [_number(given[name], "probabilities") for name in names]}
    if not all(0 <= p <= 1 for p in found["probabilities"]):
        raise ValueError(f"field 'probabilities': {quoted(given)} must be in [0, 1]")
    if row.get("mutual_information") not in (None, ""):
        found["mutual_information"] = _number(row["mutual_information"], "mutual_information")
    right = label_list(row.get("target"))
    if not isinstance(right, list) or {*map(str, right)}.difference(names):
        wrong = "missing" if row.get("target") is None else quoted(row["target"])
        raise ValueError(f"field 'target': {wrong}; it must be a list of labels among {', '.join(names)}")
    return found | _counted(row), [int(name in right) for name in names]


def _counted(row: Mapping[str, Any]) -> dict[str, int]:
    return {"num_draws": int(_number(row["num_draws"], "num_draws"))} if row.get("num_draws") not in (None, "") else {}


def _kind(row: Mapping[str, Any]) -> str:
    """The likelihood that a row of any model's predictions is of."""
    if "value" in row and "std" in row:
        return "gaussian"
    return "bernoulli" if "labels" in row or isinstance(row.get("target"), list) else Prediction.kind


def _logs(given: Any, count: int) -> list[float]:
    """Log-probabilities in a row, which say more than the probabilities where these are rounded to 0."""
    try:
        if isinstance(given, list) and len(given) == count:
            return [*map(float, given)]
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"field 'log_probabilities': {quoted(given)} must be a list of {count} numbers")


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"field {name!r}: {quoted(value)} must be a number")
    return number


@dataclass(frozen=True)
class _Form:
    """How the lines of one kind of prediction are read, and what stands for an unknown answer."""

    read: Callable[[Mapping[str, Any], Sequence[str] | None], tuple[dict[str, Any], Any]]
    of: Callable[[Sequence[Mapping[str, Any]], int], Prediction]
    unknown: Any
    dtype: torch.dtype


_FORMS = {
    "categorical": _Form(_read_row, Averages.of, 0, torch.int64),
    "gaussian": _Form(_read_value, ValueAverages.of, 0, torch.float64),
    "bernoulli": _Form(_read_labels, LabelAverages.of, [], torch.int64),
}

"""Predictions in files: kept while they are made, and read again, whichever program made them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import tasks
from ..data import DataError
from ..data.columns import label_list, to_record, typed
from ..decision import Decision
from ..files import json_sha256, parse_json, read_json
from ..messages import quoted
from ..prediction import DISTANCES, MultiLabelPrediction, Prediction, RewardPrediction, TagsPrediction, ValuePrediction
from ..prediction.kinds import OtherPrediction, prediction_of
from ..prediction.prediction import check_finite
from ..tasks import Bernoulli, Tags
from .config import RunError
from .entries import changes
from .folder import RunDescription, records_sha256
from .lines import columns_of, lines_of, repeated
from .processes import append_lines
from .run import PredictionOptions

_NOT_PROBABILITIES = ("target", "id", "text", "text_pair", "question", "label", "labels")
_PREFIX = "probability_"
_OUTSIDE = "outside"  # true in the lines of records out of scope, where a file has both

SCALES = ("temperature", "width")
"""T and τ, which a run has where they were fitted."""


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
        """Draws that the average is over for each input, (n,)."""
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

    @property
    def knows_epistemic(self) -> bool:
        """Whether there is more than one function; of a single draw all values are 0."""
        return bool((self.epistemic != 0).any())


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


class _Kept:
    """What was kept of the draws beside their average: how many they were, and the mutual information, (n,) each."""

    def keeping(self, rows: Sequence[Mapping[str, Any]], num_samples: int) -> Self:
        """The same with that of these lines."""
        epistemic = torch.tensor([row.get("mutual_information", math.nan) for row in rows])
        self.__dict__ |= {"draws": _draws(rows, num_samples), "epistemic": epistemic}
        return self

    num_draws = property(lambda self: self.draws)
    mutual_information = property(lambda self: self.epistemic)


class LabelAverages(_Kept, MultiLabelPrediction):
    """Several labels at once of which the probabilities were kept, and the mutual information; NaN where unknown."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], num_samples: int) -> LabelAverages:
        """The one whose lines these are; each has ``probabilities`` as a list."""
        probabilities = torch.tensor([row["probabilities"] for row in rows], dtype=torch.float64)
        return cls(probabilities.logit()[None], num_samples, Bernoulli()).keeping(rows, num_samples)


class TagAverages(_Kept, TagsPrediction):
    """Tags of which the probabilities were kept, and the mutual information of each record; NaN where unknown."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], num_samples: int) -> TagAverages:
        """The one whose lines these are; each has ``probabilities`` as a list with an object by tag for each token."""
        log_probs = [_logarithms([[*token.values()] for token in row["probabilities"]]) for row in rows]
        logits = pad_sequence([each.flatten() for each in log_probs], batch_first=True, padding_value=-math.inf)
        tags = Tags(tuple(rows[0]["probabilities"][0]))
        return cls(logits[None], num_samples, tags).keeping(rows, num_samples)


def _logarithms(probabilities: Any) -> Tensor:
    """Those of probabilities, finite also where one is 0: -inf is of what isn't there."""
    values = torch.tensor(probabilities, dtype=torch.float64)
    return values.clamp_min(torch.finfo(values.dtype).tiny).log()


def _distances(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | None:
    """The distances from the training data that all rows have, (n,) each; None where they have none."""
    known = [_known(row, *DISTANCES) for row in rows]
    names = [name for name in DISTANCES if all(name in row for row in known)]
    return {name: torch.tensor([row[name] for row in known], dtype=torch.float64) for name in names} or None


def _draws(rows: Iterable[Mapping[str, Any]], num_samples: int) -> Tensor:
    return torch.tensor([row.get("num_draws", max(1, num_samples)) for row in rows])


def state_of(description: RunDescription) -> dict[str, Any]:
    """What a run's predictions depend on, of its folder: the adapter, all files that decide answers, and T and τ."""
    rescaling = description.training.get("rescaling", {})
    scales = {name: rescaling[name] for name in SCALES if name in rescaling}
    files_sha256 = json_sha256(description.files)
    return {"adapter_sha256": description.adapter_sha256, **scales, "files_sha256": files_sha256}


def identity_of(
    description: RunDescription, records: Sequence[dict[str, Any]], options: PredictionOptions
) -> dict[str, Any]:
    """Whose predictions of what these are."""
    return {**state_of(description), "records_sha256": records_sha256(records), **options.how()}


def keep_predictions(
    file: Path,
    task: tasks.Task,
    records: Sequence[dict[str, Any]],
    predict: Callable[[Sequence[dict[str, Any]]], Prediction],
    identity: dict[str, Any],
    decision: Decision | None = None,
    *,
    num_inside: int | None = None,
    progress: bool = False,
) -> None:
    """Write what isn't there yet of the records' lines: those of `describe`, and what `kept_prediction` reads.

    Lines of the records after the first ``num_inside`` are marked as out of scope, for `read_predictions`.

    Raises:
        RunError: the file holds predictions of another ``identity`` or of other records, or another process writes it.
    """

    def right(record: dict[str, Any], outside: bool) -> dict[str, Any]:
        target = answer_of(record, task)
        return ({} if target is None else {"target": target}) | ({_OUTSIDE: True} if outside else {})

    def is_of(line: dict[str, Any], row: tuple[dict[str, Any], bool]) -> bool:
        record, outside = row
        expected = json.loads(json.dumps(repeated(record) | right(record, outside)))
        if {**line, **expected} != line or _is_outside(line) != outside:
            return False
        columns = [*columns_of(task, record)]
        if task.likelihood.name != Prediction.kind:
            draws = torch.tensor(line["logits"])
            return draws.shape[1:] == (task.width(record),) and bool(draws.isfinite().all())
        numbers = line["log_probabilities"]
        same = [*line["probabilities"]] == columns and len(numbers) == len(columns)
        return same and math.isclose(math.fsum(map(math.exp, numbers)), 1, abs_tol=1e-3)

    def described(chunk: Sequence[tuple[dict[str, Any], bool]]) -> Iterator[dict[str, Any]]:
        prediction = predict(side := [record for record, _ in chunk])
        lines = lines_of(task, side, prediction, decision)
        for (record, outside), line, exact in zip(chunk, lines, _exact(prediction), strict=True):
            width = task.width(record)  # a row is as wide as the chunk's longest
            if "logits" in exact:
                exact["logits"] = [row[:width] for row in exact["logits"]]
            else:
                exact["log_probabilities"] = exact["log_probabilities"][:width]
            yield line | right(record, outside) | exact

    rows = [(record, num_inside is not None and number >= num_inside) for number, record in enumerate(records)]
    append_lines(file, rows, described, identity, is_of=is_of, progress=progress)


def answer_of(record: Mapping[str, Any], task: tasks.Task | None = None) -> Any:
    """A record's right answer as lines have it, of messages the last one's content; None where there is none."""
    names = ("answer", "labels", "value", "tags", "label", "chosen") if task is None else (task.answer, "label")
    found: Any = next((record[name] for name in names if record.get(name) is not None), None)
    messages = isinstance(found, list | tuple) and found and isinstance(found[-1], Mapping)
    return found[-1]["content"] if messages else found


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
    rows = [*rows]
    if task.likelihood.name == Prediction.kind:
        return Averages.of(rows, num_samples).with_distances(_distances(rows))
    each = [torch.tensor(row["logits"]).T for row in rows]
    logits = pad_sequence(each, batch_first=True, padding_value=-math.inf).permute(2, 0, 1)
    return prediction_of(check_finite(logits), num_samples, task.likelihood, distances=_distances(rows))


def read_predictions(
    file: Path,
    task: tasks.Task | None = None,
    num_samples: int = 0,
    *,
    targets: Sequence[Any] | None = None,
    labelled: bool = True,
    positions: Sequence[int] | None = None,
    outside: bool = False,
) -> tuple[Prediction, Tensor]:
    """Probabilities or values, and right answers, of any model's predictions.

    A line of a .jsonl file has ``probabilities``, by label or as a list, and ``target``, the right label or its index;
    of several labels at once ``probabilities`` by label and in ``target`` the list of the right ones; of a value
    ``value``, its ``std``, and ``target``; of preferences ``probabilities`` by response, and in ``target`` the chosen
    one. Lines of `bloblora predict` need only the target added. Of tags ``probabilities`` is a list with an object by
    tag for each word, and ``target`` the list of the right tags; what `keep_predictions` wrote has its own form. A .csv
    or .tsv file has the same in columns, with one for each label, called as the label is, or ``probability_LABEL``
    where there are others. Without a task, lines with a ``std`` are of values, those with ``tokens`` and ``tags``,
    or a list of probabilities by tag, are of tags, and those with ``labels`` or a list as target are of several labels,
    and so are all of a file in which a target is a text of several, such as ``a|b``.

    Args:
        file: of the predictions.
        task: of the run that made them, whose labels they must have.
        num_samples: N that they were made with.
        targets: the right answers, where the file has none.
        labelled: whether a line needs a right answer; without, none are read.
        positions: of the lines that are taken; None for all.
        outside: take the lines that `keep_predictions` marked as out of scope, instead of the others.

    Returns:
        The prediction, and the right columns, (n,), or values, (n,), or whether there is each label, (n, L), or the
        indices of tags, (n, T).

    Raises:
        DataError: lists the lines that can't be used.
        RunError: predictions of another kind, or ``targets`` are more or fewer than the lines.
    """
    numbered = [(place, row) for place, row in _rows(file) if _is_outside(row) == outside]
    if targets is not None and len(targets) != len(numbered):
        raise RunError(
            f"{file}: has {len(numbered)} predictions, and there are {len(targets)} labels; give those of it"
        )
    if targets is not None:
        numbered = [(place, row | {"target": right}) for (place, row), right in zip(numbered, targets, strict=True)]
    if positions is not None:
        numbered = [numbered[position] for position in positions]
    if not numbered:
        raise DataError([f"{file}: there are no predictions in it"])
    given = [row for _, row in numbered]
    form = _FORMS[_kind(given) if task is None else task.family.name]
    names = (task and task.labels) or form.names(given)
    rows, right, problems = [], [], []
    for place, row in numbered:
        try:
            _known(row, *DISTANCES)
            rows.append(form.read(row, names))
            if labelled:
                right.append(form.right(row, names))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise DataError(problems)
    prediction = form.of(rows, num_samples).with_distances(_distances([row for _, row in numbered]))
    return prediction, form.stacked(right) if labelled else torch.empty(0)


def count_outside(file: Path) -> int:
    """How many lines of a file of predictions are marked as out of scope; a DataError where it can't be read."""
    return sum(_is_outside(row) for _, row in _rows(file))


def _is_outside(row: Mapping[str, Any]) -> bool:
    return row.get(_OUTSIDE) is True


def predicted_records(file: Path, task: tasks.Task) -> list[dict[str, Any] | None]:
    """The labelled records whose predictions in scope these are; None for a line that doesn't say its whole record.

    That is also the case for preferences, whose margins no line has.

    Raises:
        DataError: the file can't be read.
    """
    return [_record(row, task, file.suffix.lower() == ".jsonl") for _, row in _rows(file) if not _is_outside(row)]


def _record(row: Mapping[str, Any], task: tasks.Task, has_types: bool) -> dict[str, Any] | None:
    asked = {"text": ("text", "text_pair"), "choice": ("question",), "tokens": ("tokens",)}.get(task.kind, ())
    given, target = {name: row[name] for name in asked if name in row}, row.get("target")
    if not asked or asked[0] not in given or target in (None, ""):
        return None
    try:
        if task.kind == "choice":
            return given | {"choices": _choices(row["probabilities"]), "answer": _right_column(row, None)}
        if task.answer == "label" and task.labels is not None:
            return to_record(given | {"label": task.labels[_right_column(row, task.labels)]}, {})
    except (ValueError, TypeError, KeyError):
        return None
    # a value, or a list, that was read of a single label is still one in JSON
    return to_record(given | {"label" if has_types and isinstance(target, str) else task.answer: target}, {})


def _choices(probabilities: Mapping[str, Any]) -> list[str]:
    """The choices whose probabilities these are; a ValueError where a table has numbers in their place."""
    choices = [*probabilities]
    if not isinstance(probabilities, dict) or choices == [*map(str, range(len(choices)))]:
        raise ValueError("choices without their texts")
    numbered = all(choice.startswith(f"{index}: ") for index, choice in enumerate(choices))  # as equal ones are
    return [choice.partition(": ")[2] for choice in choices] if numbered else choices


def check_made_by(file: Path, description: RunDescription, options: PredictionOptions) -> None:
    """Raise a RunError where the file beside predictions says that another state of the run made them, or another N."""
    if not (meta := file.with_name(f"{file.name}.meta.json")).is_file():
        return
    stored, here = read_json(meta, RunError), identity_of(description, [], options)
    # evaluate's file doesn't say the last one, and no records are here to compare
    known = {n: value for n, value in here.items() if n != "records_sha256" and (n in stored or n != "files_sha256")}
    if wrong := changes(stored, known):
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


def _read_row(row: Mapping[str, Any], labels: Sequence[str] | None) -> dict[str, Any]:
    """What `Averages` takes of a row; a ValueError says which field is wrong."""
    given = row.get("probabilities")
    names = [*map(str, given)] if isinstance(given, dict) else []
    if not isinstance(given, dict | list) or len(given) < 2:
        raise ValueError(f"field 'probabilities': {quoted(given)} must be at least 2 numbers, by label or as a list")
    if labels is not None and (len(given) != len(labels) or (names and {*names} != {*labels})):
        raise ValueError(
            f"field 'probabilities': of {', '.join(names) or len(given)}; the run's labels are {', '.join(labels)}"
        )
    probabilities = _distribution(given.values() if isinstance(given, dict) else given, given)
    log_probabilities = [math.log(p) if p else -math.inf for p in probabilities]
    if given := row.get("log_probabilities"):
        log_probabilities = _logs(given, len(probabilities))
    if labels and names:
        log_probabilities = [log_probabilities[names.index(label)] for label in labels]
    return {"log_probabilities": log_probabilities} | _known(row, "mutual_information", "expected_entropy")


def _right_column(row: Mapping[str, Any], labels: Sequence[str] | None) -> int:
    """The index of the right label of such a row."""
    target, given = row.get("target"), row["probabilities"]
    if target in (None, ""):
        raise ValueError("field 'target': missing; it is the right label, or its index")
    known = [*map(str, given)] if isinstance(given, dict) and not labels else [*(labels or ())]
    index = "question" in row and isinstance(target, int)  # a choice may be called "1" too
    if str(target) in known and not index:
        return known.index(str(target))
    same = [place for place, name in enumerate(known) if typed(name) == typed(str(target))]
    if len(same) == 1 and not index:
        return same[0]
    numbers = [] if index else [name for name in known if _is_number(name)]
    if isinstance(target, float) and target.is_integer():  # as pandas writes indices
        target = int(target)
    if str(target).isdecimal() and int(target) < len(given) and not numbers:
        return int(target)
    why = f"; it is no index, because label {quoted(numbers[0])} is a number" if numbers else ""
    raise ValueError(
        f"field 'target': {quoted(target)} is none of the {len(given)} labels{' ' * bool(known)}{', '.join(known)}{why}"
    )


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _read_value(row: Mapping[str, Any], _: Sequence[str] | None) -> dict[str, Any]:
    """What `ValueAverages` takes of a row; a ValueError says which field is wrong."""
    found = {name: _number(row.get(name), name) for name in ("value", "std")}
    if found["std"] <= 0:
        raise ValueError(f"field 'std': {quoted(row['std'])} must be above 0")
    return found | _known(row, "epistemic_std")


def _right_value(row: Mapping[str, Any], _: Sequence[str] | None) -> float:
    return _number(row.get("target"), "target")


def _read_labels(row: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """What `LabelAverages` takes of a row; a ValueError says which field is wrong."""
    given = row.get("probabilities")
    if not isinstance(given, dict) or not given:
        raise ValueError(f"field 'probabilities': {quoted(given)} must be numbers by label")
    if names is None or {*given} != {*names}:
        raise ValueError(f"field 'probabilities': of {', '.join(given)}; the labels are {', '.join(names or ())}")
    found: dict[str, Any] = {"probabilities": [_number(given[name], "probabilities") for name in names]}
    if not all(0 <= p <= 1 for p in found["probabilities"]):
        raise ValueError(f"field 'probabilities': {quoted(given)} must be in [0, 1]")
    return found | _known(row, "mutual_information")


def _right_labels(row: Mapping[str, Any], names: Sequence[str] | None) -> list[int]:
    """Whether such a row has each label."""
    right = label_list(row.get("target"))
    if not isinstance(right, list) or {*map(str, right)}.difference(names or ()):
        wrong = "missing" if row.get("target") is None else quoted(row["target"])
        raise ValueError(f"field 'target': {wrong}; it must be a list of labels among {', '.join(names or ())}")
    return [int(name in right) for name in names or ()]


def _read_tags(row: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """What `TagAverages` takes of a row; a ValueError says which field is wrong."""
    kept = names is not None and "logits" in row  # by `keep_predictions`
    given: Any = _averaged(row["logits"], names or ()) if kept else row.get("probabilities")
    if not isinstance(given, list) or not given or not all(isinstance(token, dict) and token for token in given):
        raise ValueError(
            f"field 'probabilities': {quoted(given)} must be a list with an object by tag for each word, as in a file "
            "of `bloblora evaluate --predictions`, and not of `predict`"
        )
    names = names or [*given[0]]
    if wrong := next((token for token in given if {*token} != {*names}), None):
        raise ValueError(f"field 'probabilities': of {', '.join(wrong)}; the tags are {', '.join(names)}")
    numbers = [_distribution([token[name] for name in names], token) for token in given]
    by_tag = [dict(zip(names, token, strict=True)) for token in numbers]
    return {"probabilities": by_tag} | _known(row, "mutual_information")


def _averaged(logits: Any, names: Sequence[str]) -> list[dict[str, float]]:
    """Probabilities by tag of each word, averaged over draws' logits (S, T·K)."""
    try:
        tokens = Tags(tuple(names)).by_token(torch.tensor(logits)).exp().mean(0).tolist()
        return [dict(zip(names, token, strict=True)) for token in tokens]
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f"of each weight sample a list of numbers, {len(names)} a word"
        raise ValueError(f"field 'logits': {quoted(logits)} must be {shape}") from error


def _right_tags(row: Mapping[str, Any], names: Sequence[str] | None) -> list[int]:
    """The index of the right tag of each word of such a row."""
    target, known = row.get("target"), [*(names or ())]
    words = len(row["logits"][0]) // len(known) if "logits" in row else len(row["probabilities"])
    if not isinstance(target, list) or len(target) != words or not {*map(str, target)} <= {*known}:
        wrong = "missing" if target is None else quoted(target)
        raise ValueError(f"field 'target': {wrong}; it must be a list of {words} tags among {', '.join(known)}")
    return [known.index(str(tag)) for tag in target]


def _tags_in(rows: Sequence[Mapping[str, Any]]) -> Sequence[str] | None:
    given = rows[0].get("probabilities")
    return [*given[0]] if isinstance(given, list) and given and isinstance(given[0], dict) else None


def _labels_in(rows: Sequence[Mapping[str, Any]]) -> Sequence[str] | None:
    given = rows[0].get("probabilities")
    return [*given] if isinstance(given, dict) else None


def _shared_labels(rows: Sequence[Mapping[str, Any]]) -> Sequence[str] | None:
    """Those of all rows, in the first one's order; None of questions, each of which has choices of its own."""
    names = _labels_in(rows)
    for row in rows:
        if names is None or "question" in row or {*(_labels_in([row]) or ())} != {*names}:
            return None
    return names


def _distribution(values: Iterable[Any], shown: Any) -> list[float]:
    """Numbers of at least 0, divided by their sum, which is 1 but for rounding."""
    numbers = [_number(value, "probabilities") for value in values]
    if min(numbers) < 0 or not math.isclose(total := math.fsum(numbers), 1, abs_tol=1e-3):
        raise ValueError(f"field 'probabilities': {quoted(shown)} must be at least 0, with a sum of 1")
    return [number / total for number in numbers]


def _known(row: Mapping[str, Any], *names: str) -> dict[str, float]:
    """Those of these numbers, and the number of draws, that are given."""
    there = (name for name in (*names, "num_draws") if row.get(name) not in (None, ""))
    numbers = {name: _number(row[name], name) for name in there}
    return {name: int(value) if name == "num_draws" else value for name, value in numbers.items()}


def _kind(rows: Sequence[Mapping[str, Any]]) -> str:
    """The likelihood that rows of any model's predictions are of."""
    row, *_ = rows
    if "value" in row and "std" in row:
        return "gaussian"
    if {"tokens", "tags"} <= row.keys() or _tags_in([row]):
        return "tags"
    several = "labels" in row or isinstance(row.get("target"), list) or any(map(_names_several, rows))
    return "bernoulli" if several else Prediction.kind


def _names_several(row: Mapping[str, Any]) -> bool:
    """Whether the target is a text of several labels, as in a table."""
    target, given = row.get("target"), row.get("probabilities")
    if not isinstance(target, str) or not isinstance(given, dict) or target in given:
        return False
    return isinstance(found := label_list(target), list) and len(found) > 1 and {*map(str, found)} <= {*given}


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
    """How the lines of one kind of prediction are read.

    Attributes:
        read: what `of` takes of a row, whose columns have these names.
        right: its right answer; of rows that could be read.
        of: the prediction whose lines these are.
        stacked: right answers as metrics take them.
        names: of the columns, where the rows say them.
    """

    read: Callable[[Mapping[str, Any], Sequence[str] | None], dict[str, Any]]
    right: Callable[[Mapping[str, Any], Sequence[str] | None], Any]
    of: Callable[[Sequence[Mapping[str, Any]], int], Prediction]
    stacked: Callable[[Sequence[Any]], Tensor] = torch.tensor
    names: Callable[[Sequence[Mapping[str, Any]]], Sequence[str] | None] = lambda _: None


_CLASSES = _Form(_read_row, _right_column, Averages.of, names=_shared_labels)
_FORMS = {
    "categorical": _CLASSES,
    "bradley_terry": _CLASSES,
    "gaussian": _Form(_read_value, _right_value, ValueAverages.of, partial(torch.tensor, dtype=torch.float64)),
    "bernoulli": _Form(_read_labels, _right_labels, LabelAverages.of, names=_labels_in),
    "tags": _Form(_read_tags, _right_tags, TagAverages.of, Tags(()).stacked, _tags_in),
}

"""One run of a study: train, evaluate, and keep what was found.

A run leaves two files in ``OUTPUT/runs``: JSON with its metrics, and safetensors with its scores per example, from
which intervals and curves are computed. `bloblora report` collects the metrics of all runs in ``OUTPUT/metrics.json``,
which is enough for the tables.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import evaluation, models, runs
from ..adapter import library_versions
from ..data import Known, ReadingOptions, read_records
from ..files import read_json, write_json, write_tensors, write_text
from ..messages import quoted
from ..prediction import Prediction
from ..prediction.kinds import prediction_of
from ..runs.checks import check_beside, check_task, task_name
from ..runs.folder import records_sha256
from ..runs.selection import groups_by, select_for
from ..tasks import TASKS, Task
from .study import EvalSet, Job

RUNS = "runs"
STUDY_FILE = "study.json"
STUDY_METRICS_FILE = "metrics.json"

Read = dict[str, list[dict[str, Any]]]
"""What was read of data files, so that the many jobs of a study read each once."""


@dataclass
class Result:
    """One run's results.

    Attributes:
        name: of the job, and of the files.
        dataset: name of the data set.
        label: the method's name in tables.
        config: the training's options, as given; data files without their folders.
        options: the method's options, with their defaults.
        training: ``seconds``, ``peak_memory_bytes``, ``num_examples``, ``final`` (the last log), ``curve`` (step and
            training NLL, mean since the log before), ``validation`` (of the best checkpoint, and a curve).
        machine: see `machine`, and ``dtype``, the base model's.
        sets: ``data``, ``limit``, ``labelled``, ``unused`` and the records' ``sha256`` of each set; earlier versions
            left some out.
        metrics: by set, then N: see `bloblora.evaluation.summary`; of each set but ``test`` also how well uncertainty
            tells it from ``test`` (`bloblora.evaluation.ood_metrics`), which is all there is without labels.
        seconds: of predicting each set with the most weight samples.
        sha256: of the records of ``training``, and of ``validation`` where they aren't a share of those.
        scores: per example: ``<set>/<N>/<score>``, (n,) float32; empty where only ``metrics.json`` is there.
    """

    name: str
    dataset: str
    label: str
    config: dict[str, Any]
    options: dict[str, Any]
    training: dict[str, Any]
    machine: dict[str, Any]
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.config.get("seed", runs.RunConfig.seed)

    def other_records(self, other: Result, key: str) -> list[str]:
        """In what both say that they were measured on different records of a set; nothing where on the same."""
        here, there = (
            result.sets.get(key, {}) | {"number": {m.get("num_examples") for m in result.metrics.get(key, {}).values()}}
            for result in (self, other)
        )
        return [name for name in here if name in there and here[name] != there[name]]

    def lacks(self, job: Job, *sets: str) -> bool:
        """Whether scores are missing of some of the job's sets, by default of any, or of a number of weight samples."""
        there = [self.scores_of(key, n) for key in sets or job.sets for n in job.samples]
        return any(not scores or (job.distances and "mahalanobis" not in scores) for scores in there)

    def add(self, key: str, prediction: Prediction, targets: Tensor | None) -> None:
        """Add the scores and metrics of one set under one N; ``test`` must be there before the sets told from it."""
        n = prediction.num_samples
        scores = prediction.scores
        found = {} if targets is None else evaluation.summary(prediction, targets)
        if key != "test" and (test := self.scores_of("test", n)):
            # what is epistemic of a single weight sample is 0 for every input
            epistemic = ("mutual_information", "epistemic_std") if not prediction.knows_epistemic else ()
            names = [name for name in scores if name in test and name not in epistemic]
            found |= evaluation.ood_metrics(*({name: side[name].float() for name in names} for side in (test, scores)))
        if targets is not None:
            scores |= evaluation.example_scores(prediction, targets)
        self.metrics.setdefault(key, {})[str(n)] = found
        self.scores |= {f"{key}/{n}/{name}": values.float() for name, values in scores.items()}

    def scores_of(self, key: str, num_samples: int) -> dict[str, Tensor]:
        """The scores of one set under one N, by name; empty where there are none."""
        prefix = f"{key}/{num_samples}/"
        return {name.removeprefix(prefix): v for name, v in self.scores.items() if name.startswith(prefix)}


def write_result(result: Result, folder: Path) -> None:
    """Write a run's two files; the JSON, without which a run is not done, last."""
    file = folder / RUNS / f"{result.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file.with_suffix(".safetensors"), dict(sorted(result.scores.items())))
    write_json(file, _without_scores(result))


def read_result(folder: Path, name: str) -> Result | None:
    """A run's result, from its own files or from ``metrics.json``; None where there is none.

    Raises:
        RunError: a file is damaged, or has a key that this version does not know.
    """
    file = folder / RUNS / f"{name}.json"
    if not file.is_file():
        return _collected(folder).get(name)
    result = _result(read_json(file, runs.RunError), file)
    try:
        result.scores = load_file(file.with_suffix(".safetensors"))
    except (OSError, SafetensorError) as error:
        raise runs.RunError(f"{file}: its .safetensors can't be read: {error}; delete both to run again") from error
    return result


def read_results(folder: Path) -> list[Result]:
    """All results of a study, by name, with floats to five digits as ``metrics.json`` has them.

    A run's own files go before its entry there.
    """
    names = {*_collected(folder), *(file.stem for file in (folder / RUNS).glob("*--*.json"))}
    results = [result for name in sorted(names) if (result := read_result(folder, name)) is not None]
    return [replace(result, **rounded(_without_scores(result))) for result in results]


def write_study_metrics(results: Iterable[Result], study: Mapping[str, Any], folder: Path) -> None:
    """Write what all runs found, but for the scores, into one small file: a line a run."""
    rows = [_without_scores(result) for result in results]
    shared = {
        name: dict(pair for pair in rows[0][name].items() if all(pair in row[name].items() for row in rows))
        for name in ("config", "options", "machine", "sets", "sha256")
    }
    for row in rows:
        for name, known in shared.items():
            row[name] = {key: value for key, value in row[name].items() if key not in known}
    head = "".join(f"{json.dumps(k)}: {_compact(v)},\n" for k, v in (("study", study), ("shared", shared)))
    lines = ",\n".join(_compact({key: value for key, value in row.items() if value != {}}) for row in rows)
    write_text(folder / STUDY_METRICS_FILE, f'{{\n{head}"runs": [\n{lines}\n]\n}}\n')


def read_study_metrics(folder: Path) -> dict[str, Any]:
    """``metrics.json`` as it stands: ``study``, what all runs ``shared``, ``runs``; empty where there is none."""
    file = folder / STUDY_METRICS_FILE
    return read_json(file, runs.RunError) if file.is_file() else {}


def _collected(folder: Path) -> dict[str, Result]:
    content = read_study_metrics(folder)
    shared, found = content.get("shared", {}), {}
    for row in content.get("runs", ()):
        whole = row | {name: {**known, **row.get(name, {})} for name, known in shared.items()}
        found[row["name"]] = _result(whole, folder / STUDY_METRICS_FILE)
    return found


def _result(content: dict[str, Any], file: Path) -> Result:
    known = {option.name: option for option in fields(Result)}
    if unknown := content.keys() - known:
        written = content.get("machine", {}).get("bloblora", "another version")
        raise runs.RunError(
            f"{file}: unknown key {quoted(min(unknown))}: it was written by bloblora {written}, this is "
            f"{library_versions()['bloblora']}"
        )
    required = [name for name, option in known.items() if option.default_factory is MISSING]
    if missing := [name for name in required if name not in content]:
        raise runs.RunError(f"{file}: key {quoted(missing[0])} is missing; delete the file to run again")
    return Result(**content)


def _without_scores(result: Result) -> dict[str, Any]:
    return {key: value for key, value in vars(result).items() if key != "scores"}


def rounded(value: Mapping[str, Any]) -> Any:
    """The same as JSON has it, with floats to five digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def is_done(job: Job, results: Path, read: Read | None = None) -> bool:
    """Whether the job has all its results; data files that were ``read`` before are not read again.

    Raises:
        RunError: its result is of another configuration, or of other records; nothing of it is overwritten.
        DataError: a file can't be used.
    """
    result = read_result(results, job.name)
    if result is None:
        return False
    changed, different = runs.different(result.config, _described(job)), []
    read = {} if read is None else read
    now = {
        key: {**_set(chosen), "sha256": records_sha256(_records(job, key, read))} for key, chosen in job.sets.items()
    }
    pairs = [(f"{key}: ", result.sets.get(key, {}), chosen) for key, chosen in now.items()]
    for place, there, here in [("sha256 of ", result.sha256, _sha256(job, read)), *pairs]:
        different += [
            f"{place}{name}: {quoted(there[name])} there, {quoted(value)} now"
            for name, value in here.items()
            if there.get(name, value) != value
        ]
    if changed or different:
        raise runs.RunError(
            f"{results / job.name} is the result of another configuration ({'; '.join(changed + different)}), written "
            f"by bloblora {result.machine.get('bloblora')}; rename the {'data set' if different else 'method'}, or "
            "choose another folder"
        )
    return not result.lacks(job)


def check_data(job: Job, *others: Job, read: Read | None = None) -> type[Task]:
    """Read what the job will read, so that a wrong file stops a study before hours of work; the task that it has.

    The others are of the same data and other methods; ``read`` as for `is_done`.

    Raises:
        DataError: a file can't be used.
        RunError: its records are prompts, whose answers can't be scored as others are, or can't be the method's; a set
            is of another kind than the training records, or has labels that those lack.
        ModelError: the base model is a folder or a file that isn't there.
    """
    read = {} if read is None else read
    records = _training(job.config, read)
    task = TASKS[task_name(job.config, records)]
    if task.kind == "generation":
        raise runs.RunError(
            f"{job.config.data}: a study compares labels, choices and values; task {task.name!r} has none"
        )
    for one in (job, *others):
        check_task(one.config, records)
    if (validation := job.config.validation_data) is not None:
        _beside(str(validation), job.config, read)
    for key, chosen in job.sets.items():
        place, found = f"datasets: {job.dataset}: {key}: {quoted(chosen.data)}", _records(job, key, read)
        if not found:
            raise runs.RunError(f"{place}: no record is left to evaluate on")
        check_beside(place, job.config, select_for(job.config, records), found, labelled=chosen.labelled)
    models.check_folder(job.config.model)
    return task


def run(job: Job, results: Path, *, progress: bool = True, keep: bool = True) -> Result:
    """Train unless it was, evaluate on what is missing, and write the result.

    Args:
        job: what to do.
        results: folder of the results.
        progress: show bars.
        keep: leave the trained model.
    """
    trained = runs.train(job.config, progress=progress)
    result = read_result(results, job.name)
    if result is None or not result.scores:
        config, method = _described(job), job.config.build_method().described()
        where = machine() | {"dtype": trained.config.dtype}
        found = runs.open_run(job.config.output)
        digests = {"training": found.records_sha256, "validation": found.validation_sha256}
        separate = job.config.validation_data is not None
        sha256 = {name: digest for name, digest in digests.items() if digest and (separate or name == "training")}
        result = Result(job.name, job.dataset, job.label, config, method, trained.training, where, sha256=sha256)
    read: Read = {}
    most = max(job.samples)
    if job.distances and trained.distance is None:
        there = runs.open_run(job.config.output)
        runs.fit_distance(trained, there, runs.training_records(there), batch_size=job.batch_size)
    for key, chosen in job.sets.items():
        if not result.lacks(job, key):
            continue
        records = _records(job, key, read)
        start = time.perf_counter()
        predict = partial(trained.predict, records, seed=job.config.seed, batch_size=job.batch_size)
        draws = predict(num_samples=most, progress=progress)
        result.sets[key] = {**_set(chosen), "sha256": records_sha256(records)}
        result.seconds[key] = time.perf_counter() - start
        logits, likelihood = draws.draw_logits(), trained.task.likelihood
        predictions = [draws]
        for n in job.samples:
            if n == 0 < most or (n < most and draws.head_shares is not None):  # a Gaussian head's are means over draws
                predictions.append(predict(num_samples=n))
            elif n < most:
                predictions.append(prediction_of(logits[:n], n, likelihood, distances=draws.distances))
        targets = runs.targets_of(trained.task, records) if chosen.labelled else None
        for prediction in predictions:
            result.add(key, prediction, targets)
        write_result(result, results)
    if not keep:
        shutil.rmtree(job.config.output, ignore_errors=True)
    return result


def machine() -> dict[str, Any]:
    """What times depend on: ``cpu`` (its name), ``cores``, ``threads``, ``cuda`` (its name), versions of libraries."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **library_versions(),
    }


def _records(job: Job, key: str, read: Read) -> list[dict[str, Any]]:
    """The records of one of the job's sets."""
    chosen, config = job.sets[key], job.config
    records = _beside(chosen.data, config, read, require_labels=chosen.labelled)
    if chosen.unused:
        records = runs.unused(config, records)
    return runs.select(records, chosen.limit, by=groups_by(config, _training(config, read)))


def _sha256(job: Job, read: Read) -> dict[str, str]:
    """`Result.sha256` of what the job would read now."""
    found = {"training": records_sha256(select_for(job.config, _training(job.config, read)))}
    if (validation := job.config.validation_data) is not None:
        found["validation"] = records_sha256(_beside(str(validation), job.config, read))
    return found


def _training(config: runs.RunConfig, read: Read) -> list[dict[str, Any]]:
    return _read(read, config.source("data"), config.reading_options(), config.known())


def _beside(source: str, config: runs.RunConfig, read: Read, *, require_labels: bool = True) -> list[dict[str, Any]]:
    """Records beside the training records, whose columns are used where they are there."""
    return _read(read, source, *config.beside(config.reading_options().columns()), require_labels=require_labels)


def _read(
    read: Read, source: str, options: ReadingOptions, known: Known, *, require_labels: bool = True
) -> list[dict[str, Any]]:
    """`read_records`, once for each source and way of reading it."""
    key = repr((source, options, known, require_labels))
    if key not in read:
        read[key] = read_records(source, options, known=known, require_labels=require_labels)
    return read[key]


def _described(job: Job) -> dict[str, Any]:
    """The configuration without what a machine decides: where data and caches lie and output goes."""
    given = {name: value for name, value in job.config.given().items() if name not in ("output", "trunk_cache")}
    validation = job.config.validation_data
    named = {"validation": Path(validation).name} if isinstance(validation, str) else {}
    return given | {"data": Path(given["data"]).name} | named


def _set(chosen: EvalSet) -> dict[str, Any]:
    return asdict(chosen) | {"data": Path(chosen.data).name}

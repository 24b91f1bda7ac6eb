"""Search the options of a method on validation data, for a stated aim.

The balance of accuracy and calibration is a choice: ``nll`` weighs both by a proper score, ``ece`` asks for the best
calibration among what is nearly as accurate as plain LoRA. Test data are never looked at.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import evaluation
from ..messages import quoted
from ..prediction.kinds import CLASSES
from ..runs import RunError, alone
from ..runs.config import SHORT, options_of
from ..tasks.likelihood import CATEGORICAL
from ..training import DivergedError
from . import job as jobs
from .study import Job, Study, located

Aim = Literal["nll", "ece"]

_SET, _FIRST = "validation", "first"
_ROUNDING = 1e-9  # 0.8 - 0.1 is a little more than 0.7


@dataclass(frozen=True)
class Trial:
    """One setting, and what it gave on validation data."""

    number: int
    options: Mapping[str, float]
    metrics: Mapping[str, float]
    feasible: bool


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials to which no other is preferable in accuracy and ECE both; none where answers aren't classes."""
    points = {str(t.number): (t.metrics["accuracy"], t.metrics["ece"]) for t in trials if "ece" in t.metrics}
    front = evaluation.pareto_front(points)
    return [trial for trial in trials if str(trial.number) in front]


def tune(
    study: Study,
    dataset: str,
    output: Path,
    *,
    method: str = "blob",
    aim: Aim = "nll",
    within: float = 0.01,
    trials: int = 20,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
    data: Path = Path("."),
    reported: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:
    """Try settings; trials that are in ``output`` count, so a stopped search goes on. One that diverges counts too.

    One that failed doesn't. One that was stopped, by Ctrl-C or a kill, goes on from its last checkpoint.

    Args:
        study: its method with the label ``method``, data sets, options, budget and largest N are used; it has one
            model and at most one budget, and a data set needs a validation set.
        dataset: which.
        output: folder of the trials' results, models and the search's journal.
        method: label of the method that is searched.
        aim: ``nll``, the lowest NLL, or ``ece``, the lowest ECE with an accuracy ``within`` that of the baseline.
        within: see ``aim``; 0.01 is one point.
        trials: how many in all.
        ranges: lowest and highest value of each option to search, above 0, whole numbers where it is one; default those
            that the method declares, and the learning rate.
        seed: of training and of the search.
        data: folder that relative paths of data files start from.
        reported: told of each trial.

    Returns:
        The trials that ended, the best one by the aim first; where none is feasible, the most accurate one.

    Raises:
        RunError: no validation set, several models or budgets, an unknown label, data set or option, optuna isn't
            installed, another search is at work in ``output``, or every trial diverged.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
    except ImportError as error:
        raise RunError("a search needs optuna: pip install 'bloblora[study]'") from error
    template = _job(study, dataset, method, seed, output, data)
    baseline = _job(study, dataset, study.baseline, seed, output, data)
    task = jobs.check_data(template)
    ranges = _ranges(template, ranges, task.head is not None and task.family.name == CATEGORICAL.name)
    if task.family.name not in CLASSES and aim == "ece":
        raise RunError(
            f"aim 'ece' is for answers that are one label or choice; those of task {task.name!r} aren't: take 'nll'"
        )
    name = f"{dataset} {method} {aim} {within if aim == 'ece' else ''} {sorted(ranges.items())}"
    prefix = f"{hashlib.sha256(name.encode()).hexdigest()[:8]}--trial"  # other searches may be in the same folder
    with alone(output, inside=True):
        least = _metrics(baseline, output)["accuracy"] - within if aim == "ece" else -math.inf

        def objective(trial: optuna.Trial) -> float:
            options = {name: _suggested(trial, name, *ends) for name, ends in ranges.items()}
            try:
                found = _metrics(_with(template, f"{prefix}{_first(trial)}", options), output)
            except DivergedError as error:
                warnings.warn(f"trial {trial.number + 1}: {error}", stacklevel=2)
                raise optuna.TrialPruned from error
            except KeyboardInterrupt:
                go_on(trial)
                raise
            trial.set_user_attr("metrics", found)
            trial.set_constraint("accuracy", max(least - found.get("accuracy", 0.0) - _ROUNDING, -1.0))
            return found[aim]

        def go_on(trial: Any) -> None:
            """Make what was stopped the first when the search goes on."""
            search.enqueue_trial(trial.params, {_FIRST: _first(trial)})

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a trial that fails ends the search with its own error
        search = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(output / "search.log"))),
            study_name=name,
            load_if_exists=True,
        )
        # A sampler that starts anew must not repeat the draws of the one before it.
        search.sampler = optuna.samplers.TPESampler(seed=seed + len(search.trials))
        for trial in search.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a process that was killed
            go_on(trial)
            search.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        for trial in search.trials:
            name = f"{prefix}{_first(trial)}"
            if trial.value is not None and not jobs.is_done(_with(template, name, trial.params), output):
                raise RunError(f"{output}: its trials are of another seed or other samples; choose another folder")
        ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        while len(search.get_trials(deepcopy=False, states=ended)) < trials:
            search.optimize(objective, n_trials=1)
            if search.trials[-1].value is not None:
                reported(_trials(search)[-1])
    if not (found := _trials(search)):
        raise RunError(f"all of {trials} trials diverged; search lower learning rates")
    return sorted(found, key=lambda t: (False, t.metrics[aim]) if t.feasible else (True, -t.metrics["accuracy"]))


def _first(trial: Any) -> int:
    """Number of the trial that it goes on with, after which the run is called; its own where it is new."""
    number: int = trial.user_attrs.get(_FIRST, trial.number)
    return number


def _trials(search: Any) -> list[Trial]:
    return [
        Trial(t.number, t.params, t.user_attrs["metrics"], t.constraints["accuracy"] <= 0)
        for t in search.trials
        if t.value is not None
    ]


def _job(study: Study, dataset: str, label: str, seed: int, output: Path, data: Path) -> Job:
    if dataset not in study.datasets:
        raise RunError(f"data set {quoted(dataset)} is not one of the study's: {', '.join(study.datasets)}")
    if label not in study.methods:
        raise RunError(f"method {quoted(label)} is not one of the study's: {', '.join(study.methods)}")
    if (validation := study.datasets[dataset].validation) is None:
        raise RunError(f"datasets: {dataset}: field 'validation' is missing; a search never looks at test data")
    for name, several in (("models", study.models), ("budgets", study.budgets)):
        if len(several) > 1:
            raise RunError(f"{name}: {', '.join(map(str, several))}; a search has one, so leave the others out")
    only, steps = replace(study, samples=(max(study.samples),)), next(iter(study.budgets), None)
    job = only.job(dataset, study.models[0], label, seed, output / "runs", data, steps)
    return replace(job, sets={_SET: located(validation, data)})


def _ranges(
    template: Job, ranges: Mapping[str, tuple[float, float]] | None, labels: bool
) -> dict[str, tuple[float, float]]:
    config = template.config
    known = config.search_space(labels)
    sections = options_of(config.method["name"], config.task["name"]).values()
    kinds = {name: re.findall(r"\w+", str(option.type)) for options in sections for name, option in options.items()}
    found = {}
    for name, (low, high) in (known if ranges is None else ranges).items():
        if not 0 < low < high:
            raise RunError(f"ranges: {name}: {low}, {high}; the first must be above 0 and below the second")
        kind = kinds.get(SHORT.get(name, name), ["float"])  # what isn't an option is an error below
        if not {"int", "float"} & {*kind}:
            raise RunError(f"ranges: {name}: {low}, {high}; it isn't a number; searched by default: {', '.join(known)}")
        if "float" not in kind and (low % 1 or high % 1):
            raise RunError(f"ranges: {name}: {low}, {high}; both must be whole numbers")
        number = float if "float" in kind else int
        found[name] = number(low), number(high)
        for end in found[name]:
            try:
                config.with_options(**{name: end})
            except RunError as error:
                raise RunError(f"ranges: {error}; searched by default: {', '.join(known)}") from error
    return found


def _suggested(trial: Any, name: str, low: float, high: float) -> float:
    suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return suggest(name, low, high, log=True)


def _with(template: Job, name: str, options: Mapping[str, Any]) -> Job:
    name = f"{template.name}--{name}"
    folder = Path(template.config.output).with_name(name)
    return replace(template, name=name, config=template.config.with_options(output=str(folder), **options))


def _metrics(job: Job, output: Path) -> dict[str, float]:
    """Metrics on validation data with the study's largest N; from the file where the run is done."""
    if not jobs.is_done(job, output):
        jobs.run(job, output, progress=False, keep=False)
    result = jobs.read_result(output, job.name)
    assert result is not None
    return result.metrics[_SET][str(max(job.samples))]

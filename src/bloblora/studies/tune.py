"""Search the options of a method on validation data, for a stated aim.

The balance of accuracy and calibration is a choice: ``nll`` weighs both by a proper score, ``ece`` asks for the best
calibration among what is nearly as accurate as plain LoRA. Test data are never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..runs import RunError
from . import job as jobs
from .study import Job, Study, located

Aim = Literal["nll", "ece"]

RANGES: dict[str, tuple[float, float]] = {
    "prior_std": (0.05, 1.0),
    "init_std": (0.01, 0.2),
    "kl_scale": (0.05, 20.0),
    "kl_learning_rate": (0.01, 1.0),
    "prior_precision": (1.0, 1e4),
    "learning_rate": (2e-4, 5e-3),
}
"""What is searched by default, each on a logarithmic scale around the method's default."""

_SET = "validation"


@dataclass(frozen=True)
class Trial:
    """One setting, and what it gave on validation data."""

    number: int
    options: Mapping[str, float]
    metrics: Mapping[str, float]
    feasible: bool


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials to which no other is preferable in accuracy and ECE both, the most accurate first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (-trial.metrics["accuracy"], trial.metrics["ece"])):
        if not front or trial.metrics["ece"] < front[-1].metrics["ece"]:
            front.append(trial)
    return front


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
    """Try settings; trials that are in ``output`` count, so a stopped search goes on.

    Args:
        study: its method with the label ``method``, data sets, options and largest N are used; a data set needs a
            validation set.
        dataset: which.
        output: folder of the trials' results, models and the search's journal.
        method: label of the method that is searched.
        aim: ``nll``, the lowest NLL, or ``ece``, the lowest ECE with an accuracy ``within`` that of the baseline.
        within: see ``aim``; 0.01 is one point.
        trials: how many in all.
        ranges: lowest and highest value of each option to search; default those of `RANGES` that the method has.
        seed: of training and of the search.
        data: folder that relative paths of data files start from.
        reported: told of each trial.

    Returns:
        All trials, the best one by the aim first.

    Raises:
        RunError: no validation set, an unknown label, data set or option, or optuna isn't installed.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
    except ImportError as error:
        raise RunError("a search needs optuna: pip install 'bloblora[study]'") from error
    template = _job(study, dataset, method, seed, output, data)
    baseline = _job(study, dataset, study.baseline, seed, output, data)
    ranges = _ranges(template, ranges)
    output.mkdir(parents=True, exist_ok=True)
    least = -math.inf
    if aim == "ece":
        least = _metrics(baseline, output)["accuracy"] - within

    def objective(trial: optuna.Trial) -> float:
        options = {name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in ranges.items()}
        found = _metrics(_with(template, f"trial{trial.number}", options), output)
        trial.set_user_attr("metrics", found)
        trial.set_constraint("accuracy", max(least - found["accuracy"], -1.0))
        return found[aim]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(output / "search.log"))),
        study_name=f"{dataset} {method} {aim} {within if aim == 'ece' else ''} {sorted(ranges.items())}",
        load_if_exists=True,
    )
    # A sampler that starts anew must not repeat the draws of the one before it.
    search.sampler = optuna.samplers.TPESampler(seed=seed + len(search.trials))
    while len(found := _trials(search)) < trials:
        search.optimize(objective, n_trials=1)
        reported(_trials(search)[-1])
    return sorted(found, key=lambda trial: (not trial.feasible, trial.metrics[aim]))


def _trials(search: Any) -> list[Trial]:
    return [
        Trial(t.number, t.params, t.user_attrs["metrics"], t.constraints["accuracy"] <= 0)
        for t in search.trials
        if t.state.is_finished() and t.value is not None
    ]


def _job(study: Study, dataset: str, label: str, seed: int, output: Path, data: Path) -> Job:
    if dataset not in study.datasets:
        raise RunError(f"data set {dataset!r} is not one of the study's: {', '.join(study.datasets)}")
    if label not in study.methods:
        raise RunError(f"method {label!r} is not one of the study's: {', '.join(study.methods)}")
    if (validation := study.datasets[dataset].validation) is None:
        raise RunError(f"datasets: {dataset}: field 'validation' is missing; a search never looks at test data")
    only = replace(study, models=study.models[:1], samples=(max(study.samples),))
    job = only.job(dataset, study.models[0], label, seed, output / "runs", data)
    return replace(job, sets={_SET: located(validation, data)})


def _ranges(template: Job, ranges: Mapping[str, tuple[float, float]] | None) -> dict[str, tuple[float, float]]:
    known = {*template.config.build_method().options(), "learning_rate"}
    if ranges is None:
        return {name: bounds for name, bounds in RANGES.items() if name in known}
    for name, (low, high) in ranges.items():
        if name not in known or not hasattr(template.config, name):
            raise RunError(f"ranges: method {template.config.method!r} has no option {name!r}; it has {sorted(known)}")
        if not 0 < low < high:
            raise RunError(f"ranges: {name}: {low}, {high}; the first must be above 0 and below the second")
    return dict(ranges)


def _with(template: Job, name: str, options: Mapping[str, Any]) -> Job:
    name = f"{template.name}--{name}"
    folder = Path(template.config.output).with_name(name)
    return replace(template, name=name, config=replace(template.config, output=str(folder), **options))


def _metrics(job: Job, output: Path) -> dict[str, float]:
    """Metrics on validation data with the study's largest N; from the file where the run is done."""
    if not jobs.is_done(job, output):
        jobs.run(job, output, progress=False, keep=False)
    result = jobs.read_result(output, job.name)
    assert result is not None
    return result.metrics[_SET][str(max(job.samples))]

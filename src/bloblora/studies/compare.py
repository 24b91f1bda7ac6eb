"""Run a study: what is done is skipped, what was stopped goes on, what fails doesn't stop the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import job as jobs
from .engine import Outcome, run_jobs
from .study import Job, Study


def compare(
    study: Study,
    output: Path,
    *,
    runs: Path,
    data: Path = Path("."),
    workers: int = 1,
    engine: str = "local",
    slurm: Mapping[str, Any] | None = None,
    planned: Callable[[Sequence[Job], Sequence[Job]], None] = lambda _, __: None,
    started: Callable[[Job], None] = lambda _: None,
    ended: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Run what a study lacks.

    Args:
        study: what to compare.
        output: folder of the results.
        runs: folder of the trained models and logs.
        data: folder that relative paths of data files start from.
        workers: jobs at a time.
        engine: ``local`` or ``slurm``.
        slurm: parameters of Slurm as submitit names them.
        planned: told of all jobs and of those that are left.
        started: told of a job that starts.
        ended: told how one ended.

    Returns:
        How the jobs that were run ended.

    Raises:
        RunError, DataError: an option or a data file is wrong; raised before anything is run.
    """
    everything = study.jobs(runs, data)
    pending = [job for job in everything if not jobs.is_done(job, output)]
    for job in {(job.dataset, job.config.data): job for job in pending}.values():
        jobs.check_data(job)
    planned(everything, pending)
    outcomes = []
    for outcome in run_jobs(
        pending,
        output,
        logs=runs / "logs",
        workers=workers,
        engine=engine,
        slurm=slurm,
        keep=study.keep_runs,
        started=started,
    ):
        ended(outcome)
        outcomes.append(outcome)
    return outcomes

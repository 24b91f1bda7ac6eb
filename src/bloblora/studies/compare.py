"""Run a study: what is done is skipped, what was stopped goes on, what fails doesn't stop the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import write_json
from ..runs import RunError
from . import job as jobs
from .engine import Outcome, run_jobs
from .result import FORMAT_VERSION, STUDY_FILE
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
    """Run what a study lacks, and write what was compared into ``study.json`` beside the results.

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
        RunError, DataError: an option or a data file is wrong, or another process is at work in ``runs``; raised before
            anything is run.
    """
    everything, pending = plan(study, output, runs, data)
    outcomes = []
    with alone(runs):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / STUDY_FILE, {"format_version": FORMAT_VERSION, **asdict(study)})
        planned(everything, pending)
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


def plan(study: Study, output: Path, runs: Path, data: Path = Path(".")) -> tuple[list[Job], list[Job]]:
    """All jobs of a study, and those that are left; what they will read is checked. Arguments and errors: `compare`."""
    everything = study.jobs(runs, data)
    pending = [job for job in everything if not jobs.is_done(job, output)]
    for job in {(job.dataset, job.config.data): job for job in pending}.values():
        jobs.check_data(job)
    return everything, pending


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raise a RunError while another process is inside with the same folder: each would write into the other's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise RunError(f"{folder}: another process is at work in it; wait for it, or choose another folder") from error

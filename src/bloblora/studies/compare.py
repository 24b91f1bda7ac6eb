"""Run a study: what is done is skipped, what was stopped goes on, and a failure does not stop the rest.

Jobs run some at a time through submitit, on this machine or on the nodes of a Slurm cluster. submitit and not Ray: jobs
are whole trainings that share nothing, so no cluster has to be set up or kept alive; Slurm is what most research
clusters have; and its local executor runs the same jobs in the same way here, where they end with this process.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..runs import RunError, alone
from . import job as jobs
from .study import Job, Study

_LONG = 60 * 24 * 30  # minutes; submitit's own limit of local jobs is 2
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """How a job ended: in ``seconds``, and with ``error`` where it failed."""

    job: Job
    seconds: float
    error: str | None = None


def compare(
    study: Study,
    output: Path,
    *,
    runs: Path,
    data: Path = Path("."),
    file: str | None = None,
    workers: int = 1,
    engine: str = "local",
    slurm: Mapping[str, Any] | None = None,
    planned: Callable[[Sequence[Job], Sequence[Job]], None] = lambda _, __: None,
    started: Callable[[Job], None] = lambda _: None,
    ended: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Run what a study lacks, each job in a process of its own.

    Args:
        study: what to compare.
        output: folder of the results; those of each run are in ``runs`` below it, with ``study.json``, which
            has the errors of those that failed.
        runs: folder of the trained models and logs.
        data: folder that relative paths of data files start from.
        file: the study's file, which the report names.
        workers: jobs at a time.
        engine: ``local`` or ``slurm``.
        slurm: parameters of Slurm as submitit names them, such as ``slurm_partition``, ``gpus_per_node``.
        planned: told of all jobs and of those that are left.
        started: told of a job that starts.
        ended: told how one ended.

    Returns:
        How the jobs that were run ended.

    Raises:
        RunError, DataError: submitit is not installed, an option or a data file is wrong, or another process is at work
            in ``runs``; raised before anything is run.
    """
    everything, pending = plan(study, output, runs, data)
    try:
        import submitit
    except ImportError as error:
        raise RunError("a study needs submitit: pip install 'bloblora[study]'") from error
    threads = max(1, (os.cpu_count() or 1) // workers) if engine == "local" else None

    def submit(job: Job, worker: int) -> Any:
        executor = submitit.AutoExecutor(runs / "logs" / job.name, cluster=engine)
        executor.update_parameters(**_parameters(engine, slurm or {}, worker))
        started(job)
        with as_parent() if engine == "local" else nullcontext():
            return executor.submit(_run, job, output.absolute(), study.keep_runs, threads)

    outcomes = []
    with ExitStack() as locks, _lifeline() as as_parent:
        for folder in {runs.resolve(), (output / jobs.RUNS).resolve()}:
            locks.enter_context(alone(folder, inside=True))
        described: dict[str, Any] = {"file": file, **asdict(study), "errors": {}}
        write_json(output / jobs.RUNS / jobs.STUDY_FILE, described)
        planned(everything, pending)
        for outcome in _outcomes(pending, submit, workers):
            if outcome.error is not None:
                described["errors"][outcome.job.name] = outcome.error
                write_json(output / jobs.RUNS / jobs.STUDY_FILE, described)
            ended(outcome)
            outcomes.append(outcome)
    return outcomes


def plan(study: Study, output: Path, runs: Path, data: Path = Path(".")) -> tuple[list[Job], list[Job]]:
    """All jobs of a study, and those that are left; what they will read is checked. Arguments and errors: `compare`."""
    everything = study.jobs(runs, data)
    read: jobs.Read = {}
    pending = [job for job in everything if not jobs.is_done(job, output, read)]
    alike: dict[Any, dict[str, Job]] = {}
    for job in pending:
        alike.setdefault((job.dataset, job.config.data), {})[job.label] = job
    for by_label in alike.values():
        jobs.check_data(*by_label.values(), read=read)
    return everything, pending


@contextmanager
def _lifeline() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A context for starting processes that see the end of this one, however it ends: of a pipe that is their input.

    Ctrl-C reaches this process alone: theirs would print a traceback each.
    """
    end, ours = os.pipe()

    @contextmanager
    def as_parent() -> Iterator[None]:
        own = os.dup(0)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.dup2(end, 0)
        try:
            yield
        finally:
            os.dup2(own, 0)
            os.close(own)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield as_parent
    finally:
        os.close(ours)
        os.close(end)


def _end_with_parent() -> None:
    """End this process at once when the one that started it has ended; what it trains can be resumed after a kill."""

    def wait() -> None:
        os.read(0, 1)  # until nobody can write
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _outcomes(pending: Sequence[Job], submit: Callable[[Job, int], Any], workers: int) -> Iterator[Outcome]:
    """Keep each worker busy with one job, and yield how each ended; what is running is cancelled at an exception."""
    waiting, running = list(pending), dict[int, tuple[Any, Job, float]]()
    try:
        while waiting or running:
            for worker in range(workers):
                if worker not in running and waiting:
                    job = waiting.pop(0)
                    running[worker] = submit(job, worker), job, time.perf_counter()
            for worker, (submitted, job, start) in list(running.items()):
                if submitted.done():
                    del running[worker]
                    yield Outcome(job, time.perf_counter() - start, _error(submitted))
            time.sleep(_POLL_SECONDS)
    finally:
        for submitted, _, _ in running.values():
            submitted.cancel()


def _run(job: Job, results: Path, keep: bool, threads: int | None) -> None:
    if threads is not None:  # on this machine
        _end_with_parent()
    if threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    jobs.run(job, results, keep=keep)


def _parameters(engine: str, slurm: Mapping[str, Any], worker: int) -> dict[str, Any]:
    if engine == "slurm":
        return {"timeout_min": 60 * 24, **slurm}
    if not (gpus := torch.cuda.device_count()):
        return {"timeout_min": _LONG}
    return {"timeout_min": _LONG, "gpus_per_node": 1, "visible_gpus": [worker % gpus]}


def _error(submitted: Any) -> str | None:
    """The last line of a job's traceback and where all of it is, or None."""
    try:
        error = submitted.exception()
    except Exception as failure:  # submitit's own: a job that was killed has no result
        error = failure
    if error is None:
        return None
    # Of submitit's parts between rules: what it says, the traceback or of a job without a result its log, and more.
    parts = re.split(r"\n-{20,}\n", str(error))
    lines = [line for line in parts[min(1, len(parts) - 1)].splitlines() if line.strip()]
    ended = "it ended without a result, and the last that it said is: " if len(parts) == 2 else ""
    return f"{ended}{lines[-1] if lines else type(error).__name__} (log: {submitted.paths.stderr})"

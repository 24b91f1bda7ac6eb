"""Many jobs, some at a time, through submitit: on this machine, or on the nodes of a Slurm cluster.

submitit and not Ray: jobs are whole trainings that share nothing, so no cluster has to be set up or kept alive; Slurm
is what most research clusters have; and its local executor runs the same jobs in the same way here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import runs
from . import job as jobs
from .study import Job

_LONG = 60 * 24 * 30  # minutes; submitit's own limit of local jobs is 2
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """How a job ended: in ``seconds``, and with ``error`` where it failed."""

    job: Job
    seconds: float
    error: str | None = None


def run_jobs(
    pending: Sequence[Job],
    results: Path,
    *,
    logs: Path,
    workers: int = 1,
    engine: str = "local",
    slurm: Mapping[str, Any] | None = None,
    keep: bool = True,
    started: Callable[[Job], None] = lambda _: None,
) -> Iterator[Outcome]:
    """Run jobs, each in a process of its own, and yield how each ended; one that fails doesn't stop the others.

    Args:
        pending: the jobs, in the order in which they start.
        results: folder of the results.
        logs: folder of what the jobs print.
        workers: jobs at a time.
        engine: ``local`` or ``slurm``.
        slurm: parameters of Slurm as submitit names them, such as ``slurm_partition``, ``gpus_per_node``.
        keep: leave trained models.
        started: called when a job starts.

    Raises:
        RunError: submitit isn't installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise runs.RunError("a study needs submitit: pip install 'bloblora[study]'") from error
    waiting, running = list(pending), dict[int, tuple[Any, Job, float]]()
    try:
        while waiting or running:
            for worker in range(workers):
                if worker not in running and waiting:
                    job = waiting.pop(0)
                    executor = submitit.AutoExecutor(logs / job.name, cluster=engine)
                    executor.update_parameters(**_parameters(engine, slurm or {}, worker))
                    threads = max(1, (os.cpu_count() or 1) // workers) if engine == "local" else None
                    submitted = executor.submit(_run, job, results.absolute(), keep, threads)
                    running[worker] = submitted, job, time.perf_counter()
                    started(job)
            for worker, (submitted, job, start) in list(running.items()):
                if submitted.done():
                    del running[worker]
                    yield Outcome(job, time.perf_counter() - start, _error(submitted))
            time.sleep(_POLL_SECONDS)
    finally:
        for submitted, _, _ in running.values():
            submitted.cancel()


def _run(job: Job, results: Path, keep: bool, threads: int | None) -> None:
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
    text = str(error).rpartition("\n-----")[0] or str(error)  # below the rule submitit says where its logs are
    lines = [line for line in text.splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(error).__name__} (log: {submitted.paths.stderr})"

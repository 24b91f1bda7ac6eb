"""One job: train, evaluate, write; what is there already is kept."""

from __future__ import annotations

import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from .. import runs
from ..adapter import library_versions
from ..data import kind_of, read_records
from ..prediction import Prediction
from .result import Result, read_result, write_result
from .study import EvalSet, Job


def is_done(job: Job, results: Path) -> bool:
    """Whether the job has all its results.

    Raises:
        RunError: its result is of another configuration; nothing of it is overwritten.
    """
    result = read_result(results, job.name)
    if result is None:
        return False
    different = runs.different(result.config, _described(job))
    for key, chosen in job.sets.items():
        if (there := result.sets.get(key, now := _set(chosen))) != now:
            different.append(f"{key}: {there} there, {now} now")
    if different:
        raise runs.RunError(
            f"{results / job.name}.json is the result of another configuration ({'; '.join(different)}); rename the "
            "method, or choose another folder"
        )
    return not result.lacks(job.sets, job.samples)


def check_data(job: Job) -> None:
    """Read what the job will read, so that a wrong file stops a study before hours of work.

    Raises:
        DataError: a file can't be used.
        RunError: its records are prompts, whose answers can't be scored as labels or choices are.
    """
    if kind_of(read_records(job.config.data)) == "generation":
        raise runs.RunError(f"{job.config.data}: a study compares labels and choices, and these are prompts to answer")
    for chosen in job.sets.values():
        read_records(chosen.data, require_labels=chosen.labelled)


def run(job: Job, results: Path, *, progress: bool = True, keep: bool = True) -> Result:
    """Train unless it was, evaluate on what is missing, and write the result.

    Args:
        job: what to do.
        results: folder of the results.
        progress: show bars.
        keep: leave the trained model.
    """
    trained = runs.train(job.config, progress=progress)
    result = read_result(results, job.name) or _fresh(job, trained)
    most = max(job.samples)
    for key, chosen in job.sets.items():
        if not result.lacks({key: chosen}, job.samples):
            continue
        records = _records(chosen, job.config)
        start = time.perf_counter()
        draws = trained.predict(records, most, job.config.seed, batch_size=job.batch_size, progress=progress)
        result.sets[key] = _set(chosen)
        result.seconds[key] = time.perf_counter() - start
        predictions = [Prediction(draws.log_probs[: max(n, 1)], n) for n in job.samples if n > 0 or most == 0]
        if 0 in job.samples and most > 0:
            predictions.append(trained.predict(records, 0, batch_size=job.batch_size))
        targets = runs.targets_of(trained.task, records) if chosen.labelled else None
        for prediction in predictions:
            result.add(key, prediction, targets)
        write_result(result, results)
    if not keep:
        shutil.rmtree(job.config.output, ignore_errors=True)
    return result


def _records(chosen: EvalSet, config: runs.RunConfig) -> list[dict[str, Any]]:
    records = read_records(chosen.data, require_labels=chosen.labelled)
    if chosen.unused:
        records = runs.unused(records, config.limit or len(records), config.limit_seed)
    return runs.select(records, chosen.limit)


def _fresh(job: Job, trained: runs.Run) -> Result:
    return Result(
        job.name,
        job.dataset,
        job.label,
        _described(job),
        job.config.build_method().described(),
        trained.training,
        {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            **library_versions(),
        },
    )


def _described(job: Job) -> dict[str, Any]:
    """The configuration without what a machine decides: where data lie and output goes."""
    given = {name: value for name, value in job.config.given().items() if name != "output"}
    return given | {"data": Path(job.config.data).name}


def _set(chosen: EvalSet) -> dict[str, Any]:
    return {"data": Path(chosen.data).name, "limit": chosen.limit, **({"unused": True} if chosen.unused else {})}


def cpu() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()

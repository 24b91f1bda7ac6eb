"""What each command does."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from transformers.utils import logging

from .. import evaluation, models, runs
from ..adapter import find_posterior
from ..data import read_records
from ..demo import demo
from ..runs import TrainConfig

_CHUNK = 256
_error_console = Console(stderr=True)


def version() -> str:
    """The package's version."""
    return package_version("bloblora")


def train(json: bool = False, **options: Any) -> None:
    """Fine-tune a base model on a labelled file, as a Bayesian LoRA or a plain one.

    A run that was stopped goes on from its last checkpoint when the same command is given again. Classification data
    have `text` and `label`, multiple choice has `question`, `choices` and `answer` (an index).

    Examples:
      bloblora train --data queries.jsonl --output runs/desk
      bloblora train --data arc_easy --limit 640 --steps 1000 --output runs/arc --preset paper
    """
    logging.disable_progress_bar()
    run = runs.train(TrainConfig(**options))
    posterior = find_posterior(run.model)
    result = {
        "output": run.config.output,
        **run.training,
        "posterior": posterior.summary() if posterior else None,
    }
    if json:
        _print_json(result)
        return
    final = run.training["final"]
    print(f"trained {run.config.method} in {run.training['seconds']:.0f} s: training NLL {final['nll']:.4f}")
    if posterior:
        print(f"posterior: median Ω {final['median_std']:.4f}, KL {final['kl']:.0f} nats")
    print(f"saved to {run.config.output}; next: bloblora evaluate {run.config.output} --data FILE")


def evaluate(
    directory: str,
    data: str,
    ood: str | None = None,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    output: str | None = None,
    json: bool = False,
) -> None:
    """Measure accuracy and calibration of a run on labelled data.

    Example: bloblora evaluate runs/desk --data held_out.jsonl --ood other.jsonl --output metrics.json

    Args:
        directory: folder of the run.
        data: labelled records, as for `train`.
        ood: out-of-scope records; adds the AUROC of telling them from `data`.
        samples: weight draws N; 0 is the posterior mean.
        seed: of the draws.
        batch_size: inputs a forward.
        output: write the metrics to this JSON file.
        json: print JSON instead of a table.
    """
    logging.disable_progress_bar()
    records = read_records(data)
    outside = read_records(ood, require_labels=False) if ood else None
    run = runs.load_run(directory)
    result = runs.evaluate(run, records, outside, samples, seed, batch_size=batch_size, progress=sys.stderr.isatty())
    if output:
        runs.write_json(Path(output), result)
    if json:
        _print_json(result)
    else:
        name = f"{run.config.method}, N = {result['num_samples']}"
        Console().print(evaluation.rich_table({name: result}, title=f"{data}, {result['num_examples']} examples"))


def predict(
    directory: str,
    input: str,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    output: str | None = None,
) -> None:
    """Write a JSON line for each input: label, probabilities, confidence and uncertainty.

    Example: echo '{"text": "where is my parcel"}' | bloblora predict runs/desk --input -

    Args:
        directory: folder of the run.
        input: records as for `train`, labels not needed; `-` reads JSON lines from standard input.
        samples: weight draws N; 0 is the posterior mean.
        seed: of the draws.
        batch_size: inputs a forward.
        output: file to write; default standard output.
    """
    logging.disable_progress_bar()
    records = read_records(input, require_labels=False)
    run = runs.load_run(directory)
    with _writing(output) as handle:
        for start in range(0, len(records), _CHUNK):
            for line in runs.describe(run, records[start : start + _CHUNK], samples, seed, batch_size=batch_size):
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def info(directory: str | None = None, json: bool = False) -> None:
    """Show versions and the machine, or what a run's folder holds.

    Args:
        directory: folder of a run.
        json: print JSON.
    """
    logging.disable_progress_bar()
    if directory is None:
        result: dict[str, Any] = {
            **{name: package_version(name) for name in ("bloblora", "torch", "transformers", "peft")},
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "cuda": torch.cuda.is_available(),
            "cache": str(models.cache_folder()),
        }
    else:
        run = runs.load_run(directory)
        posterior = find_posterior(run.model)
        result = {
            "method": run.config.method,
            "model": run.config.model,
            "task": run.task.to_dict(),
            "posterior": {**posterior.config.to_dict(), **posterior.summary()} if posterior else None,
            "training": run.training,
        }
    if json:
        _print_json(result)
    else:
        Console().print_json(_dump(result))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "demo": demo,
    "info": info,
}


def _dump(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _print_json(content: Any) -> None:
    print(_dump(content))


@contextmanager
def _writing(output: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is complete."""
    if output is None:
        yield sys.stdout
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        yield handle
    os.replace(partial, path)

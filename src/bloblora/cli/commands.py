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
from ..data import read_batches, read_records
from ..demo import demo
from ..runs import TrainConfig

_CHUNK = 256
_error_console = Console(stderr=True)


def version() -> str:
    """The package's version."""
    return package_version("bloblora")


def train(json: bool = False, **options: Any) -> None:
    """Fine-tune a base model on labelled data, as a Bayesian LoRA or a plain one.

    A record of the data is either a text to classify or a question with choices; a file holds one of the two kinds:
      {"text": "where is my parcel", "label": "track_order"}
      {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "answer": 1}
    `answer` is the right choice's index, counted from 0. Tables have the same columns, choices as choice_0, choice_1, …

    The output folder then holds the adapter, task.json, run.json and config.yaml (for --config). A run that was
    stopped goes on from its last checkpoint when the same command is given again. --preset paper takes the settings
    of the BLoB paper; options given beside it win.

    Examples:
      bloblora train --data queries.jsonl --output runs/desk
      bloblora train --data support_desk --method lora --output runs/desk-lora
      bloblora train --data arc_easy --limit 640 --steps 1000 --output runs/arc --preset paper
      bloblora train --config runs/desk/config.yaml --seed 1 --output runs/desk-1
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
    diagram: str | None = None,
    json: bool = False,
) -> None:
    """Measure accuracy and calibration of a run on labelled data.

    Prints a table of accuracy, ECE, NLL (nats) and Brier score, and writes them to --output as JSON, with
    num_examples and num_samples. With --ood also the AUROC, how well confidence, predictive entropy and mutual
    information tell the two data sets apart: 1 is perfect, 0.5 is chance.

    Examples:
      bloblora evaluate runs/desk --data held_out.jsonl --output metrics.json
      bloblora evaluate runs/desk --data support_desk:test --ood support_desk:out_of_scope --diagram reliability.png

    Args:
        directory: folder of the run.
        data: labelled records, in the forms that `train` takes.
        ood: out-of-scope records, labels not needed; adds the AUROC of telling them from `data`.
        samples: weight draws N; 0 is the posterior mean.
        seed: of the draws.
        batch_size: inputs a forward.
        output: write the metrics to this JSON file.
        diagram: write a reliability diagram (accuracy against confidence) to this PNG.
        json: print JSON instead of a table.
    """
    logging.disable_progress_bar()
    # All that can be wrong is looked at before the base model is loaded.
    runs.check_samples(samples, seed, batch_size)
    for file in (output, diagram):
        if file is not None:
            runs.check_writable(file)
    task = runs.open_run(directory).task
    records = read_records(data)
    outside = read_records(ood, require_labels=False) if ood else None
    for source, side in ((data, records), (ood, outside)):
        with _named(source):
            if side is not None:
                runs.check_kind(task, side)
    with _named(data):
        runs.targets_of(task, records)
    result = runs.evaluate(
        runs.load_run(directory),
        records,
        outside,
        samples,
        seed,
        batch_size=batch_size,
        progress=sys.stdout.isatty() and not json,  # the bar goes to standard output
        diagram=Path(diagram) if diagram else None,
    )
    if output:
        runs.write_json(Path(output), result)
    if json:
        _print_json(result)
    else:
        name = f"{runs.open_run(directory).config.method}, N = {result['num_samples']}"
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

    A line has, in the inputs' order: `label`, `probabilities` (by label, or by choice), `confidence` (of that label),
    `predictive_entropy` (all uncertainty, nats) and of it `mutual_information` (what the model doesn't know, 0 for a
    plain LoRA) and `expected_entropy` (what the input leaves open).

    Examples:
      bloblora predict runs/desk --input queries.jsonl --output answers.jsonl
      echo '{"text": "where is my parcel"}' | bloblora predict runs/desk --input -

    Args:
        directory: folder of the run.
        input: records in the forms that `train` takes, labels not needed; `-` reads JSON lines from standard input and
            answers them 256 at a time.
        samples: weight draws N; 0 is the posterior mean.
        seed: of the draws.
        batch_size: inputs a forward.
        output: file to write, which appears when it is complete; default standard output.
    """
    logging.disable_progress_bar()
    runs.check_samples(samples, seed, batch_size)
    if output is not None:
        runs.check_writable(output)
    task = runs.open_run(directory).task
    batches = read_batches(input, _CHUNK, require_labels=False)
    run = None
    with _writing(output) as handle:
        for records in batches:
            with _named(input):
                runs.check_kind(task, records)
            run = run or runs.load_run(directory)
            for line in runs.describe(run, records, samples, seed, batch_size=batch_size):
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            handle.flush()


def info(directory: str | None = None, json: bool = False) -> None:
    """Show versions and the machine, or what a run's folder holds: settings, labels, posterior, training.

    Examples:
      bloblora info
      bloblora info runs/desk

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
    try:
        with partial.open("w", encoding="utf-8") as handle:
            yield handle
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _named(source: str | None) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except runs.RunError as error:
        raise runs.RunError(f"{source}: {error}") from error

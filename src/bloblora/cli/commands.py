"""What each command does."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from .. import evaluation, models, runs, studies
from ..adapter import find_posterior, library_versions
from ..data import read_batches, read_records
from ..demo import demo
from ..methods import METHODS
from ..runs import TrainConfig
from .progress import StudyProgress

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


def compare(
    study: str,
    output: str,
    data: str = ".",
    runs_folder: str | None = None,
    workers: int = 1,
    engine: Literal["local", "slurm"] = "local",
    slurm: dict[str, Any] | None = None,
    dry_run: bool = False,
) -> None:
    """Run a study: methods on data sets with seeds, as one YAML file says.

    What is done is skipped and what was stopped goes on when the same command is given again; a run that fails is
    reported at the end and tried again then. The file:
      name: in distribution
      seeds: [0, 1, 2]
      samples: [0, 10]                  # numbers of weight draws N
      train: {steps: 300}               # options of every training, as `bloblora train --help` has them
      datasets:
        clinc150:
          train: {data: clinc_train.jsonl, limit: 5}
          test: {data: clinc_test.jsonl, limit: 5}
          out_of_scope: clinc_oos.jsonl
          shifted: {banking: banking_test.jsonl}
      methods:                          # a label is a method's name, or has options that say which
        lora: {}
        blob: {}
        wide prior: {method: blob, prior_std: 0.5}

    Examples:
      bloblora compare study.yaml --data ~/data --output results/study
      bloblora compare study.yaml --output results/study --workers 4
      bloblora compare study.yaml --output results/study --engine slurm --workers 16 --slurm.slurm_partition gpu

    Args:
        study: the YAML file.
        output: folder of the results, a JSON and a safetensors file a run; `bloblora report` reads it.
        data: folder that relative paths of data files start from.
        runs_folder: folder of trained models and logs; default OUTPUT/runs.
        workers: runs at a time; with several GPUs one each.
        engine: `local`, or `slurm` for a cluster.
        slurm: parameters as submitit names them: slurm_partition, gpus_per_node, timeout_min, …
        dry_run: only list the runs.
    """
    logging.disable_progress_bar()
    if workers < 1:
        raise runs.RunError(f"workers must be at least 1, got {workers}")
    read = studies.read_study(study)
    folder = Path(output)
    models_folder = Path(runs_folder) if runs_folder else folder / "runs"
    if dry_run:
        for job in read.jobs(models_folder, data):
            print(f"{'done' if studies.is_done(job, folder) else 'to do'}  {job.name}")
        return
    runs.check_writable(folder / "report.md")
    with StudyProgress(workers) as progress:
        outcomes = studies.compare(
            read,
            folder,
            runs=models_folder,
            data=Path(data),
            workers=workers,
            engine=engine,
            slurm=slurm,
            planned=progress.planned,
            started=progress.started,
            ended=progress.ended,
        )
    failed = [outcome for outcome in outcomes if outcome.error]
    print(f"{len(outcomes) - len(failed)} runs done, {len(failed)} failed; next: bloblora report {output}")
    if failed:
        raise runs.RunError("\n".join(f"{outcome.job.name}: {outcome.error}" for outcome in failed))


def report(directory: str, output: str | None = None, baseline: str = "lora", title: str | None = None) -> None:
    """Write a study's tables and figures: report.md in its folder, and an HTML page that opens without a network.

    Examples:
      bloblora report results/study
      bloblora report results/study --output study.html --title "Which Bayesian LoRA?"

    Args:
        directory: folder of the results, as `compare` wrote them.
        output: the page; default report.html in that folder.
        baseline: label of the method that the others are compared to.
        title: default the folder's name.
    """
    page = Path(output) if output else None
    if page is not None:
        runs.check_writable(page)
    print(f"wrote {studies.report(Path(directory), page, baseline, title)}")


def tune(
    study: str,
    output: str,
    dataset: str,
    data: str = ".",
    method: str = "blob",
    aim: Literal["nll", "ece"] = "nll",
    within: float = 0.01,
    trials: int = 20,
    ranges: dict[str, tuple[float, float]] | None = None,
    seed: int = 0,
) -> None:
    """Search a method's options on the validation data of a study's data set; test data are never looked at.

    The aim `nll` weighs accuracy and calibration by a proper score; `ece` looks for the best calibration among settings
    that are nearly as accurate as plain LoRA. Given again, the command goes on where it was; the best options are
    printed as YAML for the study's file or `--config`.

    Examples:
      bloblora tune study.yaml --dataset clinc150 --output results/search --aim ece --within 0.01
      bloblora tune study.yaml --dataset clinc150 --output results/search --ranges '{"prior_std": [0.05, 0.5]}'

    Args:
        study: the YAML file, see `compare`; the data set needs a `validation`.
        output: folder of the trials.
        dataset: name of the data set in the file.
        data: folder that relative paths of data files start from.
        method: label of the method in the file.
        aim: `nll`, or `ece` with an accuracy `within` that of the study's baseline.
        within: see `aim`; 0.01 is one point.
        trials: how many in all.
        ranges: lowest and highest value of each option to search; default a decade around the defaults.
        seed: of training and of the search.
    """
    logging.disable_progress_bar()
    if trials < 1:
        raise runs.RunError(f"trials must be at least 1, got {trials}")
    read = studies.read_study(study)
    console = Console(stderr=True)

    def reported(trial: studies.Trial) -> None:
        options = ", ".join(f"{name} {value:.3g}" for name, value in trial.options.items())
        found = ", ".join(f"{name} {trial.metrics[name]:.3f}" for name in ("accuracy", "ece", "nll"))
        console.print(f"trial {trial.number + 1}/{trials}: {found} ({options})", highlight=False)

    found = studies.tune(
        read,
        dataset,
        Path(output),
        method=method,
        aim=aim,
        within=within,
        trials=trials,
        ranges=ranges,
        seed=seed,
        data=Path(data),
        reported=reported,
    )
    rows = {f"trial {trial.number + 1}": {**trial.metrics, **trial.options} for trial in found}
    columns = ["accuracy", "ece", "nll", *found[0].options]
    console.print(evaluation.rich_table(rows, title=f"{len(found)} trials, the best first", columns=columns))
    print("".join(f"{name}: {value:.3g}\n" for name, value in found[0].options.items()), end="")


def list_methods(json: bool = False) -> None:
    """List the methods that `--method` takes: what each is, its paper and its options.

    Examples:
      bloblora methods

    Args:
        json: print JSON.
    """
    rows: dict[str, dict[str, Any]] = {
        name: {
            "summary": _first_line(sys.modules[method.__module__].__doc__),
            "paper": f"arXiv {method.paper}",
            "options": method.options(),
        }
        for name, method in METHODS.items()
    }
    if json:
        _print_json(rows)
        return
    table = Table("method", "what it is", "options and defaults", show_lines=True)
    for name, row in rows.items():
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        table.add_row(Text(name), Text(f"{row['summary']}\n{row['paper']}"), Text(options))
    Console().print(table)


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
            **library_versions(),
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
    "compare": compare,
    "report": report,
    "tune": tune,
    "methods": list_methods,
    "info": info,
}


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]


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

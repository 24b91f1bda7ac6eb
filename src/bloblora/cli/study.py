"""Many runs: compare, report, tune."""

import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import evaluation, runs, studies
from ..messages import quoted
from ..runs.outcome import SHOWN
from ..studies import Job, Outcome


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
        output: folder of the results; OUTPUT/runs has a JSON and a safetensors file for each run.
        data: folder that relative paths of data files start from.
        runs_folder: folder of trained models and logs; default OUTPUT/runs.
        workers: runs at a time; with several GPUs one each.
        engine: `local`, or `slurm` for a cluster.
        slurm: parameters as submitit names them: slurm_partition, gpus_per_node, timeout_min, …
        dry_run: only check the file and the data, and list the runs.
    """
    if workers < 1:
        raise runs.RunError(f"workers must be at least 1, got {workers}")
    read = studies.read_study(study)
    folder = Path(output)
    models_folder = Path(runs_folder) if runs_folder else folder / "runs"
    if dry_run:
        everything, pending = studies.plan(read, folder, models_folder, Path(data))
        for job in everything:
            print(f"{'to do' if job in pending else 'done'}  {job.name}")
        return
    runs.check_writable(folder / "report.md")
    with _StudyProgress(workers) as progress:
        outcomes = studies.compare(
            read,
            folder,
            runs=models_folder,
            data=Path(data),
            file=study,
            workers=workers,
            engine=engine,
            slurm=slurm,
            planned=progress.planned,
            started=progress.started,
            ended=progress.ended,
        )
    failed = [outcome for outcome in outcomes if outcome.error]
    print(f"{len(outcomes) - len(failed)} runs done, {len(failed)} failed; next: bloblora report {shlex.quote(output)}")
    if failed:
        raise runs.RunError("\n".join(f"{outcome.job.name}: {outcome.error}" for outcome in failed))


def report(directory: str, output: str | None = None, baseline: str | None = None, title: str | None = None) -> None:
    """Write a study's report.md with figures and its metrics.json, and an HTML page that opens without a network.

    Examples:
      bloblora report results/study
      bloblora report results/study --output study.html --title "Which Bayesian LoRA?"

    Args:
        directory: folder of the results, as `compare` wrote them.
        output: the page; default report.html in that folder.
        baseline: label of the method that the others are compared to; default the study's, or lora.
        title: default the study's name, or the folder's.
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
    that are nearly as accurate as plain LoRA. Trials marked * are the Pareto front: no other is at least as accurate
    and better calibrated. Given again, the command goes on where it was; the best options are printed as YAML for the
    study's file or `--config`.

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
        ranges: lowest and highest value of each option to search; default those that the method declares for its
            options, and half a decade to each side of its learning rate.
        seed: of training and of the search.
    """
    if trials < 1:
        raise runs.RunError(f"trials must be at least 1, got {trials}")
    read = studies.read_study(study)
    console = Console(stderr=True)

    def reported(trial: studies.Trial) -> None:
        console.print(trial_line(trial), highlight=False)

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
    front = studies.pareto_front(found)
    rows = {
        f"trial {trial.number + 1}{' *' if trial in front else ''}": {**trial.metrics, **trial.options}
        for trial in found
    }
    columns = [*(name for name in SHOWN if name in found[0].metrics), *found[0].options]
    console.print(evaluation.rich_table(rows, title=f"{len(found)} trials, the best first", columns=columns))
    if not found[0].feasible:
        raise runs.RunError(
            f"no trial is within {within} of the accuracy of {quoted(read.baseline)}; trial {found[0].number + 1} "
            "comes nearest. Try more trials, other ranges, or a larger `within`"
        )
    print("".join(f"{name}: {evaluation.short_number(value)}\n" for name, value in found[0].options.items()), end="")


def trial_line(trial: studies.Trial) -> str:
    """What is said of a trial when it is over."""
    options = ", ".join(f"{name} {evaluation.short_number(value)}" for name, value in trial.options.items())
    shown = {name: trial.metrics[name] for name in SHOWN if name in trial.metrics}
    found = ", ".join(f"{name} {evaluation.metric_number(name, value)}" for name, value in shown.items())
    return f"trial {trial.number + 1}: {found} ({options})"


class _StudyProgress:
    """A bar on standard error: what is running, how many runs are done, and how long the rest may take.

    The estimate is the mean time of the runs of the same method and data so far, or of all where there is none yet.
    """

    def __init__(self, workers: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True))
        self._task = self._bar.add_task("study", total=None, left="")
        self._workers = workers
        self._left: list[Job] = []
        self._running: list[Job] = []
        self._seconds: dict[tuple[str, str], list[float]] = {}

    def __enter__(self) -> "_StudyProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def planned(self, everything: Sequence[Job], pending: Sequence[Job]) -> None:
        """Told of all jobs and of those that are left."""
        self._left = list(pending)
        self._bar.update(self._task, total=len(everything), completed=len(everything) - len(pending))

    def started(self, job: Job) -> None:
        """Told of a job that starts."""
        self._running.append(job)
        self._describe()

    def ended(self, outcome: Outcome) -> None:
        """Told how one ended."""
        job = outcome.job
        self._running.remove(job)
        self._left.remove(job)
        if outcome.error is None:
            self._seconds.setdefault((job.dataset, job.label), []).append(outcome.seconds)
        took = timedelta(seconds=round(outcome.seconds))
        left = f" ({estimate})" if (estimate := self._estimate()) else ""
        line = f"{'failed' if outcome.error else 'done'} in {took}: {job.name}{left}"
        self._bar.console.print(line, highlight=False)
        self._bar.advance(self._task)
        self._describe()

    def _describe(self) -> None:
        names = ", ".join(job.name for job in self._running) or "study"
        self._bar.update(self._task, description=names, left=self._estimate())

    def _estimate(self) -> str:
        every = [seconds for times in self._seconds.values() for seconds in times]
        if not every or not self._left:
            return ""
        times = [self._seconds.get((job.dataset, job.label), every) for job in self._left]
        seconds = sum(sum(known) / len(known) for known in times) / self._workers
        return f"about {timedelta(seconds=round(seconds))} left"

"""How far a study is."""

from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..studies import Job, Outcome


class StudyProgress:
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

    def __enter__(self) -> "StudyProgress":
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

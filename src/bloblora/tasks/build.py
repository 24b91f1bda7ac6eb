"""Making a task by name or from what its records look like, and encoding records with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from bloblora.tasks.blank import Blank
from bloblora.tasks.choice_letter import ChoiceLetter
from bloblora.tasks.choice_text import ChoiceText
from bloblora.tasks.classification import Classification
from bloblora.tasks.generation import TextGeneration
from bloblora.tasks.task import Example, Record, Task, TaskError, check_options

_ALL: tuple[type[Task], ...] = (Classification, ChoiceText, ChoiceLetter, Blank, TextGeneration)
TASKS = {task.name: task for task in _ALL}


def build_task(name: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
    """The task of this name, or the one that fits the records for "auto".

    "auto" is `classification` for records with a `text`, `generation` for records with a `prompt` or `messages`; for
    choices it is `blank` when every question has two choices and a `_`, otherwise `choice_text`.

    Raises:
        TaskError: an unknown name or option, or records that fit no task.
    """
    return _task_class(guess_task(records) if name == "auto" else name).build(records, tokenizer, **options)


def guess_task(records: Sequence[Record]) -> str:
    """Name of the task that fits the records, as for "auto".

    Raises:
        TaskError: records that fit no task.
    """
    if records and all("text" in record for record in records):
        return Classification.name
    if records and all("prompt" in record or "messages" in record for record in records):
        return TextGeneration.name
    if not records or not all("question" in record and "choices" in record for record in records):
        raise TaskError(
            "task: 'auto' needs records that all have 'text', 'prompt', 'messages', or 'question' and 'choices'"
        )
    blanks = all("_" in str(record["question"]) and len(record["choices"]) == 2 for record in records)
    return Blank.name if blanks else ChoiceText.name


def task_from_dict(values: Mapping[str, Any]) -> Task:
    """The task that `Task.to_dict` described.

    Raises:
        TaskError: an unknown name or option, or one that is missing.
    """
    options = {key: value for key, value in values.items() if key != "name"}
    task = _task_class(values.get("name"))
    check_options(task, options)
    try:
        return task(**options)
    except TypeError as error:
        raise TaskError(f"task '{task.name}': {error}") from None


def encode_all(
    task: Task, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, progress: bool = False
) -> list[Example]:
    """Every record encoded; a warning says how many had to be truncated.

    Raises:
        TaskError: all problems of all records, each with the record's number, counted from 1.
    """
    return [*encode_each(task, records, tokenizer, progress)]


def encode_each(
    task: Task, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, progress: bool = False
) -> Iterator[Example]:
    """The same one after the other, none of them kept; errors and warnings come at the end."""
    problems: list[str] = []
    truncated = 0
    shown = track(records, "Tokenizing", disable=not progress, console=Console(stderr=True))
    for number, record in enumerate(shown, start=1):
        try:
            example = task.encode(record, tokenizer)
        except TaskError as error:
            problems += [f"record {number}: {problem}" for problem in error.problems]
            continue
        truncated += example["truncated"] > 0
        yield example
    if problems:
        raise TaskError(*problems)
    if truncated:
        warnings.warn(
            f"{truncated} of {len(records)} records have more than max_length={task.max_length} tokens: "
            f"{'the end of the text' if task.labels else 'the beginning of the question or prompt'} was cut off",
            stacklevel=2,
        )


def _task_class(name: str | None) -> type[Task]:
    if name not in TASKS:
        raise TaskError(f"task: {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[name]

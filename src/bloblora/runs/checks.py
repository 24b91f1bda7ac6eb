"""Whether data and options fit a run: all that can be known before a model is loaded."""

from collections.abc import Sequence
from typing import Any

from .. import data as datasets_
from .. import models, tasks
from .config import RunError, TrainConfig

_FIELDS = {
    "classification": "'text'",
    "choice": "'question' and 'choices'",
    "generation": "'prompt' or 'messages'",
}
# Methods of which nothing looks at a part of a weight: the Trainer trains them, and their draws gather it.
_SHARDED = ("lora", "blob", "bbb", "blob-b", "blob-symmetric")
_NOT_OF_TEXT = ("laplace", "laplace-last", "temperature")


def check_task(config: TrainConfig, records: Sequence[dict[str, Any]]) -> None:
    """Raise a RunError when the records can't be this task's; needs no tokenizer."""
    kind = datasets_.kind_of(records)
    if config.task != "auto" and _kind(config.task) != kind:
        raise RunError(f"{config.data}: task {config.task!r} needs records with {_FIELDS[_kind(config.task)]}")
    if kind == "generation" and (config.temperature_scaling or config.method in _NOT_OF_TEXT):
        method = "temperature_scaling" if config.temperature_scaling else f"method {config.method!r}"
        raise RunError(f"{method} is for labels and choices; train task 'generation' with another method")
    if config.normalization != TrainConfig.normalization and (name := task_name(config, records)) != "choice_text":
        raise RunError(f"normalization {config.normalization!r} is for task 'choice_text'; this one is {name!r}")
    if kind != "classification":
        if config.labels is not None:
            raise RunError(f"labels are for task 'classification'; this one is {task_name(config, records)!r}")
        return
    found = {record["label"] for record in records}
    if unknown := sorted(found.difference(config.labels or found)):
        raise RunError(f"{config.data}: field 'label': {', '.join(unknown)} not among labels; add them to it")
    if len(found) < 2 and config.labels is None:
        raise RunError(f"{config.data}: field 'label': all are {found.pop()!r}; there must be at least 2 labels")


def check_targets(config: TrainConfig, task: tasks.Task) -> None:
    """Raise a RunError for a layer that the model hasn't: PEFT would say so only once the weights are loaded."""
    if config.targets is None:
        return
    layers = models.layer_names(config.model, num_labels=num_labels(task))
    # by PEFT's rule: a whole name, or its end
    unknown = [t for t in config.targets if not any(layer == t or layer.endswith(f".{t}") for layer in layers)]
    if unknown:
        last = sorted({layer.rpartition(".")[2] for layer in layers if not layer.rpartition(".")[2].isdigit()} - {""})
        raise RunError(f"targets: the model has no layer {', '.join(unknown)}; its layers: {', '.join(last)}")


def check_kind(task: tasks.Task, records: Sequence[dict[str, Any]]) -> None:
    """Raise a RunError when records are of another kind than the task's: texts to classify, or questions."""
    kind, wanted = datasets_.kind_of(records), _kind(task.name)
    if wanted == "generation":
        raise RunError("the run's task is generation, whose answers are no labels or choices; use `bloblora generate`")
    if kind != wanted:
        raise RunError(
            f"the run's task is {task.name}, which needs records with {_FIELDS[wanted]}, not {_FIELDS[kind]}"
        )


def check_generates(task: tasks.Task, records: Sequence[dict[str, Any]]) -> None:
    """Raise a RunError when a run writes no text, or records have no prompt."""
    if _kind(task.name) != "generation":
        raise RunError(f"the run's task is {task.name}, which writes no text; train one with --task generation")
    if (kind := datasets_.kind_of(records)) != "generation":
        raise RunError(
            f"the run's task is generation, which needs records with {_FIELDS['generation']}, not {_FIELDS[kind]}"
        )


def check_sharded(method: str, approximate: str | None = None) -> None:
    """Raise a RunError for what can't be trained, or predicted with, where FSDP splits the model over the processes."""
    if method not in _SHARDED:
        raise RunError(f"method {method!r} isn't offered under FSDP; use one of {', '.join(_SHARDED)}, or DDP")
    if approximate == "linearized":
        raise RunError("approximate 'linearized' isn't offered under FSDP; use another one, or DDP")


def check_samples(samples: int, seed: int, batch_size: int = 1) -> None:
    """Raise a RunError when these can't be a prediction's: before a model is loaded for it."""
    problems = [f"samples must be 0 (the mean) or more, got {samples}"] if samples < 0 else []
    problems += [f"batch_size must be at least 1, got {batch_size}"] if batch_size < 1 else []
    problems += [f"seed must be in 0..2^32 - 1, got {seed}"] if not 0 <= seed < 2**32 else []
    if problems:
        raise RunError("\n".join(problems))


def task_name(config: TrainConfig, records: Sequence[dict[str, Any]]) -> str:
    """The configuration's task, or for "auto" the one that fits the records."""
    return tasks.guess_task(records) if config.task == "auto" else config.task


def num_labels(task: tasks.Task) -> int | None:
    """Outputs of the classification head; None for a task without one."""
    return len(task.labels) if task.labels is not None else None


def _kind(task_name: str) -> str:
    return task_name if task_name in _FIELDS else "choice"

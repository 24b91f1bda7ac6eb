"""What a configuration leaves to data, model and device: steps, validation, what is Gaussian, dtype, and so on."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from accelerate.utils import parse_flag_from_env

from .. import models, tasks
from ..prediction.temperature import FEWEST_FOR_TEMPERATURE
from ..training.arguments import CLASS_MEANS, TRAINED, automatic_head
from .checks import task_name
from .config import SAVING, UNFIT, RunConfig
from .processes import computes_bfloat16, processes
from .selection import label_counts, num_held_out

_SHARE = 0.2
_FEWEST = 10  # records held out, below which a checkpoint would be chosen by chance
_MOST = 500  # beyond which an evaluation costs more than it tells: the standard error of the accuracy is at most 0.022
# Of n records training sees a multiple of √n: the fewer there are, the more often each. A fresh head needs more than
# an answer that the pretrained model can score. Where it is too long, validation stops it in time.
# Below so many training records a Gaussian head stays close to its prior, and its mean learns less than a point does:
# the Gaussian is over A then (benchmarks/studies/first_hour.yaml).
FEWEST_FOR_GAUSSIAN_HEAD = 200
_EXAMPLES_WITH_HEAD = 320
_EXAMPLES = 80


def resolved(config: RunConfig, records: Sequence[dict[str, Any]], separate: int) -> RunConfig:
    """The configuration with values in place of what is automatic, which depend on the records and on the device.

    ``separate`` counts the validation records that aren't a share of the records.
    """
    task = tasks.TASKS[task_name(config, records)]
    counts = label_counts(config, records)
    validation = config.validation
    if validation == "auto":
        validation = _share(config, counts)
    held_out = num_held_out(counts, validation) if isinstance(validation, int | float) else 0
    temperature = config.temperature_scaling
    if temperature is None:
        temperature = (
            task.kind != "generation"
            and separate + held_out >= FEWEST_FOR_TEMPERATURE
            and config.temperature_folds is None
        )
    options: dict[str, Any] = {"validation": validation, "temperature_scaling": temperature}
    if config.value("max_steps") == "auto":
        options["max_steps"] = _num_steps(config, task, len(records) - held_out)
    if config.value("learning_rate") == "auto":
        options["learning_rate"] = config.initial_learning_rate()
    head = config.value("head")
    if head == "auto":
        options["head"] = head = automatic_head(counts) if _makes_head(config, task) else TRAINED
    few = task.name == "classification" and len(records) - held_out < FEWEST_FOR_GAUSSIAN_HEAD
    over_a = head == CLASS_MEANS or (few and config.value("factors") == "auto")
    if over_a and config.value("head_prior_std") == "auto":
        options["head_prior_std"] = "none"
    return with_dtype(config.with_options(**options))


def _makes_head(config: RunConfig, task: type[tasks.Task]) -> bool:
    """Whether a head is fresh, the method says nothing of how it is made, and one device holds the model."""
    if task.name != "classification" or not config.leaves_head_open():
        return False
    if parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return False
    with suppress(models.ModelError):  # who loads it says so
        return not models.has_head(config.model)
    return True


def with_dtype(config: RunConfig) -> RunConfig:
    """The configuration with a dtype in place of ``auto``."""
    if config.dtype != "auto":
        return config
    half = False
    if not config.build_method().whole_model and computes_bfloat16():
        with suppress(models.ModelError):  # who loads it says so, after the records have been checked
            half = models.is_half(config.model)
    return config.with_options(dtype="bfloat16" if half else "float32")


def left_open(config: RunConfig) -> tuple[str, ...]:
    """The options that `resolved` decides."""
    automatic = dict.fromkeys(("validation", "max_steps", "learning_rate", "dtype", "head_prior_std", "head"), "auto")
    return tuple(
        name for name, value in {**automatic, "temperature_scaling": None}.items() if config.value(name) == value
    )


def why_none(config: RunConfig) -> str:
    """Why nothing is held out by default, to go on with after that; empty where the configuration itself says so."""
    if config.validation != "auto":
        return ""
    if _no_room(config):
        return ", by the other options"
    return f", as a fifth must be at least {_FEWEST} records, and each label keeps one"


def _num_steps(config: RunConfig, task: type[tasks.Task], count: int) -> int:
    """Steps of a training on ``count`` records: a multiple of √count examples, and at least one pass."""
    head = task.task_type != "CAUSAL_LM"
    batch = config.value("per_device_train_batch_size") * config.value("gradient_accumulation_steps")
    examples = max((_EXAMPLES_WITH_HEAD if head else _EXAMPLES) * math.sqrt(count), count)
    return max(1, math.ceil(examples / (batch * processes().num_processes)))


def _share(config: RunConfig, counts: Sequence[int]) -> float:
    """Of the records, where each label has so many, that are held out.

    0 where that would be too few, or other options leave no room for it.
    """
    if _no_room(config):
        return 0.0
    share = min(_SHARE, _MOST / sum(counts))
    return share if num_held_out(counts, share) >= _FEWEST else 0.0


def _no_room(config: RunConfig) -> bool:
    """Whether other options leave no room for validation."""
    idle = config.start_from is not None and config.build_method().post_hoc
    idle |= config.training.get("eval_strategy") == "no" or not config.training.keys().isdisjoint((*SAVING, *UNFIT))
    return idle or bool(config.method.get("holdout"))

"""Whether data and options fit a run, as far as that is known before a model is loaded; and the LoRA it starts from."""

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from .. import models, tasks
from ..adapter import BlobConfig, check_folder, continue_from, find_posterior, matching, posterior_config
from ..adapter.bayesianize import moves_base
from ..adapter.variant import HEAD, STD_PARAMETER
from ..data import KINDS, kind_of
from ..data.records import Problems
from ..files import read_json
from ..messages import quoted
from ..methods import METHODS, Method
from ..methods.rescaled import saved_factor
from ..prediction.temperature import FEWEST_FOR_TEMPERATURE
from ..tasks.text_head import TEXT_ALONE, TextHead
from ..training.arguments import CLASS_MEANS
from .config import RunConfig, RunError
from .folder import RUN_FILE, TASK_FILE, open_run, read_fields, read_run_file

_FEW = 50  # a standard error of the accuracy of 0.07


def check_task(config: RunConfig, records: Sequence[dict[str, Any]]) -> None:
    """Raise a RunError when the records can't be this task's; needs no tokenizer."""
    kind, task, method = kind_of(records), tasks.TASKS[task_name(config, records)], config.build_method()
    if task.family.name not in method.likelihoods:
        others = ", ".join(name for name, kind in METHODS.items() if task.family.name in kind.likelihoods)
        raise RunError(f"method {method.name!r} has no form for task {task.name!r}; train that with {others}")
    if config.task.get("class_weights", "none") != "none" and not method.weighs_classes:
        raise RunError(f"class_weights: method {method.name!r} weighs all records alike; leave it out")
    if config.value("head") == CLASS_MEANS and not (method.class_means and task.name == "classification"):
        others = ", ".join(name for name, kind in METHODS.items() if kind.class_means)
        raise RunError(
            f"head {CLASS_MEANS!r} is for task 'classification' and one of {others}; with task {task.name!r} and "
            f"method {method.name!r} leave it out"
        )
    if config.training.get("label_smoothing_factor") and not task.family.smooths:
        kinds = "classes, choices and tags"
        raise RunError(f"label_smoothing_factor is for {kinds}; task {task.name!r} has none: leave it out")
    if kind == task.kind == "generation" and not method.writes_text:
        names = [name for name in ("temperature_scaling", "temperature_folds") if getattr(config, name)]
        option = names[0] if names else f"method {method.name!r}"
        raise RunError(f"{option} is for labels and choices; train task 'generation' with another method")
    try:
        task.check(records, **{key: value for key, value in config.task.items() if key != "name"})
    except tasks.TaskError as error:
        raise RunError(f"{config.source('data')}: {error}") from error


def check_targets(config: RunConfig, task: tasks.Task, trust_remote_code: bool = False) -> None:
    """Raise a RunError for a layer that the model hasn't: PEFT would say so only once the weights are loaded.

    So for a regular expression that isn't one, matches nothing, or doesn't end, and for all that `lora_of` raises.
    """
    start, targets = lora_of(config), config.lora.get("target_modules")
    if start is None and not {"target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"} & {*config.lora}:
        return
    layers = models.layer_names(config.model, **head_of(task), trust_remote_code=trust_remote_code)
    try:
        found = matching(start or config.build_lora(), layers)
    except ValueError as error:
        raise RunError(str(error)) from error
    if isinstance(targets, str) and targets != "all-linear" and not found:
        raise RunError(f"target_modules {quoted(targets)}: the expression matches no whole name of a layer")
    # by PEFT's rule: a whole name, or its end
    named = targets if isinstance(targets, list) else []
    unknown = [t for t in named if not any(layer == t or layer.endswith(f".{t}") for layer in layers)]
    if unknown:
        last = sorted({layer.rpartition(".")[2] for layer in layers if not layer.rpartition(".")[2].isdigit()} - {""})
        raise RunError(f"target_modules: the model has no layer {', '.join(unknown)}; its layers: {', '.join(last)}")


def check_head(config: RunConfig, task: tasks.Task, trust_remote_code: bool = False) -> None:
    """Raise an error for a model without what the task reads: its head, or the next token; loads no weights."""
    if task.task_type == "CAUSAL_LM":
        models.check_causal(config.model)
    if task.head_module is None:
        return
    layers = models.layer_names(config.model, **head_of(task), trust_remote_code=trust_remote_code)
    if task.head_module not in layers:
        raise RunError(
            f"model {quoted(config.model)}: task {task.name!r} doesn't take it, as it has no head named "
            f"{task.head_module!r}: {task.needs}"
        )


def check_validation(
    config: RunConfig, training: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], *, few: bool = False
) -> None:
    """Raise a RunError where validation records can't be used beside the training records; needs no tokenizer.

    Warns where some are training records too, and where they are too few, unless there may be ``few``.
    """
    source = f"validation {quoted(config.source('validation'))}"
    if not len(validation):
        raise RunError(f"{source} of {len(training)} records leaves no validation record; give a larger share")
    check_beside(source, config, training, validation)
    counts = Counter(json.dumps(record, sort_keys=True) for record in validation)
    seen = {text for record in training if (text := json.dumps(record, sort_keys=True)) in counts}
    if copies := sum(counts[text] for text in seen):
        advice = "take them out of one of the two" if config.validation_data else "remove copies from the data"
        warnings.warn(
            f"{source}: {copies} of {len(validation)} records are training records too, on which a model that learns "
            f"them by heart looks best: {advice}",
            stacklevel=2,
        )
    if len(validation) < _FEW and not few:
        warnings.warn(
            f"{source}: {len(validation)} records are too few to tell checkpoints apart (standard error of the "
            f"accuracy: up to {0.5 / len(validation) ** 0.5:.2f}); at least {_FEW} are better",
            stacklevel=2,
        )


def check_beside(
    source: str,
    config: RunConfig,
    training: Sequence[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    *,
    labelled: bool = True,
) -> None:
    """Raise a RunError where records are of another kind than the training records, or have labels that those lack."""
    here, there = kind_of(records), kind_of(training)
    if here != there:
        raise RunError(f"{source}: must have records with {KINDS[there]}, as the training data, not {KINDS[here]}")
    if not labelled:
        return
    task = tasks.TASKS[task_name(config, training)]
    known, asked = ({label for record in side for label in task.labels_of(record)} for side in (training, records))
    if unknown := sorted(asked.difference(known, config.task.get("labels") or ())):
        names = ", ".join(map(quoted, unknown[:10])) + (", …" if len(unknown) > 10 else "")
        raise RunError(
            f"{source}: field {task.answer!r}: {names} not among the training records' labels; add such records"
        )


def check_rescaling(
    config: RunConfig, training: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]
) -> None:
    """Raise a RunError, or warn, where records are too few to fit a temperature; needs no tokenizer."""
    folds = config.temperature_folds
    if folds is None and not config.temperature_scaling:
        return
    option, records = ("temperature_scaling", validation) if folds is None else (f"temperature_folds {folds}", training)
    if folds is not None and len(records) < folds:
        raise RunError(f"{option}: must be at most the number of records, {len(records)}")
    if folds is not None:
        labels_of = tasks.TASKS[task_name(config, records)].labels_of
        counts = Counter(label for record in records for label in {*labels_of(record)})
        if single := sorted(label for label, count in counts.items() if count == 1):
            warnings.warn(
                f"{option}: labels with one record are unknown to the training without it, and raise the temperature: "
                f"{', '.join(single[:10])}",
                stacklevel=2,
            )
    if len(records) < FEWEST_FOR_TEMPERATURE:
        warnings.warn(
            f"{option}: {len(records)} records are too few for a temperature (its logarithm is known to about "
            f"±{(1 + len(records) / 1.5**2) ** -0.5:.1f}); at least {FEWEST_FOR_TEMPERATURE} are better",
            stacklevel=2,
        )


def warn_of_copies(inputs: Sequence[dict[str, Any]]) -> None:
    """Warn where inputs of calibration records are there several times: each counts as one more independent record."""
    if copies := len(inputs) - len({json.dumps(read_fields(one), sort_keys=True) for one in inputs}):
        warnings.warn(
            f"{copies} of {len(inputs)} records are copies: they have the input of another one. A promise takes all "
            "records for independent ones, and holds for fewer; keep one of each",
            stacklevel=3,
        )


def targets_of(task: tasks.Task, records: Sequence[dict[str, Any]]) -> Tensor:
    """The right answer of each labelled record as metrics take it, (n,): the column's index, or the value."""
    labels, wrong = [], Problems()
    for number, record in enumerate(records, start=1):
        try:
            labels.append(task.target(record))
        except tasks.TaskError as error:
            wrong.add(("record ", number), error.problems)
            continue
        if labels[-1] is None:
            wrong.add(("record ", number), [f"field {task.answer!r}: missing"])
    if lines := wrong.lines():
        more = f"\n… and {len(lines) - 10} more problems" if len(lines) > 10 else ""
        raise RunError("\n".join([f"{wrong.rows} answers that the run can't be measured by:", *lines[:10]]) + more)
    return task.likelihood.targets(labels)


def check_kind(task: tasks.Task, records: Sequence[dict[str, Any]]) -> None:
    """Raise a RunError when records are of another kind than the task's: texts to classify, or questions."""
    kind, wanted = kind_of(records), task.kind
    if wanted == "generation":
        raise RunError("the run's task is generation, whose answers are no labels or choices; use `bloblora generate`")
    if kind != wanted:
        raise RunError(f"the run's task is {task.name}, which needs records with {KINDS[wanted]}, not {KINDS[kind]}")


def check_generates(task: tasks.Task, records: Sequence[dict[str, Any]] | None = None) -> None:
    """Raise a RunError when a run writes no text, or records that are given have no prompt."""
    if task.kind != "generation":
        raise RunError(f"the run's task is {task.name}, which writes no text; train one with --task generation")
    if records is not None and (kind := kind_of(records)) != "generation":
        raise RunError(
            f"the run's task is generation, which needs records with {KINDS['generation']}, not {KINDS[kind]}"
        )


def check_sharded(method: Method, approximate: str | None = None) -> None:
    """Raise a RunError for what can't be trained, or predicted with, where FSDP splits the model over the processes."""
    if not method.sharded:
        known = ", ".join(name for name, kind in METHODS.items() if kind.sharded)
        raise RunError(f"method {method.name!r} isn't offered under FSDP; use one of {known}, or DDP")
    if approximate == "linearized":
        raise RunError("approximate 'linearized' isn't offered under FSDP; use another one, or DDP")


def task_name(config: RunConfig, records: Sequence[dict[str, Any]]) -> str:
    """The configuration's task, or for "auto" the one that fits the records."""
    return tasks.guess_task(records) if config.task["name"] == "auto" else config.task["name"]


def head_of(task: tasks.Task) -> dict[str, Any]:
    """The classification head that a task needs, as `models.load_model` takes it; nothing for a task without one."""
    return {} if task.head is None else {"num_labels": len(task.head), "head": task.task_type}


def lora_of(config: RunConfig) -> LoraConfig | None:
    """The LoRA configuration of what a training starts from, trainable; None: it starts afresh. No model is loaded.

    Raises:
        RunError: it isn't one of the same base model, r and lora_alpha, or other options say which layers are adapted;
            ``prior_from`` has no posterior that can be this run's prior.
        AdapterFileError: its files are damaged.
    """
    if (source := _start(config)) is None:
        return None
    name, given = source
    folder = Path(given)
    if not folder.is_dir():
        kind = "a run's" if name == "prior_from" else "a run's, or one that PEFT saved"
        raise RunError(f"{name} {quoted(given)}: there is no such folder; give {kind}")
    posterior = _posterior_of(folder) if name == "prior_from" else None
    lora = PeftConfig.from_pretrained(str(check_folder(folder)))
    if not isinstance(lora, LoraConfig):
        raise RunError(f"{name} {quoted(given)}: is of type {lora.peft_type}; it must be LORA")
    if config.quantize != "none" and moves_base(start := lora.init_lora_weights):
        raise RunError(
            f"{name} {quoted(given)}: its init_lora_weights {quoted(start)} moved a part of the base weights, and "
            f"those of quantize {config.quantize!r} can't be moved; leave quantize out"
        )
    fresh = config.build_lora()
    pairs: dict[str, tuple[Any, Any]] = {"r": (lora.r, fresh.r), "lora_alpha": (lora.lora_alpha, fresh.lora_alpha)}
    if posterior is not None and (factors := config.build_method().described()["factors"]) != "auto":
        pairs["factors"] = (posterior.factors, factors)
    if (folder / RUN_FILE).is_file():
        stored = read_run_file(folder).config
        pairs["model"] = (stored.get("model", models.DEFAULT_MODEL), config.model)
    if wrong := [f"{option} {there}, not {here}" for option, (there, here) in pairs.items() if there != here]:
        raise RunError(f"{name} {quoted(given)}: it has {', '.join(wrong)}; give the same")
    options = [*(["top_blocks"] if config.top_blocks is not None else []), *config.lora]
    if ours := [option for option in options if option not in ("r", "lora_alpha", "lora_dropout")]:
        raise RunError(f"{ours[0]}: {name} says which layers are adapted, and how; leave it out")
    lora.inference_mode, lora.lora_dropout = False, fresh.lora_dropout
    return lora


def check_start(config: RunConfig, task: tasks.Task) -> None:
    """Raise a RunError where a training starts from a run with other labels, or another unit of values.

    Its head would answer with wrong ones.
    """
    if (start := _start(config)) is None or not (file := Path(start[1]) / TASK_FILE).is_file():
        return
    before, (name, folder) = tasks.task_from_dict(read_json(file, RunError)), start
    if before.head != task.head:
        if before.name != task.name:
            raise RunError(f"{name} {quoted(folder)}: its task is {before.name}, and the data's {task.name}")
        there, here = (", ".join(names) if names else "none" for names in (before.head, task.head))
        advice = (
            f"give --labels {','.join(before.head)}, and only data with these" if before.head else "give other data"
        )
        raise RunError(f"{name} {quoted(folder)}: its labels are {there}, the data's {here}; {advice}")
    if before.likelihood != task.likelihood:
        units = f"it has {before.likelihood}, the data {task.likelihood}"
        raise RunError(f"{name} {quoted(folder)}: {units}; give its value_mean and value_std")


def template_of(config: RunConfig, kind: type[tasks.Task]) -> dict[str, str]:
    """The option ``template`` for a head that isn't fresh: that of the run which made it, or else the text alone."""
    if "template" in config.task:
        return {}
    start = _start(config)
    if start is not None and (file := Path(start[1]) / TASK_FILE).is_file():
        before = read_json(file, RunError)
        return {"template": before["template"]} if before.get("name") == kind.name and "template" in before else {}
    if not issubclass(kind, TextHead):
        return {}
    with suppress(models.ModelError):  # who loads it says so
        if start is not None or models.has_head(config.model):
            return {"template": TEXT_ALONE}
    return {}


def check_start_records(config: RunConfig, records_sha256: str) -> None:
    """Warn where a training starts from a run of the same records that may have been trained on those now held out."""
    if (start := _start(config)) is None or not config.validation or config.validation_data:
        return
    name, folder = start
    if not (Path(folder) / RUN_FILE).is_file():
        return
    before = read_run_file(Path(folder))
    options = {option: before.config.get(option, getattr(RunConfig, option)) for option in ("seed", "validation")}
    if before.records_sha256 != records_sha256 or all(getattr(config, key) == options[key] for key in options):
        return
    said = " and ".join(f"{option} {value}" for option, value in options.items())
    warnings.warn(
        f"{name} {quoted(folder)}: with {said} it was trained on records that are held out here, where it looks too "
        "good: give the same",
        stacklevel=2,
    )


def load_start(model: Any, config: RunConfig) -> None:
    """Put the weights that a training starts from, and those of a head, into a fresh LoRA's place.

    Of ``prior_from`` its posterior, as it was trained, is then the prior, and the start of Ω: τ is of its predictions.

    Raises:
        RunError: they aren't those of this model.
    """
    assert isinstance(model, PeftModel)
    start = _start(config)
    assert start is not None
    name, folder = start
    weights, fresh = load_peft_weights(folder, device="cpu"), get_peft_model_state_dict(model)
    fresh = {key: tensor for key, tensor in fresh.items() if not key.endswith(STD_PARAMETER + HEAD)}
    missing = [key for key in fresh if key not in weights and ".lora_" in key]
    try:
        result: Any = set_peft_model_state_dict(model, fresh | weights)  # a head may have what a plain one lacks
    except RuntimeError as error:  # of another size
        raise RunError(f"{name} {quoted(folder)}: doesn't fit the model: {error}") from error
    if missing or result.unexpected_keys:
        names = ", ".join([*missing, *result.unexpected_keys][:3])
        raise RunError(f"{name} {quoted(folder)}: doesn't fit the model: {names} are in one of them only")
    if (posterior := find_posterior(model)) is None:
        return
    if name == "prior_from":
        continue_from(posterior, folder, saved_factor(Path(folder)))
    else:
        posterior.restart()


def _start(config: RunConfig) -> tuple[str, str] | None:
    """The option that says where a training starts, and its folder; a configuration has one of them at most."""
    for name in ("start_from", "prior_from"):
        if (folder := getattr(config, name)) is not None:
            return name, folder
    return None


def _posterior_of(folder: Path) -> BlobConfig:
    """The configuration of a finished run's Gaussian posterior; a RunError where there is none."""
    try:
        method = open_run(folder).method
    except RunError as error:
        raise RunError(f"prior_from: {error}") from error
    if not method.gaussian:
        known = ", ".join(name for name, kind in METHODS.items() if kind.gaussian)
        raise RunError(
            f"prior_from {quoted(str(folder))}: method {method.name!r} has no posterior of independent Gaussian "
            f"entries; give a run of {known}"
        )
    return posterior_config(folder)

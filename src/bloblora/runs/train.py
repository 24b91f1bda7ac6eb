"""One training: from data file to saved adapter, resumed where it was stopped."""

import hashlib
import json
import random
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, TaskType
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import data as datasets_
from .. import methods, models, tasks
from ..files import read_json, write_json, write_text
from ..training import last_checkpoint
from .checks import check_targets, check_task, task_name
from .config import RunError, TrainConfig
from .folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    RUN_FILE,
    TASK_FILE,
    check_writable,
    file_sha256,
    read_description,
)
from .run import Run, base_model, load_run


def train(config: TrainConfig, *, progress: bool = True, callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Train a run, or go on with one that was stopped; a finished one is loaded.

    Raises:
        RunError: the folder holds a run of another configuration or of other records, or can't be written.
        DataError, TaskError: the data can't be used; raised before the base model is loaded.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise RunError(f"output {config.output!r}: is a file; give a folder")
    stored = read_description(output, config)
    records = select(datasets_.read_records(config.data), config.limit, config.limit_seed)
    check_task(config, records)
    description: dict[str, Any] = {"config": asdict(config), "records_sha256": _records_sha256(records)}
    _check_same_records(output, stored, description["records_sha256"])
    if stored.get("training"):
        return load_run(output)
    check_writable(output / RUN_FILE)
    method = config.build_method()
    description["options"] = method.described()
    tokenizer = models.load_tokenizer(config.model)
    task = _task(config, records, tokenizer)
    check_targets(config, task)
    kept, held_out = split(records, method.holdout, config.limit_seed)
    examples, holdout = (tasks.encode_all(task, part, tokenizer, progress=progress) for part in (kept, held_out))
    write_json(output / RUN_FILE, description)
    write_text(output / CONFIG_FILE, yaml.safe_dump(_given(config), sort_keys=False, allow_unicode=True))

    set_seed(config.seed)
    model = method.prepare(base_model(config, task), _lora(config, task))
    bar, clock = _ProgressBar(), _Clock(output / CHECKPOINTS)
    training = methods.Training(
        task,
        examples,
        _arguments(config, method, progress),
        holdout,
        [*callbacks, clock, *([bar] if progress else [])],
    )
    try:
        sampler = method.fit(model, training)
    finally:
        bar.close()  # before what is said of an interrupt or an error
    model.eval()
    result = {
        "seconds": clock.seconds(),
        "resumed_from": clock.resumed_from,
        "num_examples": len(examples),
        "peak_memory_bytes": peak_memory(),
        "final": training.logs[-1],
        "curve": [[log["step"], log["nll"]] for log in training.logs],
    }
    method.save(model, sampler, output)
    write_json(output / TASK_FILE, task.to_dict())
    # The adapter's own hashes are the posterior's; this one is there for a plain LoRA too.
    description["adapter_sha256"] = file_sha256(method.weights_file(output))
    write_json(output / RUN_FILE, description | {"training": result})
    if not config.keep_checkpoints:
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return Run(model, tokenizer, task, sampler, config, result)


def split(
    records: Sequence[dict[str, Any]], share: float, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records to train on and a share that is held out, per label where records have one; each in the given order."""
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.get("label", ""), []).append(index)
    generator = random.Random(seed)
    out = {i for _, group in sorted(groups.items()) for i in generator.sample(group, round(share * len(group)))}
    kept = [record for index, record in enumerate(records) if index not in out]
    return kept, [records[index] for index in sorted(out)]


def select(records: list[dict[str, Any]], limit: int | None, seed: int = 0) -> list[dict[str, Any]]:
    """``limit`` random records, per label where records have one; all of them for None."""
    if limit is None:
        return records
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record.get("label", ""), []).append(record)
    generator = random.Random(seed)
    return [record for _, group in sorted(groups.items()) for record in generator.sample(group, min(limit, len(group)))]


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _task(config: TrainConfig, records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tasks.Task:
    options = {"normalization": config.normalization} if task_name(config, records) == tasks.ChoiceText.name else {}
    return tasks.build_task(config.task, records, tokenizer, **options)


def _given(config: TrainConfig) -> dict[str, Any]:
    """The configuration without what is left to defaults of the method."""
    return {name: value for name, value in asdict(config).items() if value is not None}


def _lora(config: TrainConfig, task: tasks.Task) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout or 0.0,
        target_modules=config.targets,
        task_type=TaskType.SEQ_CLS if task.labels is not None else TaskType.CAUSAL_LM,
    )


def _arguments(config: TrainConfig, method: methods.Method, progress: bool) -> dict[str, Any]:
    return {
        "output_dir": str(Path(config.output) / CHECKPOINTS),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate or method.learning_rate,
        "max_grad_norm": config.max_grad_norm,
        "warmup_steps": round(config.steps * config.warmup_ratio),
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "group_by_length" if config.group_by_length else "random",
        "seed": config.seed,
        "gradient_checkpointing": config.gradient_checkpointing,
        "logging_steps": min(20, config.steps),
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "dataloader_pin_memory": torch.cuda.is_available(),  # torch warns where there is nothing to pin for
        "disable_tqdm": not progress,
        "report_to": [],
    }


class _ProgressBar(ProgressCallback):
    """A bar on standard error that shows the last losses."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None:
            shown = {name: f"{logs[name]:.4g}" for name in ("nll", "kl", "median_std") if name in logs}
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        if self.training_bar is not None:
            self.training_bar.close()


class _Clock(TrainerCallback):
    """Seconds of training, over all sessions: each checkpoint holds how many led to it."""

    FILE = "seconds.json"

    def __init__(self, checkpoints: Path) -> None:
        found = [folder for part in (checkpoints, *checkpoints.glob("*/")) if (folder := last_checkpoint(part))]
        times = [
            read_json(folder / self.FILE, RunError)["seconds"] for folder in found if (folder / self.FILE).is_file()
        ]
        self._before = max(times, default=0.0)
        self._start = time.perf_counter()
        self.resumed_from = found[-1].name if found else None

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_json(folder / self.FILE, {"seconds": self.seconds()})


def _records_sha256(records: Sequence[dict[str, Any]]) -> str:
    """Hash of what is trained on: fields that no task reads don't count."""
    read = [
        {k: record[k] for k in ("text", "label", "question", "choices", "answer") if k in record} for record in records
    ]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def _check_same_records(output: Path, stored: dict[str, Any], sha256: str) -> None:
    if stored.get("records_sha256", sha256) != sha256:
        raise RunError(
            f"{output} holds a run whose training records were others: the data changed since; choose another output, "
            "or restore the data"
        )

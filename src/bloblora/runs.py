"""A run: one fine-tuned adapter in one folder, from data file to saved adapter and back.

The folder holds the adapter (see `bloblora.adapter.storage`), ``task.json`` (how records become logits),
``run.json`` (the whole configuration, and what the training took) and, while it lasts, ``checkpoints/``.
"""

import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from . import data as datasets_
from . import models, tasks
from .adapter import BlobConfig, bayesianize, load, save
from .evaluation import metrics, ood_metrics
from .prediction import Prediction, predict
from .training import BlobTrainer, BlobTrainingArguments, last_checkpoint

TASK_FILE, RUN_FILE, CONFIG_FILE, CHECKPOINTS = "task.json", "run.json", "config.yaml", "checkpoints"


class RunError(ValueError):
    """A run's folder or configuration can't be used; the message says what would be right."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training.

    Args:
        data: training records: a .jsonl, .csv, .tsv or .parquet file, a `datasets` folder, or a name such as
            ``support_desk`` or ``arc_easy``.
        output: folder of the run; a run that was stopped goes on from its last checkpoint.
        model: base model: ``smollm2-135m``, a hub id, a folder, or a .gguf file.
        method: ``blob`` trains a Gaussian over LoRA's A, ``lora`` a point.
        task: ``classification``, ``choice_text``, ``choice_letter``, ``blank``, or ``auto`` by the data's form.
        limit: use only this many training records, chosen by ``limit_seed``; per label for classification.
        limit_seed: which records ``limit`` takes.
        steps: optimizer steps.
        batch_size: examples an optimizer step.
        group_by_length: put examples of like length in a batch, which spares padding; their order stays random.
        learning_rate: of AdamW, after warm-up; falls linearly to 0.
        warmup_ratio: share of the steps in which the learning rate rises.
        seed: of initialization, data order and noise.
        rank: r of LoRA.
        alpha: α of LoRA; the update is scaled by α/r.
        dropout: LoRA's dropout.
        targets: names of the layers to adapt; default: PEFT's choice for the model (q_proj and v_proj for Llama).
        dtype: of the base model: float32, bfloat16 or float16. The adapter is float32.
        gradient_checkpointing: trade time for memory.
        prior_std: σp of the prior (blob).
        init_std: ε, where Ω starts (blob).
        std_parameterization: ``square`` or ``softplus`` (blob).
        estimator: ``independent``, ``flipout``, ``shared`` or ``local`` (blob).
        kl_scale: factor of the KL; 1 is the ELBO (blob).
        kl_weighting: ``uniform`` or ``reweighted`` (blob).
        dataset_rescaling: the paper's pseudo data size (blob).
        optimizer_style: ``joint``, or the paper's ``alternating`` (blob).
        kl_learning_rate: of the SGD on the KL (blob, alternating).
        num_weight_draws: weight draws a step (blob).
        save_steps: steps between checkpoints.
        keep_checkpoints: leave ``checkpoints/`` when the training is done.
    """

    data: str
    output: str
    model: str = models.DEFAULT_MODEL
    method: Literal["blob", "lora"] = "blob"
    task: Literal["auto", "classification", "choice_text", "choice_letter", "blank"] = "auto"
    limit: int | None = None
    limit_seed: int = 0
    steps: int = 500
    batch_size: int = 16
    group_by_length: bool = True
    learning_rate: float = 5e-4
    warmup_ratio: float = 0.06
    seed: int = 0
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: list[str] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    prior_std: float = BlobConfig.prior_std
    init_std: float = BlobConfig.init_std
    std_parameterization: Literal["square", "softplus"] = "square"
    estimator: Literal["independent", "flipout", "shared", "local"] = "independent"
    kl_scale: float = 1.0
    kl_weighting: Literal["uniform", "reweighted"] = "uniform"
    dataset_rescaling: bool = False
    optimizer_style: Literal["joint", "alternating"] = "joint"
    kl_learning_rate: float = 0.01
    num_weight_draws: int = 1
    save_steps: int = 100
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "save_steps", "num_weight_draws"):
            if getattr(self, name) < 1:
                raise RunError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "alpha"):
            if not getattr(self, name) > 0:
                raise RunError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_ratio", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise RunError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        self.blob_config()

    def blob_config(self) -> BlobConfig:
        """The posterior's part."""
        return BlobConfig(self.prior_std, self.init_std, self.std_parameterization, self.estimator)


@dataclass
class Run:
    """A trained run, ready to predict.

    Attributes:
        model: the PEFT model, in eval mode.
        tokenizer: its tokenizer.
        task: how records become logits.
        config: the configuration that it was trained with.
        training: what the training took: ``seconds``, ``peak_memory_bytes``, ``final`` (the last log).
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    task: tasks.Task
    config: TrainConfig
    training: dict[str, Any] = field(default_factory=dict)

    def predict(
        self,
        records: Sequence[dict[str, Any]],
        num_samples: int = 10,
        seed: int = 0,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Prediction:
        """Predictions of raw records, in their order; see `bloblora.predict`."""
        examples = tasks.encode_all(self.task, records, self.tokenizer)
        return predict(
            self.model, examples, num_samples, seed, task=self.task, batch_size=batch_size, progress=progress
        )


def train(config: TrainConfig, *, progress: bool = True, callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Train a run, or go on with one that was stopped; a finished one is loaded.

    Raises:
        RunError: the folder holds a run of another configuration.
        DataError, TaskError: the data can't be used; raised before the base model is loaded.
    """
    output = Path(config.output)
    if _read_run(output, config).get("training"):
        return load_run(output)
    records = select(datasets_.read_records(config.data), config.limit, config.limit_seed)
    tokenizer = models.load_tokenizer(config.model)
    task = tasks.build_task(config.task, records, tokenizer)
    examples = tasks.encode_all(task, records, tokenizer, progress=progress)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RUN_FILE, {"config": asdict(config)})
    (output / CONFIG_FILE).write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")

    set_seed(config.seed)
    model = _prepare(config, task)
    trainer = BlobTrainer(
        model,
        _arguments(config, progress),
        task=task,
        train_dataset=examples,
        data_collator=task.collate,
        callbacks=list(callbacks),
    )
    checkpoint = last_checkpoint(output / CHECKPOINTS)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    training = {
        "seconds": time.perf_counter() - start,
        "resumed_from": checkpoint.name if checkpoint else None,
        "num_examples": len(examples),
        "peak_memory_bytes": peak_memory(),
        "final": [log for log in trainer.state.log_history if "nll" in log][-1],
    }
    save(model, output)
    write_json(output / TASK_FILE, task.to_dict())
    write_json(output / RUN_FILE, {"config": asdict(config), "training": training})
    if not config.keep_checkpoints:
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return Run(model.eval(), tokenizer, task, config, training)


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Load a finished run.

    Raises:
        RunError: the folder isn't one, or its training isn't finished.
        AdapterFileError: the adapter's files are damaged.
    """
    directory = Path(directory)
    if not (directory / RUN_FILE).is_file():
        raise RunError(f"{directory}: no {RUN_FILE} in it; give a folder that `bloblora train` wrote")
    stored = _read_json(directory / RUN_FILE)
    if not stored.get("training"):
        raise RunError(f"{directory}: its training isn't finished; run the same `bloblora train` again to go on")
    config = TrainConfig(**stored["config"])
    task = tasks.task_from_dict(_read_json(directory / TASK_FILE))
    model = load(_base_model(config, task), directory)
    return Run(model, models.load_tokenizer(config.model), task, config, stored["training"])


def score(inside: Prediction, targets: torch.Tensor, outside: Prediction | None = None) -> dict[str, Any]:
    """Metrics of predictions, and with ``outside`` how well their uncertainty tells out-of-scope inputs apart."""
    result = metrics(inside.log_probabilities, targets) | {"num_samples": inside.num_samples}
    if outside is not None:
        result |= ood_metrics(_uncertainty(inside), _uncertainty(outside))
    return result


def evaluate(
    run: Run,
    records: Sequence[dict[str, Any]],
    outside: Sequence[dict[str, Any]] | None = None,
    num_samples: int = 10,
    seed: int = 0,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Any]:
    """Metrics of a run on labelled records; ``outside`` are records out of its scope.

    Raises:
        RunError: a label that the run doesn't know.
    """
    targets = targets_of(run.task, records)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    inside = run.predict(records, num_samples, seed, **options)
    far = None
    if outside is not None:
        far = run.predict([_unlabelled(record) for record in outside], num_samples, seed, **options)
    return score(inside, targets, far)


def describe(
    run: Run, records: Sequence[dict[str, Any]], num_samples: int = 10, seed: int = 0, *, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """For each record its answer, the probability of each label or choice, and the uncertainty in nats."""
    prediction = run.predict([_unlabelled(record) for record in records], num_samples, seed, batch_size=batch_size)
    probabilities, answers = prediction.probabilities, prediction.labels
    scores = _uncertainty(prediction) | {"expected_entropy": prediction.expected_entropy}
    for i, record in enumerate(records):
        columns = run.task.columns(record)
        if len(set(columns)) < len(columns):
            columns = [f"{index}: {column}" for index, column in enumerate(columns)]
        yield {
            **{key: record[key] for key in ("id", "text", "question") if key in record},
            "label": columns[int(answers[i])],
            "probabilities": {column: float(probabilities[i, j]) for j, column in enumerate(columns)},
            **{name: float(values[i]) for name, values in scores.items()},
        }


def targets_of(task: tasks.Task, records: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Index of the right column of each labelled record, (n,)."""
    if task.labels is None:
        return torch.tensor([record["answer"] for record in records])
    index = {label: i for i, label in enumerate(task.labels)}
    if unknown := sorted({record["label"] for record in records} - index.keys()):
        raise RunError(f"labels that the model was not trained on: {', '.join(unknown[:10])}")
    return torch.tensor([index[record["label"]] for record in records])


def select(records: list[dict[str, Any]], limit: int | None, seed: int = 0) -> list[dict[str, Any]]:
    """``limit`` random records, per label where records have one; all of them for None."""
    if limit is None:
        return records
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record.get("label", ""), []).append(record)
    generator = random.Random(seed)
    return [record for _, group in sorted(groups.items()) for record in generator.sample(group, min(limit, len(group)))]


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _uncertainty(prediction: Prediction) -> dict[str, torch.Tensor]:
    names = ("confidence", "predictive_entropy", "mutual_information")
    return {name: getattr(prediction, name) for name in names}


def _unlabelled(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("label", "answer")}


def _prepare(config: TrainConfig, task: tasks.Task) -> PeftModel:
    base = _base_model(config, task)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        task_type=TaskType.SEQ_CLS if task.labels is not None else TaskType.CAUSAL_LM,
    )
    model = get_peft_model(base, lora)
    if config.method == "blob":
        bayesianize(model, config.blob_config())
    return model


def _base_model(config: TrainConfig, task: tasks.Task) -> Any:
    num_labels = len(task.labels) if task.labels is not None else None
    return models.load_model(config.model, num_labels=num_labels, dtype=config.dtype)


def _arguments(config: TrainConfig, progress: bool) -> BlobTrainingArguments:
    return BlobTrainingArguments(
        output_dir=str(Path(config.output) / CHECKPOINTS),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=round(config.steps * config.warmup_ratio),
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
        kl_scale=config.kl_scale,
        kl_weighting=config.kl_weighting,
        dataset_rescaling=config.dataset_rescaling,
        optimizer_style=config.optimizer_style,
        kl_learning_rate=config.kl_learning_rate,
        num_weight_draws=config.num_weight_draws,
        logging_steps=min(20, config.steps),
        save_steps=config.save_steps,
        save_total_limit=1,
        disable_tqdm=not progress,
        report_to=[],
    )


def _read_run(output: Path, config: TrainConfig) -> dict[str, Any]:
    """What the folder says of its run; empty where there is none."""
    if not (output / RUN_FILE).is_file():
        return {}
    stored = _read_json(output / RUN_FILE)
    old, new = stored.get("config", {}), asdict(config)
    different = [f"{k}: {old.get(k)!r} there, {new[k]!r} now" for k in new if k != "output" and old.get(k) != new[k]]
    if different:
        raise RunError(f"{output} holds a run of another configuration ({'; '.join(different)}); choose another output")
    return stored


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: not readable as JSON: {error}") from error

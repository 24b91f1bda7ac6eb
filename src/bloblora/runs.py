"""A run: one fine-tuned adapter in one folder, from data file to saved adapter and back.

The folder holds the adapter (see `bloblora.adapter.storage`), ``task.json`` (how records become logits),
``run.json`` (the whole configuration, and what the training took) and, while it lasts, ``checkpoints/``.
"""

import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import data as datasets_
from . import models, tasks
from .adapter import BlobConfig, bayesianize, check_folder, load, save
from .evaluation import metrics, ood_metrics, reliability_diagram
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
        normalization: how ``choice_text`` scores a choice: ``sum`` of its tokens' log-probabilities, or their mean
            (``length``), which favours no short choice and is less sure before training.
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
        optimizer_style: ``flow`` (AdamW on the NLL, exact gradient flow of the KL), ``alternating`` (SGD on the KL, as
            in the paper) or ``joint`` (blob).
        kl_learning_rate: on the KL: higher for better calibration, lower for accuracy (blob, flow and alternating).
        num_weight_draws: weight draws a step (blob).
        save_steps: steps between checkpoints.
        keep_checkpoints: leave ``checkpoints/`` when the training is done.
    """

    data: str
    output: str
    model: str = models.DEFAULT_MODEL
    method: Literal["blob", "lora"] = "blob"
    task: Literal["auto", "classification", "choice_text", "choice_letter", "blank"] = "auto"
    normalization: Literal["sum", "length"] = "sum"
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
    optimizer_style: Literal["flow", "alternating", "joint"] = "flow"
    kl_learning_rate: float = BlobTrainingArguments.kl_learning_rate
    num_weight_draws: int = 1
    save_steps: int = 100
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        problems = [problem for name, values in self._ranges().items() if (problem := values(name))]
        problems += [f"{name} must not be empty" for name in ("data", "output", "model") if not getattr(self, name)]
        if self.targets == []:
            problems.append("targets must name at least one layer, or be left out")
        try:
            self.blob_config()
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise RunError("\n".join(problems))

    def _ranges(self) -> dict[str, Callable[[str], str | None]]:
        """For each number what is wrong with it, if anything."""

        def check(right: Callable[[float], bool], range_: str) -> Callable[[str], str | None]:
            def problem(name: str) -> str | None:
                value = getattr(self, name)
                usable = value is not None and math.isfinite(value) and right(value)
                return None if usable else f"{name} must be {range_}, got {value}"

            return problem

        count = check(lambda value: value >= 1, "at least 1")
        positive = check(lambda value: value > 0, "a finite number above 0")
        scale = check(lambda value: value >= 0, "a finite number of at least 0")
        share = check(lambda value: 0 <= value < 1, "in [0, 1)")
        seed = check(lambda value: 0 <= value < 2**32, "in 0..2^32 - 1")
        return {
            **dict.fromkeys(("steps", "batch_size", "rank", "save_steps", "num_weight_draws"), count),
            **({} if self.limit is None else {"limit": count}),
            **dict.fromkeys(("learning_rate", "alpha"), positive),
            **dict.fromkeys(("kl_scale", "kl_learning_rate"), scale),
            **dict.fromkeys(("warmup_ratio", "dropout"), share),
            **dict.fromkeys(("seed", "limit_seed"), seed),
        }

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
        training: what the training took: ``seconds`` (of all sessions, without what a stop threw away),
            ``peak_memory_bytes`` (of the last session), ``final`` (the last log).
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
        """Predictions of raw records, in their order, whatever label they have; see `bloblora.predict`."""
        unlabelled = [{k: v for k, v in record.items() if k not in ("label", "answer")} for record in records]
        examples = tasks.encode_all(self.task, unlabelled, self.tokenizer)
        return predict(
            self.model, examples, num_samples, seed, task=self.task, batch_size=batch_size, progress=progress
        )


def train(config: TrainConfig, *, progress: bool = True, callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Train a run, or go on with one that was stopped; a finished one is loaded.

    Raises:
        RunError: the folder holds a run of another configuration or of other records, or can't be written.
        DataError, TaskError: the data can't be used; raised before the base model is loaded.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise RunError(f"output {config.output!r}: is a file; give a folder")
    stored = _read_run(output, config)
    records = select(datasets_.read_records(config.data), config.limit, config.limit_seed)
    _check_task(config, records)
    description: dict[str, Any] = {"config": asdict(config), "records_sha256": _records_sha256(records)}
    _check_same_records(output, stored, description["records_sha256"])
    if stored.get("training"):
        return load_run(output)
    check_writable(output / RUN_FILE)
    tokenizer = models.load_tokenizer(config.model)
    task = _task(config, records, tokenizer)
    _check_targets(config, task)
    examples = tasks.encode_all(task, records, tokenizer, progress=progress)
    write_json(output / RUN_FILE, description)
    _write(output / CONFIG_FILE, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))

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
    # The Trainer's own print each log on standard output, which belongs to results.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    bar = _ProgressBar()
    if progress:
        trainer.add_callback(bar)
    checkpoint = last_checkpoint(output / CHECKPOINTS)
    clock = _Clock(checkpoint)
    trainer.add_callback(clock)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()  # before what is said of an interrupt or an error
    training = {
        "seconds": clock.seconds(),
        "resumed_from": checkpoint.name if checkpoint else None,
        "num_examples": len(examples),
        "peak_memory_bytes": peak_memory(),
        "final": [log for log in trainer.state.log_history if "nll" in log][-1],
    }
    save(model, output)
    write_json(output / TASK_FILE, task.to_dict())
    # The adapter's own hashes are the posterior's; this one is there for a plain LoRA too.
    description["adapter_sha256"] = _file_sha256(check_folder(output) / SAFETENSORS_WEIGHTS_NAME)
    write_json(output / RUN_FILE, description | {"training": training})
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
    description = open_run(directory)
    config, task = description.config, description.task
    model = load(_base_model(config, task), directory)
    return Run(model, models.load_tokenizer(config.model), task, config, description.training)


@dataclass(frozen=True)
class RunDescription:
    """What a finished run's folder says, without its model: enough to check arguments by."""

    config: TrainConfig
    task: tasks.Task
    training: dict[str, Any]


def open_run(directory: str | os.PathLike[str]) -> RunDescription:
    """Read and check a finished run's folder; no model is loaded.

    Raises:
        RunError: the folder isn't one, its training isn't finished, or its adapter was altered.
        AdapterFileError: the adapter's files are damaged.
    """
    directory = Path(directory)
    if not (directory / RUN_FILE).is_file():
        raise RunError(f"{directory}: no {RUN_FILE} in it; give a folder that `bloblora train` wrote")
    stored = _read_json(directory / RUN_FILE)
    if not stored.get("training"):
        raise RunError(f"{directory}: its training isn't finished; run the same `bloblora train` again to go on")
    try:
        config = TrainConfig(**stored["config"])
        task = tasks.task_from_dict(_read_json(directory / TASK_FILE))
    except (KeyError, TypeError) as error:
        raise RunError(f"{directory / RUN_FILE}: not what this version of bloblora writes: {error}") from error
    weights = check_folder(directory) / SAFETENSORS_WEIGHTS_NAME
    if config.method == "blob" and not (weights.parent / "blob_config.json").is_file():
        raise RunError(f"{directory}: the posterior's files are missing; without them this is a plain LoRA")
    if stored.get("adapter_sha256", actual := _file_sha256(weights)) != actual:
        raise RunError(
            f"{weights}: its SHA-256 isn't the one in {RUN_FILE}: the file was altered, or comes from another run"
        )
    return RunDescription(config, task, stored["training"])


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
    diagram: Path | None = None,
) -> dict[str, Any]:
    """Metrics of a run on labelled records; ``outside`` are records out of its scope.

    With ``diagram`` a reliability diagram is written to that PNG.

    Raises:
        RunError: records of the other kind, or a label that the run doesn't know.
    """
    check_kind(run.task, records)
    targets = targets_of(run.task, records)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    inside = run.predict(records, num_samples, seed, **options)
    far = None
    if outside is not None:
        check_kind(run.task, outside)
        far = run.predict(outside, num_samples, seed, **options)
    if diagram is not None:
        name = f"{run.config.method}, N = {inside.num_samples}"
        reliability_diagram({name: (inside.probabilities, targets)}, diagram)
    return score(inside, targets, far)


def describe(
    run: Run, records: Sequence[dict[str, Any]], num_samples: int = 10, seed: int = 0, *, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """For each record its answer, the probability of each label or choice, and the uncertainty in nats."""
    prediction = run.predict(records, num_samples, seed, batch_size=batch_size)
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
    unknown = [
        f"record {number}: field 'label': {record['label']!r}"
        for number, record in enumerate(records, start=1)
        if record["label"] not in index
    ]
    if unknown:
        more = f"\n… and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        known = ", ".join(task.labels[:10]) + (", …" if len(task.labels) > 10 else "")
        raise RunError("\n".join([f"labels that the model was not trained on (it has {known}):", *unknown[:10]]) + more)
    return torch.tensor([index[record["label"]] for record in records])


def check_kind(task: tasks.Task, records: Sequence[dict[str, Any]]) -> None:
    """Raise a RunError when records are of another kind than the task's: texts to classify, or questions."""
    kind, wanted = datasets_.kind_of(records), _kind(task.name)
    if kind != wanted:
        fields = {"classification": "'text'", "choice": "'question' and 'choices'"}
        raise RunError(f"the run's task is {task.name}, which needs records with {fields[wanted]}, not {fields[kind]}")


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
    _write(file, json.dumps(content, indent=2) + "\n")


def check_writable(file: str | os.PathLike[str]) -> None:
    """Make a file's folder, and raise a RunError when the file can't be written there: before hours of work."""
    file = Path(file)
    if file.is_dir():
        raise RunError(f"{file}: is a folder; give a file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise RunError(f"{file}: can't be written: {error.strerror or error}") from error


def check_samples(samples: int, seed: int, batch_size: int = 1) -> None:
    """Raise a RunError when these can't be a prediction's: before a model is loaded for it."""
    problems = [f"samples must be 0 (the mean) or more, got {samples}"] if samples < 0 else []
    problems += [f"batch_size must be at least 1, got {batch_size}"] if batch_size < 1 else []
    problems += [f"seed must be in 0..2^32 - 1, got {seed}"] if not 0 <= seed < 2**32 else []
    if problems:
        raise RunError("\n".join(problems))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _file_sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


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


def _kind(task_name: str) -> str:
    return "classification" if task_name == tasks.Classification.name else "choice"


def _check_task(config: TrainConfig, records: Sequence[dict[str, Any]]) -> None:
    """Raise a RunError when the records can't be this task's; needs no tokenizer."""
    kind = datasets_.kind_of(records)
    if config.task != "auto" and _kind(config.task) != kind:
        wanted = {"classification": "'text'", "choice": "'question' and 'choices'"}[_kind(config.task)]
        raise RunError(f"{config.data}: task {config.task!r} needs records with {wanted}")
    if config.normalization != TrainConfig.normalization and (name := _task_name(config, records)) != "choice_text":
        raise RunError(f"normalization {config.normalization!r} is for task 'choice_text'; this one is {name!r}")
    labels = {record["label"] for record in records} if kind == "classification" else None
    if labels is not None and len(labels) < 2:
        raise RunError(f"{config.data}: field 'label': all are {labels.pop()!r}; there must be at least 2 labels")


def _check_targets(config: TrainConfig, task: tasks.Task) -> None:
    """Raise a RunError for a layer that the model hasn't: PEFT would say so only once the weights are loaded."""
    if config.targets is None:
        return
    layers = models.layer_names(config.model, num_labels=_num_labels(task))
    # by PEFT's rule: a whole name, or its end
    unknown = [t for t in config.targets if not any(layer == t or layer.endswith(f".{t}") for layer in layers)]
    if unknown:
        last = sorted({layer.rpartition(".")[2] for layer in layers if not layer.rpartition(".")[2].isdigit()} - {""})
        raise RunError(f"targets: the model has no layer {', '.join(unknown)}; its layers: {', '.join(last)}")


def _num_labels(task: tasks.Task) -> int | None:
    return len(task.labels) if task.labels is not None else None


def _task(config: TrainConfig, records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tasks.Task:
    options = {"normalization": config.normalization} if _task_name(config, records) == tasks.ChoiceText.name else {}
    return tasks.build_task(config.task, records, tokenizer, **options)


def _task_name(config: TrainConfig, records: Sequence[dict[str, Any]]) -> str:
    return tasks.guess_task(records) if config.task == "auto" else config.task


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

    def __init__(self, checkpoint: Path | None) -> None:
        self._before = 0.0
        if checkpoint is not None and (checkpoint / self.FILE).is_file():
            self._before = _read_json(checkpoint / self.FILE)["seconds"]
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_json(folder / self.FILE, {"seconds": self.seconds()})


def _uncertainty(prediction: Prediction) -> dict[str, torch.Tensor]:
    names = ("confidence", "predictive_entropy", "mutual_information")
    return {name: getattr(prediction, name) for name in names}


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
    return models.load_model(config.model, num_labels=_num_labels(task), dtype=config.dtype)


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
        dataloader_pin_memory=torch.cuda.is_available(),  # torch warns where there is nothing to pin for
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
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content

"""One training: from data file to saved adapter, resumed where it was stopped."""

import math
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import data as datasets_
from .. import methods, models, tasks
from ..adapter.sharding import gather_
from ..evaluation import lines_figure, save_figure
from ..files import read_json, write_json, write_text
from ..messages import quoted
from ..prediction import Tempered
from ..prediction.trunk_cache import IndexedExamples, cache_trunk
from ..quantized import is_packed, is_quantized
from ..training import BlobTrainingArguments, last_checkpoint
from ..training.arguments import CLASS_MEANS
from .automatic import left_open, resolved
from .checks import (
    check_head,
    check_rescaling,
    check_sharded,
    check_start,
    check_start_records,
    check_targets,
    check_task,
    check_validation,
    load_start,
    lora_of,
    task_name,
    template_of,
)
from .config import RunConfig, RunError
from .distance import distance_of, save_distance
from .folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    RUN_FILE,
    TASK_FILE,
    VALIDATION_FIGURE,
    RunFile,
    alone,
    check_writable,
    described,
    files_sha256,
    read_description,
    read_fields,
    records_sha256,
    write_run_file,
)
from .outcome import ExpectedTime, announce, held_out_metrics, unscaled_head, validation_problems
from .processes import on_cpu, processes
from .run import Run, base_model, load_run
from .seen import write_seen
from .selection import hold_out, select_for

_SCRATCH = ".data"
# torch's generators are global: trainings in threads take turns, or they would draw each other's noise.
_GENERATORS = threading.RLock()


def train(
    config: RunConfig,
    *,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    trust_remote_code: bool = False,
) -> Run:
    """Train a run, or go on with one that was stopped; a finished one is loaded.

    Records and what they are encoded to stay on the disk, in a hidden folder of the run while it is trained. Where
    several processes were started, each takes its share of every batch, and one of them writes. Under FSDP the run's
    model stays split, and all processes must predict with it together.

    Args:
        config: of the run.
        progress: show bars.
        callbacks: of the Trainer.
        trust_remote_code: run the Python code that the base model comes with, where it needs some. It isn't saved: who
            loads the run says so again.

    Raises:
        RunError: the folder holds a run of another configuration or of other records, another process trains in it, or
            it can't be written and its run isn't finished; or FSDP splits the model, and the method isn't for that.
        DataError, TaskError: the data can't be used; raised before the base model is loaded.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise RunError(f"output {quoted(config.output)}: is a file; give a folder")
    there = read_description(output, config, besides=left_open(config))
    finished = there is not None and bool(there.training)
    if not finished:
        check_writable(output / RUN_FILE)
        models.check_quantize(config.quantize)
    _check_sharded(config)
    main = processes().is_main_process
    with _elsewhere() if finished else _scratch(output) as scratch:
        stored = read_description(output, config, besides=left_open(config))
        source, options = config.data, config.reading_options()
        reader = source if isinstance(source, list) else datasets_.Reader(source, options, known=config.known())
        everything = _mapped(scratch / "records.arrow", partial(_read, reader))
        columns = {} if isinstance(reader, list) else reader.columns
        records = select_for(config, everything)
        given = config
        check_task(given, records)
        _check_same_records(output, stored, "training", digest := records_sha256(records))
        separate = _validation(given, scratch, columns)
        config = resolved(given, records, len(separate))
        read_description(output, config)
        description = replace(described(config), records_sha256=digest, columns=columns)
        method = config.build_method()
        kept, held_out = hold_out(config, method, records)
        validation = (separate or held_out) if config.validation else []
        if config.validation:
            check_validation(config, kept, validation, few=given.validation == "auto")
            description = replace(description, validation_sha256=records_sha256(validation))
        _check_same_records(output, stored, "validation", description.validation_sha256)
        if stored and stored.training:
            if main:
                _remove_leftovers(output, config)
            processes().wait_for_everyone()  # until nobody needs the folder
            return load_run(output, trust_remote_code=trust_remote_code)
        check_rescaling(config, kept, validation)
        tokenizer = models.load_tokenizer(config.model, trust_remote_code=trust_remote_code)
        if stored and stored.base:
            models.check_fingerprint(config.model, stored.base)
        description = replace(description, base=models.fingerprint(config.model))
        task_options = {name: value for name, value in config.task.items() if name != "name"}
        task_options |= template_of(config, tasks.TASKS[task_name(config, records)])
        task = tasks.build_task(config.task["name"], records, tokenizer, **task_options)
        check_head(config, task, trust_remote_code)
        check_targets(config, task, trust_remote_code)
        check_start(config, task)
        check_start_records(config, digest)
        if method.holdout and not len(held_out) and not len(validation):
            raise RunError(f"holdout {method.holdout} of {len(records)} records holds none out; give a larger share")
        encode = partial(tasks.encode_each, task, tokenizer=tokenizer, progress=progress)
        examples = _mapped(scratch / "examples.arrow", partial(encode, kept))
        arguments = _arguments(config, len(examples), progress)
        training = methods.Training(task, examples, arguments, patience=config.patience)
        if len(validation):
            with _named(f"validation {quoted(config.source('validation'))}"):
                encoded = _mapped(scratch / "validation.arrow", partial(encode, validation))
            training.validation = _longest_first(task, encoded)
            training.holdout = training.validation if method.holdout else ()
        elif len(held_out):
            training.holdout = _mapped(scratch / "holdout.arrow", partial(encode, held_out))
        if main:
            write_seen(output, chain(records, separate))
            write_run_file(output, description)
            write_text(output / CONFIG_FILE, yaml.safe_dump(given.given(), sort_keys=False, allow_unicode=True))
            announce(records, training, *_length(arguments, len(examples)), config, given)
        with _GENERATORS:
            run = _fit(config, method, training, tokenizer, progress, callbacks, trust_remote_code)
        if main:
            base = models.fingerprint(config.model) | description.base  # of the hub's more files may be here by now
            save_run(run, method, output, replace(description, base=base))
        processes().wait_for_everyone()
        return run


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    with suppress(
        OSError, StopIteration
    ):  # what getrusage says begins at the peak of the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _fit(
    config: RunConfig,
    method: methods.Method,
    training: methods.Training,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool,
    callbacks: Sequence[TrainerCallback],
    trust_remote_code: bool,
) -> Run:
    """Load the base model, and train it."""
    set_seed(config.seed)
    task = training.task
    start = lora_of(config)
    base = base_model(config, task, trust_remote_code)
    model = method.prepare(base, start or fresh_lora(config, task, base))
    if start is not None:
        load_start(model, config)
        training.trained = method.post_hoc
    if config.trunk_cache is not None:
        training = _above_trunk(model, training, Path(config.trunk_cache), progress)
    checkpoints = Path(config.output) / CHECKPOINTS
    bar, clock = _ProgressBar(checkpoints), _Clock(checkpoints)
    training.callbacks = [*callbacks, clock, ExpectedTime(clock.seconds), *([bar] if progress else [])]
    try:
        sampler = method.fit(model, training)
    finally:
        bar.close()  # before what is said of an interrupt or an error
    model.eval()
    seconds = clock.seconds()
    result: dict[str, Any] = {
        "seconds": seconds,
        "resumed_from": clock.resumed_from,
        "num_examples": len(training.examples),
        "peak_memory_bytes": peak_memory(),
        "final": training.logs[-1],
        "curve": [[log["step"], log["nll"]] for log in training.logs],
        **training.found,
    }
    if training.validated:
        evaluating = sum(validated.seconds for validated in training.validated)
        result["validation"] = {
            "num_examples": len(training.validation),
            "seconds": evaluating,
            "share_of_time": min(1.0, evaluating / seconds),
            "trainings": [asdict(validated) for validated in training.validated],
        }
    run = Run(model, tokenizer, task, sampler, config, method, result)
    if config.value("head") == CLASS_MEANS and processes().is_main_process:
        run.distance = distance_of(run, training)
    problems = training.problems
    said = len(problems)  # by the training
    if training.validated:
        problems += validation_problems(result)
    problems += unscaled_head(run)
    if len(training.validation) and task.kind != "generation":
        result["held_out"], found = held_out_metrics(run, training)
        problems += found
    if joined := training.join_held_out():
        result["class_means"] = joined
        if isinstance(sampler, Tempered):  # the temperature of the mean was that of the head before
            run.sampler = sampler.of_new_head()
            result["rescaling"] |= {name: scale for name, scale in run.scales.items() if name in result["rescaling"]}
    if problems:
        result["warnings"] = problems
    for problem in problems[said:] if processes().is_main_process else ():
        warnings.warn(problem, stacklevel=2)
    gather_(model)
    return run


def save_run(run: Run, method: methods.Method, output: Path, description: RunFile) -> None:
    """Write a trained run; its description last, which makes it a finished one."""
    method.save(run.model, run.sampler, output)
    write_json(output / TASK_FILE, run.task.to_dict())
    files = files_sha256(output, method)
    run.adapter_sha256 = files[method.weights_file(output).name]
    if run.distance is not None:
        save_distance(run, output)
    if "validation" in run.training:
        save_figure(lines_figure(_curves(run.training), "step", "NLL"), output / VALIDATION_FIGURE)
    write_run_file(output, replace(description, files=files, training=run.training))
    if not run.config.keep_checkpoints:
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)


def _curves(training: dict[str, Any]) -> dict[str, dict[float, float]]:
    """NLL by step: of the training, under its noise, and of validation, of each training of a method with several."""
    curves = {"training": dict(training["curve"])}
    for one in training["validation"]["trainings"]:
        name = f"validation {one['part']}, best at step {one['best_step']}".replace(" ,", ",")
        curves[name] = {row["step"]: row["nll"] for row in one["curve"]}
    return curves


def _validation(config: RunConfig, scratch: Path, columns: dict[str, str]) -> Any:
    """Records of validation that aren't a share of the training records; none where they are."""
    if (source := config.validation_data) is None:
        return []
    options, known = config.beside(columns)
    with _named(f"validation {quoted(config.source('validation'))}"):
        reader = source if isinstance(source, list) else datasets_.Reader(source, options, known=known)
        return _mapped(scratch / "validation_records.arrow", partial(_read, reader))


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Say of which records an error is."""
    try:
        yield
    except datasets_.DataError as error:
        raise datasets_.DataError([f"{source}: {problem}" for problem in error.problems]) from error
    except tasks.TaskError as error:
        raise tasks.TaskError(*(f"{source}: {problem}" for problem in error.problems)) from error


def _longest_first(task: tasks.Task, examples: datasets_.MappedRows) -> datasets_.MappedRows:
    """Examples in the order of their length, so that their batches hold little padding."""
    lengths = [task.length(example) for example in examples]
    return examples.select(sorted(range(len(lengths)), key=lambda i: -lengths[i]))


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder in the run's own, which no other process uses, for what is needed while it is trained.

    In /tmp it might be memory.
    """
    folder = output / _SCRATCH
    if not processes().is_main_process:
        yield folder
        return
    try:
        with alone(output, inside=True):
            try:
                folder.mkdir(exist_ok=True)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # something is in it
            output.rmdir()


def _remove_leftovers(output: Path, config: RunConfig) -> None:
    """Remove what a kill leaves of a run that is complete, where its folder can be written; the lock's file as well."""
    with suppress(OSError, RunError), alone(output, inside=True):
        for name in [_SCRATCH, *([] if config.keep_checkpoints else [CHECKPOINTS])]:
            shutil.rmtree(output / name, ignore_errors=True)


@contextmanager
def _elsewhere() -> Iterator[Path]:
    """The same outside of a folder that need not be writable any more; all processes of a run see the first's."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(broadcast_object_list([folder])[0])
        processes().wait_for_everyone()


def _mapped(file: Path, rows: Callable[[], Iterable[dict[str, Any]]]) -> datasets_.MappedRows:
    """Rows in a file that one process writes and all of them map."""
    if processes().is_main_process:
        datasets_.write_rows(file, rows())
    processes().wait_for_everyone()
    return datasets_.MappedRows(file)


def _read(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return map(read_fields, records)


def _check_sharded(config: RunConfig) -> None:
    """Raises a RunError for what can't be trained where FSDP splits the model over the processes."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if config.quantize != "none":
        raise RunError(f"quantize {config.quantize!r} isn't offered under FSDP; leave it out, or use DDP")
    check_sharded(config.build_method())
    if config.temperature_folds is not None:
        raise RunError(
            f"temperature_folds {config.temperature_folds} isn't offered under FSDP, which splits one model; give "
            "temperature_scaling with validation records, or use DDP"
        )
    if config.trunk_cache is not None:
        raise RunError(f"trunk_cache {quoted(config.trunk_cache)} isn't offered under FSDP; leave it out, or use DDP")


def _above_trunk(model: Any, training: methods.Training, folder: Path, progress: bool) -> methods.Training:
    """The same training, of which the blocks below the adapted ones are computed once."""
    with processes().main_process_first():
        every: Any = ConcatDataset([training.examples, training.validation])  # type: ignore[list-item]
        task, _ = cache_trunk(model, training.task, every, folder, progress=progress)
    validation = IndexedExamples(training.validation, len(training.examples))
    return replace(
        training,
        task=task,  # type: ignore[arg-type]  # it is as a task to the trainer
        examples=IndexedExamples(training.examples),
        validation=validation,
        holdout=validation if training.holdout else (),
    )


def fresh_lora(config: RunConfig, task: tasks.Task, base: Any) -> LoraConfig:
    """LoRA's configuration on a base model; a RunError where that has fewer blocks than are to be adapted."""
    options: dict[str, Any] = {"task_type": task.task_type}
    if fresh := models.fresh_layers(base):
        options["modules_to_save"] = sorted({*fresh, *(config.lora.get("modules_to_save") or ())})
    if config.top_blocks is not None:
        blocks = base.config.get_text_config().num_hidden_layers
        if config.top_blocks > blocks:
            raise RunError(f"top_blocks must be at most the model's {blocks} blocks, got {config.top_blocks}")
        options["layers_to_transform"] = [*range(blocks - config.top_blocks, blocks)]
    unknown_to_peft = config.top_blocks is not None or any(map(is_packed, base.modules()))
    if config.value("target_modules") == "all-linear" and unknown_to_peft:
        options["target_modules"] = _linear_layers(base)
    lora = config.build_lora(**options)
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if lora.target_modules is None and not lora.target_parameters and base.config.model_type not in known:
        ends = _linear_layers(base)
        in_blocks = rf".*\.\d+\.({'|'.join(map(re.escape, ends))})"
        # Of names, and not of an expression, PEFT takes those in the blocks that were chosen.
        lora.target_modules = in_blocks if lora.layers_to_transform is None else {*ends}  # type: ignore[assignment]
    return lora


def _linear_layers(base: Any) -> list[str]:
    """Names in their block of the linear layers of a model's blocks; a RunError where there is none."""
    ends = {
        name.partition(".")[2]  # behind the block's number
        for blocks in base.base_model.modules()
        if isinstance(blocks, nn.ModuleList)
        for name, module in blocks.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) or is_quantized(module)) and "." in name
    }
    if not ends:
        kind = base.config.model_type
        raise RunError(f"target_modules: none are known of a {kind}, whose blocks have no linear layers; name some")
    return sorted(ends)


def _arguments(config: RunConfig, num_examples: int, progress: bool) -> dict[str, Any]:
    """Of `BlobTrainingArguments`; they are built once to see that the Trainer takes them."""
    options = config.training_options()
    steps, _ = _length(options, num_examples)
    options |= config.validation_options(steps)
    options["logging_steps"] = max(1, min(options["logging_steps"], steps))
    options |= {
        "output_dir": str(Path(config.output) / CHECKPOINTS),
        "seed": config.seed,
        "use_cpu": on_cpu(),
        "dataloader_pin_memory": torch.cuda.is_available(),  # torch warns where there is nothing to pin for
        "disable_tqdm": not progress,
    }
    try:
        with _GENERATORS:  # it also sets up the devices anew, on which a training in another thread is
            BlobTrainingArguments(**options)
    except (TypeError, ValueError) as error:
        raise RunError(f"training: {error}") from error
    return options


def _length(arguments: dict[str, Any], num_examples: int) -> tuple[int, int]:
    """Steps of a training, and the examples of each."""
    batch = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
    batch *= processes().num_processes
    steps = arguments["max_steps"]
    return (steps if steps > 0 else math.ceil(num_examples / batch) * arguments["num_train_epochs"]), batch


def _seconds(file: Path) -> float:
    """What a checkpoint's clock says; 0 where that can't be read, for nothing else depends on it."""
    try:
        return float(read_json(file, RunError)["seconds"])
    except (RunError, KeyError, TypeError, ValueError):
        return 0.0


class _ProgressBar(ProgressCallback):
    """A bar on standard error that shows the last losses, and which part of several trainings this is."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__()
        self._checkpoints = checkpoints

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        super().on_train_begin(args, state, control, **options)
        if self.training_bar is not None:
            parts = Path(args.output_dir).relative_to(self._checkpoints).parts
            self.training_bar.set_description(", ".join(parts).replace("_", " "))

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """No second bar for each of the evaluations."""

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
        parts = [checkpoints, *sorted(checkpoints.glob("**/"))]
        files = [folder / self.FILE for part in parts if (folder := last_checkpoint(part))]
        seconds = {file: _seconds(file) for file in files}
        latest = max(seconds, key=seconds.__getitem__, default=None)
        self._before = seconds[latest] if latest else 0.0
        self._start = time.perf_counter()
        self.resumed_from = latest.parent.name if latest else None

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_json(folder / self.FILE, {"seconds": self.seconds()})


def _check_same_records(output: Path, stored: RunFile | None, which: str, digest: str | None) -> None:
    if stored and {"training": stored.records_sha256, "validation": stored.validation_sha256}[which] != digest:
        raise RunError(
            f"{output} holds a run whose {which} records were others: the data changed since, or others are given; "
            "choose another output, or restore the data"
        )

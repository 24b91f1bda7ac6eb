"""From a finished run to a folder that other programs read, and ``manifest.json``, which says what is in it."""

import copy
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .. import models, tasks
from ..adapter.storage import library_versions
from ..files import as_os_error, check_fields, file_sha256, read_hashed_json, write_hashed_json
from ..messages import quoted
from ..methods.method import MEAN, Draw
from ..models import DTYPES
from ..runs import PredictionOptions, Run, RunDescription, RunError, alone, check_writable, load_run, open_run
from .writers import beside, check_gguf, in_force, layers_of, name_labels, write_gguf, write_lora, write_merged

MANIFEST_FILE, FORMAT_VERSION = "manifest.json", 1
FORMATS = ("lora", "merged", "gguf")
TOKENIZER = "tokenizer"
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as its largest rank (``MaxLoRARanks`` in vllm/config/lora.py, 0.32.0)."""

_HEAD = (
    "the adapters carry a classification head (modules_to_save): PEFT loads it onto a model with config.json of this "
    "folder, which has the labels in the head's order, but servers of text completions have no place for it; use "
    "--format merged, or `bloblora serve`"
)
_BESIDE = (
    "the adapters have {} beside A and B: PEFT loads it, but servers such as vLLM do not; use --format merged for them"
)
_ON_HEAD = (
    "the adapters have a LoRA on the output head, which vLLM leaves out of the log-probabilities of a prompt (`echo`, "
    "`prompt_logprobs`; its issue 51594) and not out of those of what it writes: bloblora.client scores choices by the "
    "latter, other programs must too, or use --format merged"
)
_QUANTIZED = (
    "the adapters were trained on a base model quantized by {}: on another base model, also the same one unquantized, "
    "their answers differ; --format merged has the base model's dequantized weights"
)
_DEQUANTIZED = (
    "the model has the dequantized weights of the run's base model, quantized by {}, and is as large as an unquantized "
    "one; quantizing it again rounds the adapter's part away or changes it"
)
_TEMPERATURE = (
    "the run's temperature {} divides the logits of labels or choices, or multiplies the noise variance of values, "
    "which no weights of these files do: bloblora.client divides, other programs' probabilities lack it"
)


@dataclass(frozen=True)
class Manifest:
    """An export's description.

    Attributes:
        format: ``lora``, ``merged`` or ``gguf``.
        base_model: what the adapters belong to, as ``from_pretrained`` takes it.
        method: of the run.
        adapter_sha256: of the run's weights.
        num_samples: weight draws N that were asked for; 0 is the posterior mean.
        seed: of the draws.
        mean: the mean's name, or None where it isn't there.
        draws: names of the draws in order; a server must serve them by these. A file or folder has the same name.
        on_head: whether the adapters of ``lora`` have a part on the output head of a language model.
        temperature: T, by which a task's logits are divided; no weights hold it, and `bloblora.client` does it. It is
            that of the average over the draws, or where there are none of the mean.
        temperature_of_mean: T of the mean alone, or None where the mean isn't there.
        task: how records become prompts and answers, for `bloblora.tasks.task_from_dict`.
        commands: what to run in the export's folder, by program.
        warnings: what the files can't do.
        libraries: versions that made them.
        files: SHA-256 of each file, by its path in the folder.
    """

    format: str
    base_model: str
    method: str
    adapter_sha256: str | None
    num_samples: int
    seed: int
    mean: str | None
    draws: list[str]
    task: dict[str, Any]
    on_head: bool = False
    temperature: float = 1.0
    temperature_of_mean: float | None = None
    commands: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("temperature", "temperature_of_mean"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")

    def write(self, folder: Path) -> "Manifest":
        """Write it beside the files that it describes; returns it with their hashes."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = replace(self, files={path.relative_to(folder).as_posix(): file_sha256(path) for path in files})
        write_hashed_json(folder / MANIFEST_FILE, {"format_version": FORMAT_VERSION, **asdict(manifest)})
        return manifest


def export(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str = "lora",
    num_samples: int = 10,
    seed: int = 0,
    *,
    draw: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Manifest:
    """Write a run's mean and draws for other programs.

    Draw s is the function that draw s of `bloblora.predict` is for the same seed. A quantized base model is dequantized
    before a draw is merged into it, so that nothing is rounded again.

    Args:
        directory: folder of the run.
        output: folder to make; it appears when it is complete.
        format: ``lora``: a stock PEFT LoRA a draw; ``gguf``: llama.cpp's form of them; ``merged``: one whole model.
        num_samples: weight draws N of ``lora`` and ``gguf``; 0 is the mean alone.
        seed: of the draws.
        draw: which one to merge, counted from 0; default the mean.
        dtype: of the tensors of ``lora``; ``merged`` has its base's, ``gguf`` float32.
        trust_remote_code: run the Python code that the base model comes with, where it needs some; no run can ask for
            it.

    Returns:
        The manifest.

    Raises:
        RunError: the output isn't free, or the run can't be exported like this.
    """
    output = Path(output).resolve()
    _check_output(output)
    PredictionOptions(samples=num_samples, seed=seed)
    if format not in FORMATS:
        raise RunError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise RunError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if draw is not None and (draw < 0 or format != "merged"):
        raise RunError(f"draw must be 0 or more, and is for format 'merged'; got {draw} with {format!r}")
    if format == "merged":
        num_samples = 0 if draw is None else draw + 1
    description = open_run(directory)
    _check_run(description, format, num_samples)
    run = load_run(description, dequantized=format == "merged", trust_remote_code=trust_remote_code)
    base = models.resolve(run.config.model)
    with _appearing(output) as folder:
        if format == "merged":
            written = _write_merged(run, folder, draw, seed)
        else:
            written = _write_adapters(run, folder, format, num_samples, seed, DTYPES[dtype], base)
        warnings = written.setdefault("warnings", [])
        of_files = models.quantization(run.config.model, trust_remote_code=trust_remote_code)
        if (kind := of_files or run.config.quantize) != "none":
            warnings.append((_DEQUANTIZED if format == "merged" else _QUANTIZED).format(kind))
        if run.task.head_note:
            warnings.append(run.task.head_note)
        of_mean = run.scales.get("temperature_of_mean", 1.0)
        temperature = run.scales.get("temperature", 1.0) if num_samples else of_mean
        if (temperature, of_mean) != (1, 1):
            alone = f" ({of_mean:.4g} for the mean alone)" if num_samples and written["mean"] else ""
            warnings.append(_TEMPERATURE.format(f"{temperature:.4g}{alone}"))
        manifest = Manifest(
            format=format,
            base_model=base,
            method=run.method.name,
            adapter_sha256=run.adapter_sha256,
            num_samples=num_samples,
            seed=seed,
            task=run.task.to_dict(),
            temperature=temperature,
            temperature_of_mean=of_mean if written["mean"] else None,
            libraries=library_versions(),
            **written,
        )
        return manifest.write(folder)


def read_manifest(directory: str | os.PathLike[str], *, check_files: str | None = None) -> Manifest:
    """The manifest of an export's folder.

    Args:
        directory: the folder.
        check_files: also compare the SHA-256 of files whose paths match a pattern, which reads them; ``*`` for all.

    Raises:
        RunError: there is none, another version wrote it, or a file is missing or altered.
    """
    file = Path(directory) / MANIFEST_FILE
    content = read_hashed_json(file, RunError)
    if (found := content.pop("format_version", None)) != FORMAT_VERSION:
        raise RunError(f"{file}: format_version is {quoted(found)}; this bloblora reads {FORMAT_VERSION}")
    check_fields(content, Manifest, file, RunError)
    try:
        manifest = Manifest(**content)
        tasks.task_from_dict(manifest.task)
    except ValueError as error:
        raise RunError(f"{file}: not what `bloblora export` writes: {error}") from error
    for name, expected in manifest.files.items():
        if check_files is None or not fnmatchcase(name, check_files):
            continue
        if not (path := file.parent / name).is_file() or file_sha256(path) != expected:
            raise RunError(f"{path}: missing, or its SHA-256 isn't the one in {MANIFEST_FILE}; export again")
    return manifest


def _check_output(output: Path) -> None:
    check_writable(output.with_name(f".{output.name}.check"))
    with alone(output):  # the lock that a kill left beside a whole export goes
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise RunError(f"{output}: is a file or a folder that isn't empty; choose another output")


def _check_run(description: RunDescription, format: str, num_samples: int) -> None:
    """Raise a RunError for what can be known before the model is loaded."""
    description.method.check_draws(num_samples)
    if num_samples and (posterior := description.posterior) and posterior.factors == "none":
        raise RunError(
            "the Gaussian is over the classification head alone, and the mean over its draws is no adapter; export its "
            "mean (--samples 0, or --format merged without --draw), or train with --factors A"
        )
    if format != "merged" and description.method.whole_model:
        raise RunError("method 'full' changes all weights and has no adapter; use --format merged")
    if format == "gguf":
        check_gguf(description)


def _write_adapters(
    run: Run, folder: Path, format: str, num_samples: int, seed: int, dtype: torch.dtype, base: str
) -> dict[str, Any]:
    """The mean and the draws; returns what the manifest says of them."""
    model = run.model
    assert isinstance(model, PeftModel)
    draws = run.method.draws(model, run.sampler, num_samples, seed)
    for draw in draws:
        with in_force(model, draw):
            if format == "gguf":
                write_gguf(folder / f"{draw.name}.gguf", model, draw.adapter_name)
            else:
                write_lora(folder / draw.name, model, draw.adapter_name, dtype)
    with as_os_error(folder):
        run.tokenizer.save_pretrained(folder / TOKENIZER)
    mean, *names = [draw.name for draw in draws]
    if format == "gguf":
        commands = {"llama.cpp": f"llama-server --model BASE.gguf --lora {[mean, *names][-1]}.gguf"}
    else:
        rank = max(layer.r[draw.adapter_name] for layer in layers_of(model, draw.adapter_name).values())
        commands = {"vllm": _vllm_command(base, [mean, *names], rank)}
    plain: Any = model.get_base_model()
    head = plain.get_output_embeddings()
    on_head = format == "lora" and any(layer is head for layer in layers_of(model, draw.adapter_name).values())
    warnings = []
    if run.task.head is not None:
        config: Any = copy.deepcopy(model.get_base_model().config)
        name_labels(config, run)
        config.save_pretrained(folder)
        warnings = [_HEAD]
    elif extra := beside(run.config.build_lora()):
        warnings = [_BESIDE.format(", ".join(extra))]
    commands = {} if warnings else commands
    warnings += [_ON_HEAD] if on_head else []
    return {"mean": mean, "draws": names, "on_head": on_head, "commands": commands, "warnings": warnings}


def _write_merged(run: Run, folder: Path, number: int | None, seed: int) -> dict[str, Any]:
    """One draw, or the mean; returns what the manifest says of it."""
    draws = [Draw(MEAN, ""), Draw("draw_00", "")]  # of a model without adapters
    count = 0 if number is None else number + 1
    if isinstance(run.model, PeftModel):
        draws = run.method.draws(run.model, run.sampler, count, seed)
    if len(draws) <= count:
        raise RunError(f"draw must be below {len(draws) - 1}, the functions that the run has; got {number}")
    draw = draws[count]
    write_merged(run, draw, folder)
    commands = {} if run.task.head is not None else {"vllm": f"vllm serve . --served-model-name {draw.name}"}
    drawn = number is not None
    return {"mean": None if drawn else MEAN, "draws": [draw.name] if drawn else [], "commands": commands}


def _vllm_command(base: str, names: list[str], rank: int) -> str:
    """To be run in the export's folder."""
    largest = next((allowed for allowed in _VLLM_RANKS if allowed >= rank), rank)
    loras = " ".join(f"{name}={name}" for name in names)
    model = shlex.quote(base)
    return f"vllm serve {model} --enable-lora --max-loras {len(names)} --max-lora-rank {largest} --lora-modules {loras}"


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``output`` if the block ends without error; a RunError where another fills it."""
    partial = output.with_name(f".{output.name}.partial")
    with alone(output):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            os.replace(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

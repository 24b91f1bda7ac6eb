"""What the evidence lower bound needs beside transformers' TrainingArguments."""

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args

from transformers import TrainingArguments

from ..checks import check_choice, check_count, check_positive

KlWeighting = Literal["uniform", "reweighted"]
OptimizerStyle = Literal["joint", "paper", "paper_flow"]
Head = Literal["auto", "trained", "class_means"]
AUTO, TRAINED, CLASS_MEANS = get_args(Head)
_MOST_FOR_CLASS_MEANS = 10_000  # of which every step uses all; with so many nothing was measured


@dataclass(kw_only=True)
class Objective:
    """How the negative evidence lower bound is minimized; fields of `BlobTrainingArguments` and options of methods.

    transformers' ``HfArgumentParser`` reads the fields as well: what it finds in ``metadata`` it hands to argparse, and
    only where None is one of the types are ``auto`` and a number both read as they are meant.
    """

    searched: ClassVar[Mapping[str, tuple[float, float]]] = {
        "kl_scale": (0.0001, 1.0),
        "head_kl_scale": (0.1, 3.0),
        "kl_learning_rate": (0.063, 0.63),
    }

    kl_weighting: KlWeighting = field(
        default="uniform",
        metadata={
            "help": "Weight of the KL in a step: `uniform` is the ELBO's, 1/D. `reweighted` is the paper's: most of it "
            "late in a pass, whose weights sum to 1, so that the KL counts as often as a batch has examples."
        },
    )
    kl_scale: float | str | None = field(
        default="auto",
        metadata={
            "help": "Multiplies the KL: the temperature of the posterior, and the knob between accuracy and "
            "calibration. 1 is the ELBO; lower trusts the data more. `auto`: 0.1 under a head that is trained from "
            "nothing; where the base model's own outputs are trained 0.4 D / P with D examples and P Gaussian "
            "weights, and at most 0.1.",
        },
    )
    head_kl_scale: float | str | None = field(
        default="auto",
        metadata={
            "help": "Multiplies the KL of a head whose weights are Gaussian (`head_prior_std`); 1 is the ELBO's. "
            "`auto`: D / 240 with D examples, and at most 1.",
        },
    )
    dataset_rescaling: bool = field(
        default=False,
        metadata={"help": "Take the number of batches of a pass from the paper's pseudo data size 100·D^(π/γ)."},
    )
    gamma: float = field(default=8.0, metadata={"help": "γ of the data set rescaling; larger makes the KL weigh more."})
    optimizer_style: OptimizerStyle = field(
        default="joint",
        metadata={
            "help": "`joint`: one AdamW step on NLL and KL together, which converges to the ELBO's optimum. `paper`: "
            "AdamW on the NLL, then one SGD step on the KL; `paper_flow`: the same with the KL's exact gradient flow, "
            "which can't overshoot. Where these two end depends on the learning rates and on the number of steps."
        },
    )
    kl_learning_rate: float = field(
        default=0.2,
        metadata={
            "help": "Learning rate on the KL (`paper`, `paper_flow`); follows the same schedule. Higher makes Ω larger "
            "and M smaller.",
        },
    )
    std_learning_rate: float | str | None = field(
        default="auto",
        metadata={
            "help": "Learning rate of Ω's parameter (`joint`); follows the same schedule. Of Ω = exp ρ it is a share: "
            "at 0.02 a step changes Ω by about a fiftieth. `auto` is 0.02, and below 800 steps, in which that would "
            "not bring Ω to the ELBO's optimum, 16 / steps. None: learning_rate."
        },
    )
    num_weight_draws: int = field(
        default=1, metadata={"help": "Weight draws averaged in a training step; cost and memory grow with it."}
    )

    def check(self) -> None:
        """Raise a ValueError where a field is out of its range; a number that is a text becomes a number."""
        check_choice("kl_weighting", self.kl_weighting, KlWeighting)
        check_choice("optimizer_style", self.optimizer_style, OptimizerStyle)
        for name in ("kl_scale", "head_kl_scale", "std_learning_rate", "kl_learning_rate", "gamma"):
            with suppress(TypeError, ValueError):  # a search of the Trainer's makes numbers the type of what was before
                setattr(self, name, float(getattr(self, name)))
        check_positive(self, "kl_learning_rate", or_zero=True)
        check_positive(self, "kl_scale", or_zero=True, or_word="auto")
        check_positive(self, "head_kl_scale", or_zero=True, or_word="auto")
        if self.std_learning_rate is not None:
            check_positive(self, "std_learning_rate", or_word="auto")
        check_count("num_weight_draws", self.num_weight_draws, 1)
        check_positive(self, "gamma")


@dataclass
class BlobTrainingArguments(Objective, TrainingArguments):
    r"""Arguments of `BlobTrainer`.

    One step minimizes, per example,

    .. math:: \frac{1}{b}\sum_{k=1}^{b} \mathrm{NLL}_k + \frac sD\,\mathrm{KL}(q\|p)

    with b the examples of an optimizer step over all processes, D those of a pass and s = ``kl_scale``. With s = 1 that
    is the negative ELBO. Where ``kl_weighting`` is ``reweighted``, λ_i of `kl_weight` stands for 1/D.

    ``max_grad_norm`` clips the gradients of A, B and a head together, as in a plain LoRA: one bad batch would throw a
    mean that isn't clipped far off. It doesn't clip those of Ω, whose NLL part is larger the larger the gradients are:
    clipped where it is large, it would lose against the KL, and Ω would become too wide.

    Raises:
        ValueError: a field is out of its range.
    """

    dataset_size: int | None = field(
        default=None,
        metadata={
            "help": "Training examples D; needed where the data set is a stream without a length. Without a task the "
            "NLL is the model's own loss: where that is a mean over tokens, D counts the label tokens."
        },
    )
    eval_num_samples: int = field(
        default=0, metadata={"help": "Weight draws averaged in the Trainer's evaluation; 0 is the posterior mean."}
    )
    head: str = field(
        default=AUTO,
        metadata={
            "help": "How a classification head is made: `trained`, or `class_means`: not trained, but the linear "
            "discriminant of what it reads of the training records, with the means of the classes; in training each "
            "record is compared with means that leave itself out. For texts that get one label each. `auto`: "
            "`class_means` under a Gaussian over an adapter that starts from nothing, where the base model brings no "
            "head, one device holds the model, and there are at most 10,000 records; otherwise `trained`. `bloblora "
            "train` trains the head also where `head_prior_std` is given, or `factors` is `none`."
        },
    )
    temperature_scaling: bool = field(
        default=True,
        metadata={
            "help": "After the training fit a temperature on `eval_dataset`, of 10 examples or more, by which "
            "predictions of the posterior divide their logits (`bloblora.set_temperature`). Of several evaluation data "
            "sets it is the one that `metric_for_best_model` names, or all together."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "As in TrainingArguments; off, since a loss that is not finite stops the training anyway."},
    )

    def __post_init__(self) -> None:
        self.check()
        check_count("eval_num_samples", self.eval_num_samples, 0)
        check_choice("head", self.head, Head)
        if self.dataset_size is not None:
            check_count("dataset_size", self.dataset_size, 1)
        super().__post_init__()


def automatic_kl_scale(num_examples: float, num_weights: int, head: bool) -> float:
    r"""The ``kl_scale`` for D examples and P Gaussian weights: 0.1 under a fresh head, otherwise 0.4 D / P up to 0.1.

    At the optimum a weight of which the data say more than the prior has :math:`\Omega^2 = s / (D h)`, with h the
    NLL's mean curvature over the examples. Its noise then costs :math:`h\Omega^2/2 = s/(2D)` nats an example, and that
    of all P weights s P / (2D). At s = 0.1 that is more than any NLL can pay where a few hundred examples have a
    million weights, so that B shrinks until the noise does no harm. A head learns all the same, and less by heart.
    Without one, B is all that learns: 0.4 D / P lets the noise cost 0.2 nats.
    """
    return 0.1 if head else min(0.4 * num_examples / num_weights, 0.1)


def automatic_head_kl_scale(num_examples: float) -> float:
    r"""The ``head_kl_scale`` for D examples: D / 240, and at most 1.

    Early in training the head improves the NLL only a little, while its noise costs several nats an example (v/2 at
    the prior, `bloblora.tasks.Likelihood.noise_cost`). Reducing that noise raises the KL term by KL / D. With few
    examples this costs more than it gains, so both would stay as they are at the start.
    """
    return min(num_examples / 240, 1.0)


def automatic_std_learning_rate(steps: int) -> float:
    """The rate of log Ω for a training of this many steps: 16 / steps, at least 0.02 and at most 0.3.

    A linear schedule lets log Ω move by half of 16. From σp/40 to the prior it has ln 40 = 3.7 to go, and Adam's steps
    are shorter than the rate where a gradient's sign changes. On the referee's problem (tests/training/test_referee.py)
    8 to 64 / steps end equally near the optimum, from 100 steps to 2,000; below 0.02 small batches arrive late.
    """
    return min(max(16 / steps, 0.02), 0.3)


def automatic_head(counts: Collection[int]) -> str:
    """The ``head`` for so many training records of each label, of which class means compare one with others."""
    return CLASS_MEANS if max(counts, default=0) > 1 and sum(counts) <= _MOST_FOR_CLASS_MEANS else TRAINED


OBJECTIVE = tuple(option.name for option in fields(Objective))
"""Names of the objective's options."""


def check_style(optimizer_style: str, std_parameterization: str) -> None:
    """Raise a ValueError where a posterior of this parameterization can't be trained in this style."""
    if optimizer_style == "paper_flow" and std_parameterization != "square":
        raise ValueError("optimizer_style 'paper_flow' needs std_parameterization 'square'; use 'joint' or 'paper'")


def kl_weight(position: int, num_batches: int, weighting: str) -> float:
    r"""Share λ_i of the KL that mini-batch ``position`` (1..K) of a pass of K takes; over a pass they sum to 1.

    ``uniform``: 1/K. ``reweighted``: :math:`2^{i-1} / (2^K - 1)`, computed in log space (2^K overflows a float from
    K = 1024 on). The paper (arXiv 2406.11675, section 3.3) prints 2^i, with which a pass would count the KL twice.
    """
    if weighting == "uniform":
        return 1 / num_batches
    return math.exp((position - 1 - num_batches) * math.log(2) - math.log1p(-(2.0**-num_batches)))


def rescaled_dataset_size(size: float, gamma: float = 8.0) -> float:
    r"""The paper's pseudo data size :math:`\hat D = 100\, D^{\pi/\gamma}` (arXiv 2406.11675, appendix)."""
    return 100 * size ** (math.pi / gamma)

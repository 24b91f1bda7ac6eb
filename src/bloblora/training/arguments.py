"""TrainingArguments plus what the ELBO needs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from .kl_weights import KL_WEIGHTINGS

OPTIMIZER_STYLES = ("flow", "alternating", "joint")


def check_style(optimizer_style: str, std_parameterization: str) -> None:
    """Raise a ValueError where a posterior of this parameterization can't be trained in this style."""
    if optimizer_style == "flow" and std_parameterization != "square":
        raise ValueError("optimizer_style 'flow' needs std_parameterization 'square'; use 'joint' or 'alternating'")


@dataclass
class BlobTrainingArguments(TrainingArguments):
    r"""Arguments of `BlobTrainer`.

    One step minimizes, per example,

    .. math:: \frac{1}{b}\sum_{k=1}^{b} \mathrm{NLL}_k + s\,\lambda_i \frac{K}{D}\,\mathrm{KL}(q\|p)

    with b the examples of an optimizer step over all processes, D those of a pass and K its steps, λ_i from
    `kl_weight`, s = ``kl_scale``. With ``uniform`` and s = 1 the weight is 1/D: the ELBO itself.

    Raises:
        ValueError: a field is out of its range.
    """

    kl_weighting: str = field(
        default="uniform",
        metadata={"help": "How the KL is spread over a pass: `uniform`, or `reweighted` (the paper's: late batches)."},
    )
    kl_scale: float = field(
        default=1.0,
        metadata={"help": "Multiplies the KL. 1 is the ELBO; lower trusts the data more (a cold posterior)."},
    )
    dataset_rescaling: bool = field(
        default=False,
        metadata={"help": "Take the number of batches of a pass from the paper's pseudo data size 100·D^(π/γ)."},
    )
    gamma: float = field(default=8.0, metadata={"help": "γ of the data set rescaling; larger makes the KL weigh more."})
    dataset_size: int | None = field(
        default=None,
        metadata={
            "help": "Training examples D; needed where the data set is a stream without a length. Without a task the "
            "NLL is the model's own loss: where that is a mean over tokens, D counts the label tokens."
        },
    )
    optimizer_style: str = field(
        default="flow",
        metadata={
            "help": "`flow`: AdamW on the NLL, then the exact gradient flow of the weighted KL, which can't overshoot. "
            "`alternating` (the paper's): the same with one SGD step on the KL. `joint`: one AdamW step on the sum."
        },
    )
    kl_learning_rate: float = field(
        default=0.2,
        metadata={
            "help": "Learning rate on the KL (`flow`, `alternating`); follows the same schedule. The knob between "
            "accuracy and calibration: higher makes Ω larger and M smaller."
        },
    )
    num_weight_draws: int = field(
        default=1,
        metadata={"help": "Weight draws averaged in a training step; cost and memory grow with it."},
    )
    eval_num_samples: int = field(
        default=0,
        metadata={"help": "Weight draws averaged in the Trainer's evaluation; 0 is the posterior mean."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "As in TrainingArguments; off, since a loss that is not finite stops the training anyway."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "As in TrainingArguments; off, since a task's columns are no model arguments."},
    )

    def __post_init__(self) -> None:
        self.check({option.name: getattr(self, option.name) for option in fields(BlobTrainingArguments)})
        # Otherwise the data's order hangs on whichever seed torch was given last, and that differs between processes.
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        super().__post_init__()

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise a ValueError where one of these options, by name, is out of its range; others aren't looked at."""
        for name, choices in (("kl_weighting", KL_WEIGHTINGS), ("optimizer_style", OPTIMIZER_STYLES)):
            if name in options and (value := options[name]) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("kl_scale", "kl_learning_rate"):
            value = options.get(name, 0)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        for name, minimum in (("num_weight_draws", 1), ("eval_num_samples", 0), ("dataset_size", 1)):
            value = options.get(name, minimum)
            if not (isinstance(value, int) and value >= minimum) and not (name == "dataset_size" and value is None):
                raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
        gamma = options.get("gamma", 1)
        if not (isinstance(gamma, (int, float)) and math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma must be a finite number above 0, got {gamma!r}")

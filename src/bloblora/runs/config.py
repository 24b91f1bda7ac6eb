"""What decides a training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .. import models
from ..adapter import BlobConfig
from ..training import BlobTrainingArguments


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
        normalization: how ``choice_text`` scores a choice: mean of its tokens' log-probabilities (``length``), which
            favours no short choice and is less sure before training, or their ``sum``.
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
    normalization: Literal["sum", "length"] = "length"
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

"""What decides a training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from .. import methods, models


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
        method: ``blob`` trains a Gaussian over LoRA's A, ``lora`` a point; `bloblora methods` lists the others.
        start_from: folder of a LoRA to start from, a run's or one that PEFT saved, with the same base model, rank and
            α. ``tfb``, ``laplace`` and ``laplace-last`` leave it as it is and put their Gaussian around it; other
            methods go on training it.
        task: ``classification``, ``choice_text``, ``choice_letter``, ``blank``, ``generation``, or ``auto`` by the
            data's form.
        labels: the outputs of the head of ``classification``, in order; default: the labels of the data, sorted. For a
            head that is there (``start_from``), and for a label that the data lack.
        normalization: how ``choice_text`` scores a choice: mean of its tokens' log-probabilities (``length``), which
            favours no short choice and is less sure before training, or their ``sum``.
        limit: use only this many training records, chosen by ``limit_seed``; per label for classification.
        limit_seed: which records ``limit`` takes.
        steps: optimizer steps.
        batch_size: examples an optimizer step.
        group_by_length: put examples of like length in a batch, which spares padding; their order stays random.
        learning_rate: of the optimizer, after warm-up; falls linearly to 0. Default: the method's, for LoRA 5e-4.
        max_grad_norm: a longer gradient is scaled down to it; 0 leaves all as they are.
        warmup_ratio: share of the steps in which the learning rate rises.
        seed: of initialization, data order and noise.
        rank: r of LoRA.
        alpha: α of LoRA; the update is scaled by α/r.
        dropout: LoRA's dropout; default 0, for mc-dropout 0.1.
        targets: names of the layers to adapt; default: PEFT's choice for the model (q_proj and v_proj for Llama).
        top_blocks: adapt layers in the last so many blocks only; default: in all.
        trunk_cache: folder that keeps what the blocks below the adapted ones make of the training examples, which then
            are computed once and not at every step. One folder serves many runs.
        dtype: of the base model: float32, bfloat16 or float16. The adapter is float32.
        gradient_checkpointing: trade time for memory.
        prior: family of the prior: ``normal``, ``laplace``, ``student_t``, ``scale_mixture`` or ``learned_normal``
            (blob and its kin).
        prior_std: σp of the prior (blob and its kin, map, scalabl). What matters most of a method's options: try 0.05
            where the base model can answer, 0.4 below a new head (docs/choosing.md).
        init_std: ε, where Ω starts (blob and its kin, scalabl).
        std_parameterization: ``square`` or ``softplus`` (blob and its kin).
        estimator: ``independent``, ``flipout``, ``shared`` or ``local`` (blob and its kin).
        kl_scale: factor of the KL; 1 is the ELBO (blob and its kin).
        kl_weighting: ``uniform`` or ``reweighted`` (blob and its kin).
        dataset_rescaling: the paper's pseudo data size (blob and its kin).
        optimizer_style: ``flow`` (AdamW on the NLL, exact gradient flow of the KL), ``alternating`` (SGD on the KL, as
            in the paper) or ``joint`` (blob and its kin).
        kl_learning_rate: on the KL: higher for better calibration, lower for accuracy (flow and alternating, scalabl).
        num_weight_draws: weight draws a step (blob and its kin).
        members: how many models (ensemble).
        distill_steps: steps of the student's training (distilled).
        tolerance: relative rise of the NLL that noise may cause (tfb).
        prior_precision: δ; default: the one with the largest marginal likelihood, or with ``holdout`` the lowest NLL on
            held-out records (laplace and laplace-last).
        effective_sample_size: λ; larger is a narrower posterior (ivon).
        hess_init: h at the start (ivon).
        weight_decay: δ, the prior's precision over λ (ivon).
        clip_radius: largest step of an entry (ivon).
        holdout: share of the training records that is kept for what is fitted after training (temperature,
            laplace, laplace-last).
        temperature_scaling: fit a temperature on held-out records, on top of whatever method.
        save_steps: steps between checkpoints.
        keep_checkpoints: leave ``checkpoints/`` when the training is done.
    """

    data: str
    output: str
    model: str = models.DEFAULT_MODEL
    method: str = "blob"
    start_from: str | None = None
    task: Literal["auto", "classification", "choice_text", "choice_letter", "blank", "generation"] = "auto"
    labels: list[str] | None = None
    normalization: Literal["sum", "length"] = "length"
    limit: int | None = None
    limit_seed: int = 0
    steps: int = 500
    batch_size: int = 16
    group_by_length: bool = True
    learning_rate: float | None = None
    max_grad_norm: float = 1.0
    warmup_ratio: float = 0.06
    seed: int = 0
    rank: int = 8
    alpha: int = 16
    dropout: float | None = None
    targets: list[str] | None = None
    top_blocks: int | None = None
    trunk_cache: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    prior: str | None = None
    prior_std: float | None = None
    init_std: float | None = None
    std_parameterization: Literal["square", "softplus"] | None = None
    estimator: Literal["independent", "flipout", "shared", "local"] | None = None
    kl_scale: float | None = None
    kl_weighting: Literal["uniform", "reweighted"] | None = None
    dataset_rescaling: bool | None = None
    optimizer_style: Literal["flow", "alternating", "joint"] | None = None
    kl_learning_rate: float | None = None
    num_weight_draws: int | None = None
    members: int | None = None
    distill_steps: int | None = None
    tolerance: float | None = None
    prior_precision: float | None = None
    effective_sample_size: float | None = None
    hess_init: float | None = None
    weight_decay: float | None = None
    clip_radius: float | None = None
    holdout: float | None = None
    temperature_scaling: bool = False
    save_steps: int = 100
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        problems = [problem for name, values in self._ranges().items() if (problem := values(name))]
        problems += [f"{name} must not be empty" for name in ("data", "output", "model") if not getattr(self, name)]
        if self.targets == []:
            problems.append("targets must name at least one layer, or be left out")
        if self.labels is not None and not 2 <= len(self.labels) == len(set(self.labels)):
            problems.append(f"labels must be at least 2, all different, got {self.labels}")
        try:
            if self.trunk_cache is not None and (self.top_blocks is None or self.build_method().holdout):
                problems.append("trunk_cache needs top_blocks, and a method that trains on all records")
            if self.start_from is not None and not self.build_method().starts_from_lora:
                problems.append(f"start_from isn't for method {self.build_method().name!r}")
            self.build_method()
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
        share = check(lambda value: 0 <= value < 1, "in [0, 1)")
        seed = check(lambda value: 0 <= value < 2**32, "in 0..2^32 - 1")
        return {
            **dict.fromkeys(("steps", "batch_size", "rank", "save_steps"), count),
            "alpha": positive,
            "max_grad_norm": check(lambda value: value >= 0, "a finite number of at least 0"),
            "warmup_ratio": share,
            **dict.fromkeys(("seed", "limit_seed"), seed),
            **{
                name: check
                for name, check in (
                    ("limit", count),
                    ("top_blocks", count),
                    ("learning_rate", positive),
                    ("dropout", share),
                )
                if getattr(self, name) is not None
            },
        }

    def build_method(self) -> methods.Method:
        """The method with its options.

        Raises:
            RunError: an option that the method doesn't have.
            ValueError: one that is out of its range.
        """
        if self.method not in methods.METHODS:
            raise RunError(f"method {self.method!r} is not one of {', '.join(methods.METHODS)}")
        kind = methods.METHODS[self.method]
        scaled = self.temperature_scaling and kind is not methods.Temperature
        given = {name for name in _METHOD_OPTIONS if getattr(self, name) is not None}
        taken = given & kind.options().keys()
        elsewhere = {"dropout", "holdout"} if scaled else {"dropout"}  # what LoRA and the scaling take
        if unknown := sorted(given - taken - elsewhere):
            known = ", ".join(sorted(_METHOD_OPTIONS & kind.options().keys())) or "none of its own"
            raise RunError(f"method {self.method!r} has no option {', '.join(unknown)}; its options: {known}")
        method = kind(**{name: getattr(self, name) for name in taken})
        if not scaled:
            return method
        return methods.Temperature(inner=method, **({} if self.holdout is None else {"holdout": self.holdout}))


_METHOD_OPTIONS = {option.name for option in fields(TrainConfig)} & {
    name for kind in methods.METHODS.values() for name in kind.options()
}

"""What a user chooses about the posterior."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..posterior import ESTIMATORS, PRIORS, STD_PARAMETERIZATIONS

FACTORS = ("A", "B", "AB")


@dataclass(frozen=True)
class BlobConfig:
    """Configuration of the Gaussian over LoRA's A (or B, or both).

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and the range.
    """

    prior_std: float = field(
        default=0.2,
        metadata={
            "help": "Standard deviation σp of the prior, whatever its family (`learned_normal` has its own). Larger "
            "allows more uncertainty and pulls the mean less; smaller keeps the posterior closer to a point, and the "
            "adapter to the base model. Try 0.05 where the base model can answer, 0.4 below a new head "
            "(docs/choosing.md)."
        },
    )
    init_std: float = field(
        default=0.05,
        metadata={
            "help": "ε: Ω starts between ε²/2 and ε². Raise it when the posterior does not leave its start within the "
            "steps that you can afford; lower it when the first steps diverge."
        },
    )
    std_parameterization: str = field(
        default="square",
        metadata={"help": "How Ω is kept positive: `square` is Ω = G∘G (the paper's), `softplus` Ω = log(1 + exp ρ)."},
    )
    estimator: str = field(
        default="independent",
        metadata={
            "help": "How the noise of a training step is drawn: `independent` (per example), `flipout` (the "
            "paper's: shared noise, signs per example), `shared` (one draw a batch), `local` (activations, per token)."
        },
    )

    factors: str = field(
        default="A",
        metadata={
            "help": "Which factors of LoRA are Gaussian: `A` (the paper's: B stays a point), `B`, or `AB`. The others "
            "are for comparison: noise in B is not held back by a B that starts at 0."
        },
    )
    prior: str = field(
        default="normal",
        metadata={
            "help": "Family of the prior on each entry: `normal` (the paper's), `laplace`, `student_t`, "
            "`scale_mixture` (spike and slab), or `learned_normal` (empirical Bayes: σp of each layer follows the "
            "posterior). See `bloblora.posterior.priors`."
        },
    )

    def __post_init__(self) -> None:
        for name in ("prior_std", "init_std"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
                raise ValueError(f"BlobConfig.{name} must be a finite number above 0, got {value!r}")
        for name, choices in (
            ("prior", PRIORS),
            ("std_parameterization", STD_PARAMETERIZATIONS),
            ("estimator", ESTIMATORS),
            ("factors", FACTORS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"BlobConfig.{name} must be one of {', '.join(choices)}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)

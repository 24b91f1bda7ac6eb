"""What a user chooses about the posterior."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..posterior import ESTIMATORS, STD_PARAMETERIZATIONS


@dataclass(frozen=True)
class BlobConfig:
    """Configuration of the Gaussian over LoRA's A.

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and the range.
    """

    prior_std: float = field(
        default=0.2,
        metadata={
            "help": "Standard deviation σp of the prior N(0, σp²) on each entry of A. Larger allows more uncertainty "
            "and pulls the mean less; smaller keeps the posterior closer to a point."
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

    def __post_init__(self) -> None:
        for name in ("prior_std", "init_std"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
                raise ValueError(f"BlobConfig.{name} must be a finite number above 0, got {value!r}")
        for name, choices in (("std_parameterization", STD_PARAMETERIZATIONS), ("estimator", ESTIMATORS)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"BlobConfig.{name} must be one of {', '.join(choices)}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)

"""What a user chooses about the posterior."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_type_hints

from ..checks import check_choice
from ..files import is_finite
from ..posterior import PER_EXAMPLE, Prior, build_prior

_STD_UNDER_HEAD, _STD = 0.4, 0.1


@dataclass(kw_only=True)
class BlobConfig:
    """Configuration of the Gaussian over LoRA's A (or B, or both), or over a classification head.

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and the range.
    """

    prior_std: float | Literal["auto", "start"] = field(
        default="auto",
        metadata={
            "help": "Standard deviation σp of the prior, whatever its family (`learned_normal` has its own). Wider is "
            "stronger noise in training, and a slower A. `auto`: 0.4 under a head that is trained from "
            "nothing, which memorizes few records soon, and 0.1 where the base model's own outputs are trained. "
            "`start`: for each layer the root mean square of A at the start, with PEFT's default start 1/√(3n) for n "
            "inputs, so that wider models have narrower priors; for B 1/√(3r).",
            "search": (0.05, 1.0),
        },
    )
    prior_mean: Literal["auto", "zero", "start"] = field(
        default="auto",
        metadata={
            "help": "Mean of the prior: `zero`, or `start`: the adapter's own weights when it became Bayesian, so that "
            "the KL doesn't charge the random start of A. `auto`: `start` where LoRA's start holds a part of the base "
            "weight (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), so that A = 0 isn't the base model; otherwise `zero`."
        },
    )
    init_std: float | None = field(
        default=None,
        metadata={
            "help": "Ω starts between half of it and it; None: a fortieth of the prior's width, so that the first "
            "steps are a plain LoRA's. Where training converges it doesn't matter."
        },
    )
    std_parameterization: Literal["log", "softplus", "square"] = field(
        default="log",
        metadata={
            "help": "How Ω is kept positive: `log` is Ω = exp ρ, of which a step of std_learning_rate is a share of Ω, "
            "whatever its size; `softplus` Ω = log(1 + exp ρ), `square` Ω = G∘G (the paper's)."
        },
    )
    estimator: Literal["independent", "flipout", "shared", "local"] = field(
        default="independent",
        metadata={
            "help": "How the noise of a training step is drawn: `independent` (per example), `flipout` (the "
            "paper's: shared noise, signs per example), `shared` (one draw a batch), `local` (activations, per token)."
        },
    )
    std_gradient: Literal["auto", "reparameterization", "fisher"] = field(
        default="auto",
        metadata={
            "help": "How the gradient of Ω is estimated: `reparameterization` (the paper's), the noise times the "
            "gradient, which has no bias; or `fisher`, from the squares of each example's gradient (VOGN), which has "
            "little noise and needs a draw an example: estimator `independent` or `flipout`. `auto` is `fisher` where "
            "there are such draws and the answers are classes or labels, and `reparameterization` elsewhere."
        },
    )
    factors: Literal["auto", "A", "B", "AB", "none"] = field(
        default="auto",
        metadata={
            "help": "Which factors of LoRA are Gaussian: `A` (the paper's: B stays a point), `B`, `AB`, or `none`, "
            "with which the head alone is. `auto`: `none` under a Gaussian head, beside which a Gaussian over A gains "
            "nothing and costs N forward passes, and otherwise `A`. `B` and `AB` are for comparison: noise in B is not "
            "held back by a B that starts at 0."
        },
    )
    head_prior_std: float | Literal["auto", "none"] = field(
        default="none",
        metadata={
            "help": "Standard deviation of the prior over the weights of a classification head that is trained with "
            "the adapter, which are then Gaussian too. `none`: the head is no Gaussian. `auto`: √(2/d) for d inputs "
            "(VBLL, arXiv 2404.11599) where texts get one label each; otherwise `none`.",
            "search": (0.01, 0.3),
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
    prior_kwargs: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Shape parameters of the prior: `degrees_of_freedom` of `student_t`; `slab_weight` and "
            "`spike_ratio` of `scale_mixture`; `num_pairs` of those whose KL is estimated."
        },
    )

    def __post_init__(self) -> None:
        for name, words in (("prior_std", ("auto", "start")), ("init_std", ()), ("head_prior_std", ("auto", "none"))):
            value = getattr(self, name)
            if value in words or (name, value) == ("init_std", None):
                continue
            if not (is_finite(value) and value > 0):
                known = f"; the only words are {' and '.join(map(repr, words))}" if words else ""
                raise ValueError(f"BlobConfig.{name} must be a finite number above 0, got {value!r}{known}")
        self.build_prior()
        hints = get_type_hints(type(self))
        for name in ("prior_mean", "std_parameterization", "estimator", "std_gradient", "factors"):
            check_choice(f"BlobConfig.{name}", getattr(self, name), hints[name])

        if self.std_gradient == "fisher" and self.estimator not in PER_EXAMPLE:
            raise ValueError(
                f"BlobConfig.std_gradient 'fisher' needs a draw for each example, got estimator {self.estimator!r}; "
                f"use one of {', '.join(PER_EXAMPLE)}, or 'reparameterization'"
            )

    def fisher(self, expects_labels: bool) -> bool:
        """Whether Ω's gradient is estimated from squares, which may or may not be of labels that the model expects."""
        automatic = self.std_gradient == "auto" and expects_labels and self.estimator in PER_EXAMPLE
        return automatic or self.std_gradient == "fisher"

    @property
    def gaussian_factors(self) -> tuple[str, ...]:
        """The letters of ``factors``, when `resolved`."""
        return () if self.factors == "none" else tuple(self.factors)

    def resolved(self, head: bool, head_inputs: int | None) -> "BlobConfig":
        """The configuration with numbers where it says ``auto``.

        Args:
            head: whether one is trained from nothing.
            head_inputs: d of a head whose weights can be Gaussian.
        """
        found: dict[str, Any] = {}
        if self.prior_std == "auto":
            found["prior_std"] = _STD_UNDER_HEAD if head else _STD
        if self.head_prior_std == "auto":
            found["head_prior_std"] = math.sqrt(2 / head_inputs) if head_inputs else "none"
        if self.factors == "auto":
            width = found.get("head_prior_std", self.head_prior_std)
            found["factors"] = "A" if width == "none" else "none"
        return replace(self, **found)

    def start_std(self, width: float) -> float:
        """The largest Ω at the start, under a prior of this standard deviation."""
        return width / 40 if self.init_std is None else self.init_std

    def build_prior(self) -> Prior:
        """The prior of one entry; with ``start`` its family, to be scaled to each layer's width."""
        std = Prior.prior_std if isinstance(self.prior_std, str) else self.prior_std
        return build_prior(self.prior, std, self.prior_kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)

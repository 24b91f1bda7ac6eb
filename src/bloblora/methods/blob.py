r"""BLoB (Wang et al., arXiv 2406.11675): a Gaussian over A, B a point, trained on the evidence lower bound.

.. math:: \min_{B, M, \Omega}\ \mathbb E_{A \sim \mathcal N(M, \Omega^2)}[\mathrm{NLL}] + \lambda\,\mathrm{KL}(q\|p)

The posterior is `bloblora.adapter.BlobConfig`'s, the objective `bloblora.training.BlobTrainingArguments`'; the defaults
are theirs, and docs/method.md says where they differ from the paper's, which are ``--preset paper``.
"""

from dataclasses import dataclass
from typing import ClassVar

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ..adapter import BlobConfig, bayesianize
from ..prediction import Sampler
from ..training import BlobTrainingArguments, Objective, check_style
from .gaussian import GaussianMethod, posterior_draws
from .method import Training

_OBJECTIVE = (
    "kl_scale",
    "kl_weighting",
    "dataset_rescaling",
    "optimizer_style",
    "kl_learning_rate",
    "num_weight_draws",
)


@dataclass(frozen=True, kw_only=True)
class Blob(GaussianMethod):
    """A Gaussian over A; the options are those of `BlobConfig` and `BlobTrainingArguments`."""

    prior: str = BlobConfig.prior
    prior_std: float = BlobConfig.prior_std
    init_std: float = BlobConfig.init_std
    std_parameterization: str = BlobConfig.std_parameterization
    estimator: str = BlobConfig.estimator
    kl_scale: float = BlobTrainingArguments.kl_scale
    kl_weighting: str = BlobTrainingArguments.kl_weighting
    dataset_rescaling: bool = BlobTrainingArguments.dataset_rescaling
    optimizer_style: str = BlobTrainingArguments.optimizer_style
    kl_learning_rate: float = BlobTrainingArguments.kl_learning_rate
    num_weight_draws: int = BlobTrainingArguments.num_weight_draws

    name = "blob"
    paper = "2406.11675"
    factors: ClassVar[str] = "A"

    def __post_init__(self) -> None:
        self.config()
        Objective(**{name: getattr(self, name) for name in _OBJECTIVE}).check()
        check_style(self.optimizer_style, self.std_parameterization)

    def config(self) -> BlobConfig:
        """The posterior's configuration."""
        return BlobConfig(
            prior=self.prior,
            prior_std=self.prior_std,
            init_std=self.init_std,
            std_parameterization=self.std_parameterization,
            estimator=self.estimator,
            factors=self.factors,
        )

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with a LoRA of which the factors are Gaussian."""
        model = super().prepare(base, lora)
        bayesianize(model, self.config())  # type: ignore[arg-type]
        return model

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train on the evidence lower bound."""
        training.run(model, **{name: getattr(self, name) for name in _OBJECTIVE})
        return posterior_draws(model)

r"""BLoB (Wang et al., arXiv 2406.11675): a Gaussian over A, B a point, trained on the evidence lower bound.

.. math:: \min_{B, M, \Omega}\ \mathbb E_{A \sim \mathcal N(M, \Omega^2)}[\mathrm{NLL}] + \lambda\,\mathrm{KL}(q\|p)

The posterior is `bloblora.adapter.BlobConfig`'s, the objective `bloblora.training.BlobTrainingArguments`'; the defaults
are theirs, and docs/method.md says where they differ from the paper's, which are ``--preset paper``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from .. import adapter
from ..adapter import AdapterFileError, BlobConfig, bayesianize, check_folder, find_posterior
from ..adapter.storage import BLOB_CONFIG
from ..prediction import Sampler, WeightDraws
from ..training import BlobTrainingArguments
from .method import Method, Training

_OBJECTIVE = (
    "kl_scale",
    "kl_weighting",
    "dataset_rescaling",
    "optimizer_style",
    "kl_learning_rate",
    "num_weight_draws",
)


@dataclass(frozen=True, kw_only=True)
class Blob(Method):
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
        BlobTrainingArguments.check({name: getattr(self, name) for name in _OBJECTIVE})
        if self.optimizer_style == "flow" and self.std_parameterization != "square":
            raise ValueError("optimizer_style 'flow' needs std_parameterization 'square'; use 'joint' or 'alternating'")

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
        return WeightDraws(posterior_of(model))

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The adapter with its posterior."""
        return load_posterior_adapter(base, folder)

    def weights_file(self, folder: Path) -> Path:
        """The mean's file."""
        return posterior_weights_file(folder)


def posterior_of(model: nn.Module) -> adapter.Posterior:
    """The posterior of a model that has one."""
    posterior = find_posterior(model)
    assert posterior is not None
    return posterior


def load_posterior_adapter(base: PreTrainedModel, folder: Path) -> tuple[PeftModel, Sampler]:
    """`Method.load` of methods that end in a Gaussian over LoRA's factors."""
    model = adapter.load(base, folder)
    return model, WeightDraws(posterior_of(model))


def posterior_weights_file(folder: Path) -> Path:
    """`Method.weights_file` of those methods."""
    checked = check_folder(folder)
    if not (checked / BLOB_CONFIG).is_file():
        raise AdapterFileError(f"{folder}: the posterior's files are missing; without them this is a plain LoRA")
    return checked / adapter.storage.MEAN_FILE

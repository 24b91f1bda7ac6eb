r"""BLoB (Wang et al., arXiv 2406.11675): a Gaussian trained on the evidence lower bound, over A, while B is a point.

.. math:: \min_{B, M, \Omega}\ \mathbb E_{A \sim \mathcal N(M, \Omega^2)}[\mathrm{NLL}] + \lambda\,\mathrm{KL}(q\|p)

In a run the default under a head that gives one label is one of class means (`bloblora.training.class_means`), which
isn't trained; under a trained one it is a Gaussian over the head in place of A (`bloblora.adapter.head`). The options
are those of the posterior, `bloblora.adapter.BlobConfig`, and of the objective, `bloblora.training.Objective`;
docs/methods/blob.md says where the defaults differ from the paper's, which are ``--preset paper``. Three more presets
are comparisons of the paper, section 3.1: ``blob-b`` and ``blob-symmetric`` are this recipe with the Gaussian over B or
over both, and ``bbb`` is Bayes by Backprop (arXiv 1505.05424).
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ..adapter import BlobConfig, bayesianize
from ..prediction import Sampler
from ..training import OBJECTIVE, Objective, check_style
from .method import GaussianMethod, Training, posterior_draws


@dataclass(kw_only=True)
class BlobOptions(BlobConfig, Objective):
    """The options of a posterior and of its training; a run, which knows its records, decides about a Gaussian head."""

    head_prior_std: float | Literal["auto", "none"] = field(
        default="auto",
        metadata={
            "help": "Standard deviation of the prior over the weights of a classification head that is trained with "
            "the adapter, which are then Gaussian too. `none`: the head is no Gaussian. `auto`: √(2/d) for d inputs "
            "(VBLL, arXiv 2404.11599) where texts get one label each and their head is trained (`head`) on 200 records "
            "or more; otherwise `none`, which is better below.",
            "search": (0.01, 0.3),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        check_style(self.optimizer_style, self.std_parameterization)

    def idle(self, labels: bool) -> set[str]:
        """Options that `bloblora tune` may search, without a part in this training.

        Args:
            labels: whether a head gives one label each, so that it can be Gaussian.
        """
        over_head = labels and self.head_prior_std != "none"
        over_adapter = self.factors != "none" and not (over_head and self.factors == "auto")
        found = set() if over_head else {"head_prior_std", "head_kl_scale"}
        found |= set() if over_adapter else {"prior_std", "kl_scale"}
        return found | ({"kl_learning_rate"} if self.optimizer_style == "joint" else set())

    def posterior_config(self) -> BlobConfig:
        """Those of the posterior."""
        return BlobConfig(**{option.name: getattr(self, option.name) for option in fields(BlobConfig)})

    def objective(self) -> dict[str, Any]:
        """Those of the training, by name."""
        return {name: getattr(self, name) for name in OBJECTIVE}


@dataclass(kw_only=True)
class Blob(BlobOptions, GaussianMethod):
    """A Gaussian over a classification head, over A, over B, or over both."""

    name = "blob"
    paper = "2406.11675"
    takes_prior = True
    sharded = True

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with a LoRA of which the factors are Gaussian."""
        model = super().prepare(base, lora)
        bayesianize(model, self.posterior_config())  # type: ignore[arg-type]
        return model

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train on the evidence lower bound."""
        training.run(model, **self.objective())
        return posterior_draws(model)

r"""ScalaBL (Samplawski et al., arXiv 2506.21408): a Gaussian over r scales between B and A, and nothing else.

.. math:: \Delta W = s\,B\,\mathrm{diag}(z)\,A, \qquad z \sim \mathcal N(\mu, \sigma^2), \qquad p(z) = \mathcal N(0, 1)

A starts as the right singular vectors of LoRA's start and μ as its singular values; A and B stay points. The weight of
the KL against a batch's mean NLL is the published code's (SRI-CSL/BayesAdapt, as BLoB's): of each M steps the i-th has

.. math:: \lambda_i = \frac{2^i}{2^{M+1} - 2}, \qquad M = \lfloor 100\, D^{\pi/8} / b \rfloor,

1 for M steps together, nearly all of it in the last few, at a learning rate of 0.2 that follows the schedule. D are the
examples, b those of a step. So the KL weighs 1/M a step in the mean, where the bound on all D examples has 1/D.

The KL goes by its gradient flow, as BLoB's does with `paper_flow`. Two differences from that code: its KL has the
arguments swapped, KL(p‖q), ours is the bound's; and its draw is one a batch, ours one an example.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import adapter
from .. import posterior as q
from ..adapter.batch import Batch, follow, is_routed
from ..checks import check_choice, check_positive
from ..prediction import Sampler, WeightDraws
from ..training import BlobTrainer
from ..training.arguments import KlWeighting, kl_weight, rescaled_dataset_size
from .method import Training, read_state, write_state
from .scaled_a import ScaledA, ScaledMethod

_PARAMETERS = ("scalabl_mean", "scalabl_std_parameter")
_STATE = "scalabl"


@dataclass(kw_only=True)
class Scalabl(ScaledMethod):
    """A Gaussian over r scales a layer."""

    prior_std: float = field(
        default=1.0, metadata={"help": "σp of the prior N(0, σp²) on each scale.", "search": (0.3, 3.0)}
    )
    init_std: float = field(
        default=0.04,
        metadata={
            "help": "σ starts between half of it and it; 0.04 is about where the authors' settings start it.",
            "search": (0.004, 0.4),
        },
    )
    kl_learning_rate: float = field(default=0.2, metadata={"help": "Learning rate on the KL.", "search": (0.063, 0.63)})
    kl_weighting: KlWeighting = field(
        default="reweighted",
        metadata={
            "help": "How the KL is spread over M = 100·D^(π/8)/b steps: `reweighted` (the authors': on the last, so "
            "that a training of fewer steps hardly has a KL), or `uniform`."
        },
    )

    name = "scalabl"
    paper = "2506.21408"
    starts_from_lora = False
    files = (*ScaledMethod.files, f"{_STATE}.json")

    def __post_init__(self) -> None:
        check_positive(self, "prior_std", "init_std")
        check_positive(self, "kl_learning_rate", or_zero=True)
        check_choice("kl_weighting", self.kl_weighting, KlWeighting)

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with a LoRA that has scales."""
        model = super().prepare(base, lora)
        batch = follow(base)
        for name, layer in _layers(model).items():
            layer.lora_variant["default"] = _ScaledVariant(layer, self.init_std, batch, is_routed(name))
        return model

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train on the evidence lower bound; then the means become part of A."""
        prior_std, weighting = self.prior_std, self.kl_weighting

        class Trainer(BlobTrainer):
            def current_kl_weight(self, head: bool = False) -> float:
                batch = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
                period = max(1, int(rescaled_dataset_size(len(training.examples)) / batch))
                return kl_weight(self.state.global_step % period + 1, period, weighting)

            def kl_step(self) -> None:
                rate = self.args.kl_learning_rate * self._get_learning_rate() / self.args.learning_rate
                layers: list[Any] = [*_layers(model).values()]
                means, parameters = ([getattr(layer, name)["default"] for layer in layers] for name in _PARAMETERS)
                q.kl_flow_(means, parameters, prior_std, rate * self.current_kl_weight())

        training.run(model, trainer=Trainer, kl_learning_rate=self.kl_learning_rate)
        return WeightDraws(ScaledRows(model, _fold(model)))

    def save(self, model: nn.Module, sampler: Sampler, folder: Path) -> None:
        """Write the mean as a stock LoRA, and σ/μ of each layer's rows."""
        assert isinstance(sampler, WeightDraws)
        assert isinstance(sampler.weights, ScaledRows)
        super().save(model, sampler, folder)
        write_state(folder, _STATE, {}, sampler.weights.ratios)

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The mean, and its rows' noise."""
        model = adapter.load(base, folder, checked=True)
        return model, WeightDraws(ScaledRows(model, read_state(folder, _STATE)[1]))


class _ScaledVariant(LoraVariant):
    """y = W₀x + s·B (z∘(A x)), z one draw an example in train mode, μ in eval mode; one layer's, one adapter's."""

    def __init__(self, module: Any, init_std: float, batch: Batch, routed: bool) -> None:
        self.batch, self.routed = batch, routed
        a = module.lora_A["default"].weight
        _, singular_values, vt = torch.linalg.svd(a.detach(), full_matrices=False)
        with torch.no_grad():
            a.copy_(vt)
        parameter = nn.Parameter(q.init_std_parameter(singular_values, init_std, "square"))
        module.scalabl_mean = nn.ParameterDict({"default": nn.Parameter(singular_values)})
        module.scalabl_std_parameter = nn.ParameterDict({"default": parameter})
        module.adapter_layer_names = (*module.adapter_layer_names, *_PARAMETERS)

    def project(self, module: Any, adapter_name: str, x: Tensor) -> Tensor:
        """z∘(A x), (b, ..., r)."""
        h = module.lora_A[adapter_name](module.lora_dropout[adapter_name](x))
        scales = module.scalabl_mean[adapter_name]
        if module.training:
            noise = self.batch.noise(h, self.routed, len(scales))
            scales = scales + noise.to(scales) * q.std(module.scalabl_std_parameter[adapter_name], "square")
        return h * scales

    def expand(self, module: Any, adapter_name: str, h: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        b = module.lora_B[adapter_name]
        return nn.functional.linear(h, b.weight[rows], None if b.bias is None else b.bias[rows])

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        h = self.project(module, active_adapter, x.to(module.lora_A[active_adapter].weight.dtype))
        return result + (self.expand(module, active_adapter, h) * module.scaling[active_adapter]).to(result.dtype)


class ScaledRows(ScaledA):
    """The distribution over A of all layers: row i is multiplied by 1 + (σᵢ/μᵢ) ε."""

    def __init__(self, model: nn.Module, ratios: dict[str, Tensor]) -> None:
        super().__init__(model)
        self.ratios = ratios

    def spread(self) -> list[Tensor]:
        """σ/μ of each layer."""
        return [*self.ratios.values()]

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Multiply σ by a factor above 0, in place."""
        for ratio in self.ratios.values():
            ratio.mul_(factor)

    def scale(self, layer: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        """1 + (σ/μ) ε, (r, 1)."""
        noise = torch.randn(weight.shape[0], generator=generator, device=generator.device).to(weight)
        return (1 + self.ratios[layer].to(weight) * noise)[:, None]


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _fold(model: nn.Module) -> dict[str, Tensor]:
    """Make it a stock LoRA of the mean, and return σ/μ of each layer by its name, (r,)."""
    ratios = {}
    layer: Any
    for name, layer in _layers(model).items():
        mean, std = layer.scalabl_mean["default"], q.std(layer.scalabl_std_parameter["default"], "square")
        layer.lora_A["default"].weight.mul_(mean[:, None])
        ratios[name] = std / mean
        del layer.lora_variant["default"], layer.scalabl_mean, layer.scalabl_std_parameter
        layer.adapter_layer_names = tuple(n for n in layer.adapter_layer_names if n not in _PARAMETERS)
    return ratios

r"""Monte Carlo dropout (Gal & Ghahramani, arXiv 1506.02142): dropout as a distribution over A's columns.

.. math:: A_s = A\,\mathrm{diag}(z_s)/(1-p), \qquad z_{sj} \sim \mathrm{Bernoulli}(1-p)

Training drops LoRA's inputs afresh for every token, as PEFT does. A draw at prediction fixes one mask a layer, so that
it is one function of the input, for a whole sequence (Gal & Ghahramani, arXiv 1512.05287). p = 0.1 is the BLoB paper's.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import adapter
from ..prediction import Sampler, WeightDraws
from .method import Method, Training
from .scaled_a import ScaledA


@dataclass(frozen=True, kw_only=True)
class McDropout(Method):
    """Dropout that stays on.

    Args:
        dropout: probability p of dropping an input of A.
    """

    dropout: float = 0.1

    name = "mc-dropout"
    paper = "1506.02142"

    def __post_init__(self) -> None:
        if not 0 < self.dropout < 1:
            raise ValueError(f"dropout must be in (0, 1), got {self.dropout}")

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with a LoRA that has dropout."""
        return super().prepare(base, replace(lora, lora_dropout=self.dropout))

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train with dropout."""
        training.run(model)
        return WeightDraws(DroppedColumns(model, self.dropout))

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The LoRA, and its masks' distribution."""
        model = adapter.load(base, folder)
        return model, WeightDraws(DroppedColumns(model, self.dropout))


class DroppedColumns(ScaledA):
    """The distribution over A of all layers that dropout makes: one mask a layer."""

    def __init__(self, model: nn.Module, probability: float) -> None:
        super().__init__(model)
        self.probability = probability

    def scale(self, layer: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        """z / (1 - p), (n,)."""
        kept = torch.rand(weight.shape[-1], generator=generator, device=generator.device) >= self.probability
        return kept.to(weight) / (1 - self.probability)

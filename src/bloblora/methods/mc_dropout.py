r"""Monte Carlo dropout (Gal & Ghahramani, arXiv 1506.02142): dropout as a distribution over A's columns.

.. math:: A_s = A\,\mathrm{diag}(z_s)/(1-p), \qquad z_{sj} \sim \mathrm{Bernoulli}(1-p)

Training drops LoRA's inputs afresh for every token, as PEFT does. A draw at prediction fixes one mask a layer, so that
it is one function of the input, for a whole sequence (Gal & Ghahramani, arXiv 1512.05287). p = 0.1 is the BLoB paper's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..prediction import Sampler, WeightDraws
from .method import Training
from .scaled_a import ScaledA, ScaledMethod


class McDropout(ScaledMethod):
    """Dropout that stays on; p is LoRA's ``lora_dropout``."""

    name = "mc-dropout"
    paper = "1506.02142"
    lora_defaults: ClassVar[Mapping[str, Any]] = {"lora_dropout": 0.1}

    def check_run(self, lora: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        """Raises: there is no dropout."""
        if not lora["lora_dropout"] > 0:
            raise ValueError(f"lora_dropout must be in (0, 1) for method 'mc-dropout', got {lora['lora_dropout']}")

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train with dropout."""
        training.run(model)
        return _draws(model)

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The LoRA, and its masks' distribution."""
        model, _ = super().load(base, folder)
        return model, _draws(model)


class DroppedColumns(ScaledA):
    """The distribution over A of all layers that dropout makes: one mask a layer."""

    def __init__(self, model: nn.Module, probability: float) -> None:
        super().__init__(model)
        self.probability = probability

    def scale(self, layer: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        """z / (1 - p), (n,)."""
        kept = torch.rand(weight.shape[-1], generator=generator, device=generator.device) >= self.probability
        return kept.to(weight) / (1 - self.probability)


def _draws(model: Any) -> WeightDraws:
    return WeightDraws(DroppedColumns(model, model.active_peft_config.lora_dropout))

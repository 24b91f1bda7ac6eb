"""Distributions over weights that multiply A by noise: what dropout and ScalaBL draw from."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapter.bayesianize import Weights
from ..contexts import changed, replaced
from ..prediction import Sampler, WeightDraws
from .method import Method


class ScaledA(ABC):
    """The active adapter's A of every layer, times a factor that a draw decides."""

    def __init__(self, model: nn.Module) -> None:
        self._factors: dict[str, Any] = {
            name: module.lora_A[adapter]
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
            for adapter in module.active_adapters
            if adapter in module.lora_A
        }

    @abstractmethod
    def scale(self, layer: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        """The factor of one layer's A (r, n): (n,) for its columns, (r, 1) for its rows."""

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A (r, n) of each layer in the next draw: one factor a layer."""
        weights = {name: factor.weight.detach() for name, factor in self._factors.items()}
        return {name: weight * self.scale(name, weight, generator) for name, weight in weights.items()}

    def draw(self, seed: torch.Generator) -> AbstractContextManager[None]:
        """The next draw is in force inside, in this context alone."""
        weights = self.sample(seed)
        return replaced(
            {
                factor: changed(factor, _parameters=factor._parameters | {"weight": weights[name]})
                for name, factor in self._factors.items()
            }
        )

    def mean(self) -> AbstractContextManager[None]:
        """A itself."""
        return nullcontext()


class ScaledMethod(Method):
    """A method whose draws multiply A by noise."""

    def draw_weights(self, model: PeftModel, sampler: Sampler, generator: torch.Generator) -> Weights:
        """A of every layer."""
        assert isinstance(sampler, WeightDraws)
        assert isinstance(sampler.weights, ScaledA)
        return {name: {"A": weight} for name, weight in sampler.weights.sample(generator).items()}

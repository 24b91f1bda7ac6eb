"""Distributions over weights that multiply A by noise: what dropout and ScalaBL draw from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapter.bayesianize import Weights
from ..adapter.variant import mean_of
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

    @contextmanager
    def draw(self, seed: torch.Generator) -> Iterator[None]:
        """One factor a layer."""
        before = {name: factor.weight for name, factor in self._factors.items()}
        try:
            for name, factor in self._factors.items():
                scaled = factor.weight.detach() * self.scale(name, factor.weight, seed)
                factor.weight = nn.Parameter(scaled, requires_grad=False)
            yield
        finally:
            for name, factor in self._factors.items():
                factor.weight = before[name]

    def mean(self) -> AbstractContextManager[None]:
        """A itself."""
        return nullcontext()


class ScaledMethod(Method):
    """A method whose draws multiply A by noise."""

    def draw_weights(self, model: PeftModel, sampler: Sampler, generator: torch.Generator) -> Weights:
        """A of every layer."""
        assert isinstance(sampler, WeightDraws)
        with sampler.weights.draw(generator):
            return {
                name: {"A": mean_of(layer, model.active_adapter, "A").clone()}
                for name, layer in model.named_modules()
                if isinstance(layer, LoraLayer)
            }

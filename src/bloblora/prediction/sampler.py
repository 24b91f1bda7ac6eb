"""Where draws come from: all that prediction needs to know of a method."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Forward = Callable[[], Tensor]
"""The model on one batch: logits (b, C), a function of the weights that are in force."""


class Sampler(Protocol):
    """A distribution over functions, of which a batch sees N."""

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits (b, C) of each of N draws; of the one best guess with ``num_samples`` 0.

        Draw s of a seed is one function: it depends neither on the batch nor on how many draws follow. A method with
        fewer functions than N yields those that it has.
        """
        ...


class WeightDistribution(Protocol):
    """A distribution over weights, such as `bloblora.adapter.Posterior`."""

    def draw(self, seed: torch.Generator) -> AbstractContextManager[None]:
        """The next draw of the weights is in force inside."""
        ...

    def mean(self) -> AbstractContextManager[None]:
        """The best guess of the weights is in force inside."""
        ...


class Point:
    """One function: a model as it is."""

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of the model, whatever N."""
        yield forward()


@dataclass(frozen=True)
class WeightDraws:
    """A forward under each draw of the weights."""

    weights: WeightDistribution

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of N draws, or of the mean."""
        generator = torch.Generator().manual_seed(seed)
        contexts = (self.weights.draw(generator) for _ in range(num_samples)) if num_samples else [self.weights.mean()]
        for context in contexts:
            with context:
                yield forward()


@dataclass(frozen=True)
class Tempered:
    """Another sampler's logits divided by a temperature (Guo et al., arXiv 1706.04599)."""

    sampler: Sampler
    temperature: float

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of each draw over T."""
        for logits in self.sampler.logits(forward, num_samples, seed):
            yield logits / self.temperature

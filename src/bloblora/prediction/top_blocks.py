"""Draws in the top blocks alone: an approximation whose lower blocks are computed once."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from ..adapter import Posterior
from ..adapter.bayesianize import Weights
from .trunk import block_of


@dataclass(frozen=True)
class TopBlocks:
    """A posterior of which only the layers in the last blocks are drawn; the others have their mean.

    ``predict(model, inputs, sampler=WeightDraws(TopBlocks(posterior, 8)))`` computes the blocks below once. A draw of a
    seed has, where it differs from the mean, the weights of the posterior's own draw.

    Attributes:
        posterior: of a model whose blocks stand in one `torch.nn.ModuleList`.
        number: blocks that are drawn, counted from the top.

    Raises:
        ValueError: ``number`` is below 1, or no Bayesian layer stands in a block.
    """

    posterior: Posterior
    number: int

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"number must be 1 or more blocks, got {self.number}")
        if not any(block_of(self.posterior.model, name) for name in self.posterior.layer_names()):
            raise ValueError("posterior: none of its layers stands in a block (torch.nn.ModuleList) of the model")

    def layer_names(self) -> list[str]:
        """The layers that are drawn: those in the top blocks, and those outside of blocks."""
        model, names = self.posterior.model, []
        for name in self.posterior.layer_names():
            place = block_of(model, name)
            if place is None or place[1] >= len(list(model.get_submodule(place[0]).children())) - self.number:
                names.append(name)
        return names

    def sample(self, generator: torch.Generator) -> Weights:
        """The next draw's weights in the top blocks."""
        weights = self.posterior.sample(generator)
        return {name: weights[name] for name in self.layer_names()}

    def mirror(self, weights: Weights) -> Weights:
        """As the posterior's."""
        return self.posterior.mirror(weights)

    def fixed(self, weights: Weights) -> AbstractContextManager[None]:
        """As the posterior's."""
        return self.posterior.fixed(weights)

    def stacked(self, samples: Sequence[Weights], rows: int) -> AbstractContextManager[None]:
        """As the posterior's."""
        return self.posterior.stacked(samples, rows)

    @contextmanager
    def draw(self, seed: torch.Generator) -> Iterator[None]:
        """The next draw is in force inside."""
        with self.posterior.fixed(self.sample(seed)):
            yield

    def mean(self) -> AbstractContextManager[None]:
        """The posterior's mean."""
        return self.posterior.mean()

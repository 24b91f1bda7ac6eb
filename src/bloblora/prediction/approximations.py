"""Fewer forwards at some loss: draws in the top blocks alone, a linearized predictive, an early stop."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy.special import stdtrit
from torch import Tensor

from ..adapter import Posterior
from ..adapter.bayesianize import Weights, parts_of
from ..adapter.head import GaussianHead
from .forward import BatchForward, block_of
from .sampler import Forward, Sampler, WeightDraws


@dataclass(frozen=True)
class StoppingRule:
    r"""Stop for an input when the average of N draws would have the same answer and nearly the same confidence.

    With S of N draws made, of mean :math:`\bar x_S` and standard deviation :math:`\hat\sigma_S`, the mean of N normal
    draws is, by Student's t with S − 1 degrees of freedom,

    .. math:: \bar x_N \in \bar x_S \pm t_{1-\alpha/2L,\,S-1}\ \hat\sigma_S \sqrt{1/S - 1/N}

    but for a share :math:`\alpha/L` of the inputs, so but for α over all L looks before N (Bonferroni). x is once the
    margin of the best class over the second, whose interval must not hold 0, and once the probability of the best,
    whose interval must be no wider than ± ``tolerance``.

    For mirrored draws choose even looks. What is odd about the mean cancels in a pair but widens the interval, so
    where that is the larger part of a draw's effect the rule errs less than stated (a test measures it).

    Args:
        error: α, the share of inputs whose answer may be another than with all N draws.
        tolerance: how far the confidence may be from that with all N draws.
        looks: numbers of draws after which to look, each 2 or more and rising.

    Raises:
        ValueError: an argument is out of its range.
    """

    error: float = 0.05
    tolerance: float = 0.05
    looks: tuple[int, ...] = (2, 3, 4, 6)

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise ValueError(f"error must be in (0, 1), got {self.error}")
        if not 0 < self.tolerance <= 1:
            raise ValueError(f"tolerance must be in (0, 1], got {self.tolerance}")
        if not self.looks or self.looks[0] < 2 or sorted(set(self.looks)) != list(self.looks):
            raise ValueError(f"looks must be rising numbers of draws, 2 or more, got {self.looks}")

    def looks_before(self, num_samples: int) -> list[int]:
        """The looks that can save draws."""
        return [look for look in self.looks if look < num_samples]

    def settled(self, log_probs: Tensor, num_samples: int) -> Tensor:
        """Which inputs need no more draws, (n,) bool.

        Args:
            log_probs: (S, n, C) of the S ≥ 2 draws made so far.
            num_samples: N.
        """
        probs = log_probs.double().exp()
        best = probs.mean(0).topk(min(2, probs.shape[-1])).indices
        top, second = (probs.gather(-1, best[:, [i]].expand(len(probs), -1, 1)).squeeze(-1) for i in (0, -1))
        margin = top - second
        return (margin.mean(0) > self._half_width(margin, num_samples)) & (
            self._half_width(top, num_samples) <= self.tolerance
        )

    def _half_width(self, x: Tensor, num_samples: int) -> Tensor:
        """Of the interval of the mean of N draws, given x of S draws (S, n)."""
        size = len(x)
        looks = max(1, len(self.looks_before(num_samples)))
        quantile = stdtrit(size - 1, 1 - self.error / (2 * looks))
        return quantile * x.std(0) * math.sqrt(1 / size - 1 / num_samples)


@dataclass(frozen=True)
class OfPosterior(ABC):
    """A distribution over the weights of a posterior's layers, which differs from it in what is drawn.

    Attributes:
        posterior: whose mean it has.
    """

    posterior: Posterior

    def layer_names(self) -> list[str]:
        """The layers that draws change: the posterior's."""
        return self.posterior.layer_names()

    @property
    def head(self) -> GaussianHead | None:
        """The posterior's."""
        return self.posterior.head

    @property
    def adapter_is_gaussian(self) -> bool:
        """As the posterior's."""
        return self.posterior.adapter_is_gaussian

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Weights:
        """The weights of the next draw."""

    def without_head(self, weights: Weights) -> Weights:
        """As the posterior's."""
        return self.posterior.without_head(weights)

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


@dataclass(frozen=True)
class TopBlocks(OfPosterior):
    """A posterior of which only the layers in the last blocks are drawn; the others have their mean.

    ``predict(model, inputs, sampler=WeightDraws(TopBlocks(posterior, 8)))`` computes the blocks below once. A draw of a
    seed has, where it differs from the mean, the weights of the posterior's own draw.

    Attributes:
        posterior: of a model whose blocks stand in one `torch.nn.ModuleList`.
        number: blocks that are drawn, counted from the top.

    Raises:
        ValueError: ``number`` is below 1, or no Bayesian layer stands in a block, and no head is Gaussian.
    """

    number: int

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"number must be 1 or more blocks, got {self.number}")
        if not any(block_of(self.posterior.model, name) for name in self.posterior.layer_names()) and not self.head:
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


@dataclass(frozen=True)
class Linearized(Sampler):
    r"""A posterior's predictive from one forward and one backward pass for any N: log-odds linear in the weights.

    .. math:: m = \log\frac{p}{1 - p}, \qquad
        m_s \sim \mathcal N\Big(m,\ \sum_{ij} \big(\Omega_{ij}\,\partial m / \partial A_{ij}\big)^2\Big)

    p is the mean's probability of its most probable class; the other classes keep their shares of the rest. This is
    the linearized predictive (MacKay 1992, "The evidence framework applied to classification networks"; Immer et al.,
    arXiv 2008.08217) along one direction in the space of logits, which loses nothing for two classes and needs one
    backward pass instead of one for each class. The N "draws" are quantiles of that normal distribution: there is no
    sampling noise, and the seed has no effect. ``predict(model, inputs, sampler=Linearized(posterior))``.

    Attributes:
        posterior: of the model; its layers must see a batch row by row, as those of mixtures of experts don't.
    """

    posterior: Posterior

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits (b, C) at each of N quantiles, or of the mean."""
        if num_samples == 0 or not isinstance(forward, BatchForward):
            yield from WeightDraws(self.posterior).logits(forward, num_samples, seed)
            return
        logits, std = self.moments(forward)
        answer = logits.argmax(-1, keepdim=True)
        for quantile in normal_quantiles(num_samples):
            yield logits.scatter_add(-1, answer, (quantile * std)[:, None])

    @torch.enable_grad()
    def moments(self, forward: BatchForward) -> tuple[Tensor, Tensor]:
        """Logits (b, C) of the mean, and the standard deviation (b,) of the log-odds of its answers.

        Raises:
            UnevenPartsError: a layer doesn't see the batch row by row.
        """
        rows = forward.rows
        # Each row has its own copy of the weights, so that one backward pass gives each row its own gradient.
        copies = {
            name: mean.detach().expand(rows, -1, -1).clone().requires_grad_()
            for name, mean in self.posterior.named_means().items()
        }
        weights: list[Weights] = [{name: {} for name in self.posterior.layer_names()} for _ in range(rows)]
        for name, copy in copies.items():
            layer, factor = parts_of(name)
            for of_row, weight in zip(weights, copy, strict=True):
                of_row[layer][factor] = weight
        with self.posterior.stacked(weights, rows):
            logits = forward()
        slopes = torch.autograd.grad(_log_odds(logits.float()).sum(), [*copies.values()])
        stds = self.posterior.named_stds()
        parts = [(stds[name].detach() * slope).square().sum((1, 2)) for name, slope in zip(copies, slopes, strict=True)]
        return logits.detach(), torch.stack([part.to(logits.device) for part in parts]).sum(0).sqrt()


def _log_odds(logits: Tensor) -> Tensor:
    """log p/(1 − p) of the most probable class, (b,) of (b, C)."""
    best, answer = logits.max(-1)
    return best - logits.scatter(-1, answer[:, None], -torch.inf).logsumexp(-1)


def normal_quantiles(number: int) -> list[float]:
    """Equally likely values with the mean and, but for a single one, the variance of N(0, 1)."""
    values = [NormalDist().inv_cdf((i + 0.5) / number) for i in range(number)]
    scale = (sum(value**2 for value in values) / number) ** 0.5
    return [value / (scale or 1.0) for value in values]

r"""Two passes in place of N: the log-odds of the model's answer, made linear in the weights.

.. math:: m = \log\frac{p}{1 - p}, \qquad
    m_s \sim \mathcal N\Big(m,\ \sum_{ij} \big(\Omega_{ij}\,\partial m / \partial A_{ij}\big)^2\Big)

p is the probability that the mean gives to its most probable class. This is the linearized predictive (MacKay 1992,
"The evidence framework applied to classification networks"; Immer et al., arXiv 2008.08217) along one direction in the
space of logits, where it needs one backward pass and not one a class. Of what is left of the probability every other
class keeps its share. For two classes nothing is lost by the one direction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..adapter import Posterior
from ..adapter.bayesianize import Weights
from .forward import BatchForward
from .sampler import Forward, Sampler, WeightDraws


@dataclass(frozen=True)
class Linearized(Sampler):
    """A posterior's predictive by one forward and one backward pass, whatever N; an approximation.

    ``predict(model, inputs, sampler=Linearized(posterior))``. Its N "draws" are no draws but N quantiles of a normal
    distribution, so that results have no noise, and no seed.

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
            layer, _, factor = name.rpartition(".lora_")
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

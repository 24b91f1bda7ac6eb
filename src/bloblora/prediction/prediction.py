"""What N weight draws say about n inputs."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    r"""Class probabilities under each weight draw, and what follows from them.

    With :math:`p_s` the probabilities of draw s and :math:`\bar p = \frac1S\sum_s p_s`:
    total uncertainty :math:`H[\bar p]` = aleatoric :math:`\frac1S\sum_s H[p_s]` + epistemic (the mutual information of
    answer and weights).

    Attributes:
        log_probs: (S, n, C) float32, log-probabilities of each draw; -inf where an input has no such class, and in all
            classes for a draw that was not made for that input. S = 1 with ``num_samples`` 0.
        num_samples: N; 0 is the posterior mean.
    """

    log_probs: Tensor
    num_samples: int

    @property
    def num_draws(self) -> Tensor:
        """Draws that were made for each input, (n,): S, or fewer under a `StoppingRule`."""
        return (self.log_probs > -math.inf).any(-1).sum(0)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """log p̄, (n, C), averaged in log space."""
        return torch.logsumexp(self.log_probs, dim=0) - self.num_draws.log().unsqueeze(-1)

    @property
    def probabilities(self) -> Tensor:
        """p̄, (n, C)."""
        return self.log_probabilities.exp()

    @property
    def draw_probabilities(self) -> Tensor:
        """Probabilities of each draw, (S, n, C); 0 for one that was not made."""
        return self.log_probs.exp()

    @property
    def std(self) -> Tensor:
        """Standard deviation of each probability over the draws that were made, (n, C); 0 for a single one."""
        made = (self.log_probs > -math.inf).any(-1, keepdim=True)
        deviations = (self.draw_probabilities - self.probabilities).where(made, 0)
        return (deviations.square().sum(0) / self.num_draws[:, None]).sqrt()

    @property
    def labels(self) -> Tensor:
        """Most probable class, (n,)."""
        return self.log_probabilities.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """Probability of that class, (n,)."""
        return self.probabilities.amax(-1)

    @cached_property
    def predictive_entropy(self) -> Tensor:
        """Total uncertainty H[p̄] in nats, (n,)."""
        return _entropy(self.log_probabilities)

    @cached_property
    def expected_entropy(self) -> Tensor:
        """Aleatoric uncertainty, the mean of H[p_s] in nats, (n,)."""
        return _entropy(self.log_probs).sum(0) / self.num_draws

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty in nats, (n,): 0 where all draws agree."""
        return (self.predictive_entropy - self.expected_entropy).clamp_min(0)


def _entropy(log_probs: Tensor) -> Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)

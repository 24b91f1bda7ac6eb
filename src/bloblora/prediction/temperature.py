"""Temperature scaling of averaged probabilities (Guo et al., arXiv 1706.04599).

Of a number with normal noise the temperature is a factor of the noise's variance (`bloblora.tasks.Gaussian`).
"""

import math
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ..tasks.likelihood import CATEGORICAL, Likelihood

_LOG_RANGE = math.log(20.0)


def fit_temperature(logits: Sequence[Tensor], labels: Sequence[Tensor], likelihood: Likelihood = CATEGORICAL) -> float:
    """T in [1/20, 20] with the lowest NLL of the averaged probabilities.

    ``logits`` of each part is (S, n, C), -inf for a class that an input lacks; ``labels`` is (n, …).
    """

    def nll(log_temperature: float) -> float:
        return tempered_nll(logits, labels, math.exp(log_temperature), likelihood).mean().item()

    return math.exp(minimize_scalar(nll, bounds=(-_LOG_RANGE, _LOG_RANGE), method="bounded").x)


def tempered_nll(
    logits: Sequence[Tensor], labels: Sequence[Tensor], temperature: float, likelihood: Likelihood = CATEGORICAL
) -> Tensor:
    """NLL of each record of all parts under a temperature, nats, (n,) float64; arguments as of `fit_temperature`."""
    parts = zip(logits, labels, strict=True)
    return torch.cat([-likelihood.averaged(rows.double() / temperature, right) for rows, right in parts])

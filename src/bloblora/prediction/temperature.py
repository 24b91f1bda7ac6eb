"""Temperature scaling of averaged probabilities (Guo et al., arXiv 1706.04599)."""

import math
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from .prediction import Prediction

_LOG_RANGE = math.log(20.0)


def fit_temperature(log_probs: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    """T in [1/20, 20] with the lowest NLL of the averaged probabilities.

    ``log_probs`` of each part is (S, n, C), -inf for a class that an input lacks; ``labels`` is (n,).
    """

    def nll(log_temperature: float) -> float:
        return tempered_nll(log_probs, labels, math.exp(log_temperature)).mean().item()

    return math.exp(minimize_scalar(nll, bounds=(-_LOG_RANGE, _LOG_RANGE), method="bounded").x)


def tempered_nll(log_probs: Sequence[Tensor], labels: Sequence[Tensor], temperature: float) -> Tensor:
    """NLL of each record of all parts under a temperature, nats, (n,) float64; arguments as of `fit_temperature`."""
    losses = []
    for rows, right in zip(log_probs, labels, strict=True):
        scaled = (rows.double() / temperature).log_softmax(-1)
        losses.append(F.nll_loss(Prediction(scaled, len(scaled)).log_probabilities, right, reduction="none"))
    return torch.cat(losses)

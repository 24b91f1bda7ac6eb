"""The order statistic that conformal prediction rests on."""

import math

from scipy.stats import beta
from torch import Tensor


def conformal_quantile(scores: Tensor, level: float) -> float:
    """The k-th smallest of n scores, k = ⌈(n + 1) · level⌉.

    Of n + 1 exchangeable scores the last is at most this with probability ``level`` or more, and with less than
    ``level`` + 1/(n + 1) where no two are equal (Vovk, Gammerman & Shafer 2005, Algorithmic Learning in a Random
    World).

    Args:
        scores: (n,), n large enough (`check_enough`).
        level: in (0, 1).
    """
    return scores.sort().values[_rank(len(scores), level) - 1].item()


def quantile_bound(n: int, level: float, probability: float = 0.95) -> float:
    """Least share of new scores that are at most the quantile of n, with a probability over those n.

    The share is Beta(k, n + 1 - k) where no two scores are equal, and no smaller where some are (Vovk 2012, arXiv
    1209.2673).
    """
    k = _rank(n, level)
    return float(beta.ppf(1 - probability, k, n + 1 - k))


def check_enough(n: int, level: float, promise: str) -> None:
    """Raise a ValueError where n scores have no such quantile; the promise that needs it is for the message."""
    if _rank(n, level) > n:
        needed = math.ceil(level / (1 - level) - _SLACK)
        raise ValueError(f"{promise} needs at least {needed} records to calibrate on, got {n}")


def check_share(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is in (0, 1)."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")


def _rank(n: int, level: float) -> int:
    return math.ceil((n + 1) * level - _SLACK)


_SLACK = 1e-9  # 0.9 / (1 - 0.9) is a little more than 9

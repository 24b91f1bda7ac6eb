"""When to make no more draws for an input: a sequential test of what N draws would say."""

import math
from dataclasses import dataclass

from scipy.special import stdtrit
from torch import Tensor


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

r"""Answer or abstain: few errors among the answers, with a stated probability (selective risk control).

The rule answers where the confidence is above a threshold. The candidates are the thresholds that answer the m most
confident of n calibration records. They are tested from few answers to many, and the last before a test fails is taken;
the first is the smallest m at which one error may pass. This is fixed-sequence testing (Angelopoulos et al. 2021, Learn
then Test, arXiv 2110.01052), so the search costs nothing: each test has the whole error probability 1 - level. A test
with e errors among m answers is exact, :math:`P[\mathrm{Bin}(m, \mathrm{risk}) \le e] \le 1 - \mathrm{level}`, which
is that the upper Clopper-Pearson bound is at most the risk (as in Geifman & El-Yaniv 2017, arXiv 1705.08500).

Why candidates may come from the same records: let t* be the highest threshold whose true risk is above the stated one.
A rule that ends at t* or below has passed the test of the A records above t*; t* doesn't depend on the records, so
their errors are binomial given A. Where the first candidate is at t* or below, the records above it are, given it,
independent draws from all that is above it, and their errors are binomial too. So the promise fails with a probability
of 1 - level at most, as long as the true risk, once above the stated one, stays there as the threshold falls. Each time
that it comes down again near the first candidate may add as much once more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, nbinom
from torch import Tensor

from ..evaluation.inputs import checked_probabilities
from .conformal import check_numbers, check_share


@dataclass(frozen=True)
class Answering:
    """Answer where the confidence is above a threshold.

    Attributes:
        risk: largest share of errors among the answers, as promised.
        level: probability of the promise.
        threshold: of the confidence.
        num_answered: calibration records that are answered.
        num_wrong: of them, answered wrongly.
        num_examples: calibration records, n.
    """

    risk: float
    level: float
    threshold: float
    num_answered: int
    num_wrong: int
    num_examples: int

    def __post_init__(self) -> None:
        check_share("risk", self.risk)
        check_share("confidence level", self.level)
        check_numbers(self, "num_answered", "num_wrong", "num_examples")

    def answers(self, confidence: Tensor) -> Tensor:
        """Whether to answer, (n,) bool, for confidences (n,)."""
        return confidence.double() > self.threshold

    @property
    def promise(self) -> str:
        """What is promised, as a sentence."""
        return (
            f"at most {self.risk:.4g} of the answered are wrong, with probability {self.level:.4g}, on data like the "
            f"{self.num_examples} calibration records"
        )


def fit_answering(probabilities: Tensor, targets: Tensor, risk: float = 0.05, level: float = 0.95) -> Answering:
    """The lowest threshold that keeps the promise; see the module for how and why.

    Args:
        probabilities: (n, C), rows sum to 1.
        targets: (n,), class indices.
        risk: largest share of errors among the answers, in (0, 1).
        level: probability that the share is no larger, in (0, 1).

    Raises:
        ValueError: no threshold keeps the promise (the message names the least risk that passes), records are too few
            for any, or an argument, shapes or normalization are wrong.
    """
    check_answering(len(targets), risk, level)
    probabilities, targets = checked_probabilities(probabilities, targets)
    confidence, labels = probabilities.max(-1)
    ranked, order = confidence.sort(descending=True)
    wrong = (labels != targets)[order].cumsum(0)
    below = torch.cat([ranked[1:], torch.zeros(1)])
    ends = (ranked > below).nonzero()[:, 0]  # records of equal confidence are answered together
    counts, errors = (ends + 1).numpy(), wrong[ends].numpy()
    last = _last_passed(counts, errors, risk, 1 - level)
    if last is None:
        raise ValueError(_no_threshold(counts, errors, risk, level))
    threshold = below[ends[last]].item()
    return Answering(risk, level, threshold, int(counts[last]), int(errors[last]), len(targets))


def check_answering(n: int, risk: float, level: float) -> None:
    """Raise a ValueError unless risk and level are in (0, 1) and n records are enough for them."""
    check_share("risk", risk)
    check_share("confidence level", level)
    if n < (needed := _first(risk, 1 - level)):
        raise ValueError(
            f"risk {risk:.6g} with probability {level:.6g} needs at least {needed:.0f} records to calibrate on, got {n}"
        )


def _last_passed(counts: np.ndarray, errors: np.ndarray, risk: float, error_probability: float) -> int | None:
    """Index of the last candidate before a test fails; None where the first does, or there is none."""
    start = np.searchsorted(counts, _first(risk, error_probability))
    failed = np.flatnonzero(binom.cdf(errors[start:], counts[start:], risk) > error_probability)
    end = start + failed[0] if len(failed) else len(counts)
    return int(end) - 1 if end > start else None


def _first(risk: Any, error_probability: float) -> Any:
    """The smallest m of which a test passes with one error: P[Bin(m, risk) ≤ 1] is at most the error probability."""
    return nbinom.isf(error_probability, 2, risk) + 2


def _no_threshold(counts: np.ndarray, errors: np.ndarray, risk: float, level: float) -> str:
    """What can't be promised, and what could: the least risk, to three digits, whose first test passes."""
    message = f"no threshold on these {counts[-1]} records promises a risk of {risk:.6g} with probability {level:.6g}"
    risks = np.arange(1, 1000) / 1000
    risks = risks[(risks > risk) & (_first(risks, 1 - level) <= counts[-1])]
    first = np.searchsorted(counts, _first(risks, 1 - level))
    passed = risks[binom.cdf(errors[first], counts[first], risks) <= 1 - level]
    return message + (f"; the least that can be promised with them is {passed[0]:.3f}" if len(passed) else "")

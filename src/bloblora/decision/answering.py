r"""Answer or abstain: few errors among the answers, with a stated probability (selective risk control).

The rule answers where the confidence is above a threshold. The candidates are the thresholds that answer the m most
confident of n calibration records, tested from few answers to many. A test of m answers with e errors is exact:
:math:`P[\mathrm{Bin}(m, \mathrm{risk}) \le e]` must be at most the error probability that the test has, which says that
the upper Clopper-Pearson bound is at most the risk (as in Geifman & El-Yaniv 2017, arXiv 1705.08500).

The error probability α = 1 - level is shared by several starts: the smallest m at which one error may pass has 0.8 of
it, and those of 0.1n, 0.25n and 0.5n that are at least twice as large have the rest in equal parts (few records have
the first alone). With so much for the first, hardly anything is lost where only the first records can be answered. A
start adds its share to the test of its m; what a test has, the next one gets where it passes and loses where it fails;
the last candidate that passes is taken. From a single start this is fixed-sequence testing (Angelopoulos et al. 2021,
Learn then Test, arXiv 2110.01052), which a few errors among the first records end for good, at any n. From several it
is the fallback procedure (Wiens 2003, Pharmaceutical Statistics 2, 211-215), a graphical one of Bretz et al. 2009
(Statistics in Medicine 28, 586-604): it passes whatever the starts would pass each by itself with its share
(Bonferroni), and more where several are still under way.

Why the promise holds: let t* be the highest threshold whose true risk is above the stated one, and A the number of
records above it. t* doesn't depend on the records, so given A the errors among these A are binomial with a rate that is
above the risk; each record below is wrong with the stated risk or more, where more confident answers are more often
right. So given A a test of m ≥ A answers passes with at most the error probability that it has. A rule that ends at t*
or below has a first test of m ≥ A that passes. If that is the one of m = A, it has at most the shares of all starts up
to A. If not, the test before it failed and left nothing, so that it is at a start after A and has the share of that
start alone. Summed over these tests that is at most α.

Where the error rate comes down again after t*, each time that it does so near a start may add as much as that start's
share once more.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # loads scipy.stats, half a second, where it is used
import torch
from torch import Tensor

from ..evaluation.inputs import checked_probabilities
from .conformal import PromiseError, check_numbers, check_share


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
        score: name of the confidence.
    """

    risk: float
    level: float
    threshold: float
    num_answered: int
    num_wrong: int
    num_examples: int
    score: str = "confidence"

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
        PromiseError: no threshold keeps the promise (the message names the least risk that passes), or records are too
            few for any.
        ValueError: an argument, shapes or normalization are wrong.
    """
    check_answering(len(targets), risk, level)
    probabilities, targets = checked_probabilities(probabilities, targets)
    confidence, labels = probabilities.max(-1)
    return fit_answering_by(confidence, labels == targets, risk, level)


def fit_answering_by(
    confidence: Tensor, right: Tensor, risk: float = 0.05, level: float = 0.95, score: str = "confidence"
) -> Answering:
    """The same for answers of any kind that are right or wrong, such as texts.

    Args:
        confidence: (n,), finite, higher for answers that are right more often. Where all n are answered, the threshold
            is 0 if each is above it, and else the lowest number that there is.
        right: (n,) bool.
        risk: as for `fit_answering`, which says what it raises.
        level: likewise.
        score: name of the confidence.
    """
    check_answering(len(right), risk, level)
    confidence, right = confidence.detach().cpu().double(), right.cpu().bool()
    if confidence.shape != right.shape or not confidence.isfinite().all():
        raise ValueError(f"{score}: must be {len(right)} finite numbers, one for each answer")
    ranked, order = confidence.sort(descending=True)
    wrong = (~right)[order].cumsum(0)
    lowest = 0.0 if ranked[-1] > 0 else -sys.float_info.max
    below = torch.cat([ranked[1:], torch.tensor([lowest], dtype=torch.float64)])
    ends = (ranked > below).nonzero()[:, 0]  # records of equal confidence are answered together
    counts, errors = (ends + 1).numpy(), wrong[ends].numpy()
    last = _last_passed(counts, errors, risk, 1 - level)
    if last is None:
        raise PromiseError(_no_threshold(counts, errors, risk, level))
    threshold = below[ends[last]].item()
    return Answering(risk, level, threshold, int(counts[last]), int(errors[last]), len(right), score)


def check_answering(n: int, risk: float, level: float) -> None:
    """Raise a ValueError unless risk and level are in (0, 1), a PromiseError where n records are too few for them."""
    check_share("risk", risk)
    check_share("confidence level", level)
    if n < (needed := _first(risk, 1 - level)):
        raise PromiseError(
            f"risk {risk:.6g} with probability {level:.6g} needs at least {needed:.0f} records to calibrate on, got {n}"
        )


def _last_passed(counts: np.ndarray, errors: np.ndarray, risk: float, error_probability: float) -> int | None:
    """Index of the last candidate that passes its test; None where none does."""
    starts, shares = _starts(counts[-1], risk, error_probability)
    added = np.bincount(np.searchsorted(counts, starts), weights=shares, minlength=len(counts) + 1)
    available, last = 0.0, None
    for i, probability in enumerate(scipy.stats.binom.cdf(errors, counts, risk)):
        available += added[i]
        if probability <= available:
            last = i
        else:
            available = 0.0
    return last


def _starts(n: int, risk: Any, error_probability: float) -> tuple[np.ndarray, np.ndarray]:
    """How many records the first test of each start answers, infinite for none, and the share of each; both (…, 4)."""
    risk, later = np.asarray(risk)[..., None], _LATER_STARTS * n
    used = later >= 2 * _first(risk, error_probability)
    count = used.sum(-1, keepdims=True)
    first = error_probability * np.where(count, _FIRST_SHARE, 1.0)
    rest = np.broadcast_to((error_probability - first) / count.clip(min=1), used.shape)
    return np.concatenate([_first(risk, first), np.where(used, later, np.inf)], -1), np.concatenate([first, rest], -1)


def _first(risk: Any, error_probability: Any) -> Any:
    """The smallest m of which a test passes with one error: P[Bin(m, risk) ≤ 1] is at most the error probability."""
    return scipy.stats.nbinom.isf(error_probability, 2, risk) + 2


def _no_threshold(counts: np.ndarray, errors: np.ndarray, risk: float, level: float) -> str:
    """What can't be promised, and what could: the least risk, to three digits, at which a start's first test passes."""
    message = f"no threshold on these {counts[-1]} records promises a risk of {risk:.6g} with probability {level:.6g}"
    risks = np.arange(1, 1000) / 1000
    risks = risks[risks > risk]
    starts, shares = _starts(counts[-1], risks, 1 - level)
    first = np.searchsorted(counts, starts).clip(max=len(counts) - 1)
    passed = (starts <= counts[-1]) & (scipy.stats.binom.cdf(errors[first], counts[first], risks[:, None]) <= shares)
    least = risks[passed.any(-1)]
    return message + (f"; the least that can be promised with them is {least[0]:.3f}" if len(least) else "")


_FIRST_SHARE = 0.8  # of the error probability
_LATER_STARTS = np.array([0.1, 0.25, 0.5])  # shares of the n records

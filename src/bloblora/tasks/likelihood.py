r"""How probable an answer is, given a task's logits: what training maximizes, and what prediction averages.

Logits are the natural parameters η of an exponential family, p(y | η) ∝ exp(η · t(y)), so that logits over T are its
density to the power 1/T, normalized: a temperature means the same for each of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

NO_TAG = -100
"""In the place of a token's tag where there is no token, as transformers has it."""
_FISHER_DRAWS = 8


class Likelihood(ABC):
    """A family of distributions over the answers of one kind of task."""

    name: ClassVar[str]
    expects: ClassVar[bool] = False
    """Whether it has an `expected_square`."""
    smooths: ClassVar[bool] = False
    """Whether it is of classes, of which a share of the loss can be of all alike (`alike`)."""
    bounds: ClassVar[bool] = False
    """Whether it has a `noise_cost`."""
    problem_type: ClassVar[ProblemType] = "single_label_classification"
    """What transformers calls it in the configuration of a sequence classification model."""

    def normalized(self, logits: Tensor) -> Tensor:
        """The logits in a form in which equal distributions have equal numbers."""
        return logits

    @abstractmethod
    def log_prob(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log-probability or density of labels (b, …) as examples hold them, (…, b) for logits (…, b, C)."""

    @abstractmethod
    def merged(self, draws: Tensor) -> Tensor:
        """Logits (b, C) of the average over draws (S, b, C), or of the member of the family that is closest to it."""

    def averaged(self, draws: Tensor, labels: Tensor) -> Tensor:
        """Log of the mean over draws (S, b, C) of the probability of labels, (b,)."""
        return self.log_prob(draws, labels).logsumexp(0) - math.log(len(draws))

    def stacked(self, labels: Sequence[Any]) -> Tensor:
        """Labels of examples as one tensor (b, …)."""
        return torch.tensor(labels)

    def alike(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean log-probability, over the classes that an example has, of each in the place of ``labels``, (b,)."""
        raise NotImplementedError(f"{self.name}: no classes")

    def expected_square(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        r"""Factor that makes an example's squared gradient that of labels from the model in place of ``labels``, (b,).

        :math:`\mathbb E_{t' \sim p}\|t' - \bar t\|^2 / \|t - \bar t\|^2`, with :math:`\bar t = \mathbb E_p[t(y)]`.
        The square is then about the Hessian, also where an example is fitted or its label is a surprise.

        Args:
            logits: (b, C).
            labels: (b, …), as examples hold them.
            smoothing: share of the loss that is of the classes alike, where there are classes.
        """
        raise NotImplementedError(f"{self.name}: no label to expect")

    def noise_cost(self, logits: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        r"""How much normal noise in the logits raises the expected NLL at most, (b,) nats.

        With the log-normalizer :math:`\mathcal A` of the family it is a bound of :math:`\mathbb E[\mathcal A(\eta +
        \sqrt v \circ \epsilon)] - \mathcal A(\eta)`, for the rest of the NLL is linear in η.

        Args:
            logits: η (b, C).
            variance: v (b, C).
            labels: (b, …), as examples hold them.
        """
        raise NotImplementedError(f"{self.name}: no bound")

    def fisher_root(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Vectors (K, b, C) whose outer products sum to the Fisher information of logits (b, C), or do so on average.

        Args:
            logits: of the model, which says how probable each answer is.
            generator: on the CPU, where answers are drawn.
        """
        raise NotImplementedError(f"{self.name}: no root of the Fisher information")

    def soft_labels(self, logits: Tensor) -> Tensor:
        """Soft labels (b, …) of logits (b, C), of which `log_prob` is the mean log-probability of answers by these."""
        raise NotImplementedError

    def targets(self, labels: Sequence[Any]) -> Tensor:
        """The labels of examples as metrics take them, (n, …): by default as in a batch."""
        return self.stacked(labels)

    @abstractmethod
    def guess(self, seen: Sequence[Any], labels: Sequence[Any]) -> float:
        """Mean NLL of labels under what fits the labels ``seen`` best without looking at an input, nats."""


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of C classes, by their log-odds.

    Attributes:
        weights: how much a record of each class counts, where it isn't 1: its log-probability is times that.
    """

    weights: tuple[float, ...] = field(default=(), compare=False)

    name: ClassVar[str] = "categorical"
    expects: ClassVar[bool] = True
    smooths: ClassVar[bool] = True
    bounds: ClassVar[bool] = True

    def weight(self, labels: Tensor) -> Tensor | float:
        """How much class indices (b,) count in a loss; 1 of probabilities (b, C)."""
        return 1.0 if labels.ndim > 1 else _weights_of(self.weights, labels)

    def normalized(self, logits: Tensor) -> Tensor:
        """Log-probabilities."""
        return logits.log_softmax(-1)

    def log_prob(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of class indices (b,), or of probabilities (b, C): their cross-entropy."""
        repeated = labels.expand(*logits.shape[:-2], *labels.shape).flatten(0, logits.ndim - 2)
        nll = F.cross_entropy(logits.flatten(0, -2), repeated, reduction="none").unflatten(0, logits.shape[:-1])
        return -nll * self.weight(labels)

    def alike(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Times the weight."""
        finite = logits != -math.inf
        return logits.log_softmax(-1).where(finite, 0).sum(-1) / finite.sum(-1) * self.weight(labels)

    def averaged(self, draws: Tensor, labels: Tensor) -> Tensor:
        """Log of the mean probability, times the weight."""
        return self.log_prob(self.merged(draws), labels)

    def expected_square(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """1 - Σp² over ‖p - y‖², over the weight, of which the square has one too many."""
        p = logits.float().softmax(-1)
        y = labels if labels.ndim > 1 else F.one_hot(labels, p.shape[-1])
        if smoothing:
            finite = logits != -math.inf
            y = (1 - smoothing) * y + smoothing * finite / finite.sum(-1, keepdim=True)
        return _ratio((p * (1 - p)).sum(-1), (p - y).square().sum(-1)) / self.weight(labels)

    def noise_cost(self, logits: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        r"""By Jensen's inequality for the logarithm of the sum, :math:`\log \sum_c e^{\eta_c + v_c/2} - \log \sum_c
        e^{\eta_c}`, times the weight (Harrison et al., arXiv 2404.11599, theorem 2).
        """
        return ((logits + variance / 2).logsumexp(-1) - logits.logsumexp(-1)) * self.weight(labels)

    def fisher_root(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """√w (e_y − p), whose outer products sum to diag(p) − ppᵀ.

        y is every class with w = p_y, or where there are more than K, K classes from p with w = 1/K, and then the mean
        is.
        """
        p = logits.softmax(-1).cpu()
        if p.shape[1] <= _FISHER_DRAWS:
            labels, weights = torch.arange(p.shape[1]).expand_as(p), p
        else:
            labels = p.multinomial(_FISHER_DRAWS, replacement=True, generator=generator)
            weights = torch.full(labels.shape, 1 / _FISHER_DRAWS)
        residuals = F.one_hot(labels, p.shape[1]) - p.unsqueeze(1)
        return (weights.sqrt().unsqueeze(-1) * residuals).transpose(0, 1).to(logits)

    def merged(self, draws: Tensor) -> Tensor:
        """Log of the mean probabilities."""
        return draws.log_softmax(-1).logsumexp(0) - math.log(len(draws))

    def soft_labels(self, logits: Tensor) -> Tensor:
        """Probabilities."""
        return logits.softmax(-1)

    def guess(self, seen: Sequence[Any], labels: Sequence[Any]) -> float:
        """By the shares of the classes, as they count."""
        return _guess(self.weights, seen, labels) / len(labels)


@dataclass(frozen=True)
class BradleyTerry(Categorical):
    """Which of C responses is preferred: classes whose logits are rewards, and stay what they are."""

    name: ClassVar[str] = "bradley_terry"
    smooths: ClassVar[bool] = False
    bounds: ClassVar[bool] = False
    problem_type: ClassVar[ProblemType] = "regression"

    def normalized(self, logits: Tensor) -> Tensor:
        """The rewards."""
        return logits


@dataclass(frozen=True)
class Text(Categorical):
    """A text, or anything else: the second class stands for no answer, whose gradient could be expected."""

    expects: ClassVar[bool] = False


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Each of L labels or not, independently given the logits, by their log-odds."""

    name: ClassVar[str] = "bernoulli"
    expects: ClassVar[bool] = True
    problem_type: ClassVar[ProblemType] = "multi_label_classification"

    def log_prob(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of labels (b, L), 1 or 0, or of their probabilities: the sum over them."""
        labels = labels.to(logits).expand_as(logits)
        return -F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1)

    def averaged(self, draws: Tensor, labels: Tensor) -> Tensor:
        """The sum over labels of the logarithm of each one's averaged probability."""
        return self.log_prob(self.merged(draws), labels)

    def expected_square(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Σp(1 - p) over ‖p - y‖²."""
        p = logits.float().sigmoid()
        return _ratio((p * (1 - p)).sum(-1), (p - labels).square().sum(-1))

    def fisher_root(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """√(p(1 - p)) of each label, whose Fisher information is diag(p(1 - p)): (L, b, L)."""
        p = logits.sigmoid()
        return torch.diag_embed((p * (1 - p)).sqrt()).transpose(0, 1)

    def merged(self, draws: Tensor) -> Tensor:
        """Log-odds of the mean probabilities of each label."""
        return F.logsigmoid(draws).logsumexp(0) - F.logsigmoid(-draws).logsumexp(0)

    def soft_labels(self, logits: Tensor) -> Tensor:
        """Probabilities."""
        return logits.sigmoid()

    def guess(self, seen: Sequence[Any], labels: Sequence[Any]) -> float:
        """By the share of records that have each label, half a record more of both kinds."""
        counts = torch.tensor(seen, dtype=torch.float64).sum(0) + 0.5
        log_odds = (counts / (len(seen) + 1)).logit().expand(len(labels), -1)
        return -self.log_prob(log_odds, torch.tensor(labels)).mean().item()


@dataclass(frozen=True)
class Tags(Likelihood):
    """One of K tags for each token, independently given the logits, by their log-odds.

    Logits are (…, b, T·K), of one token after the other, and labels (b, T); what a shorter record lacks is -inf and
    `NO_TAG`.

    Attributes:
        names: of the K tags.
        weights: how much a token of each tag counts, where it isn't 1, in `log_prob`, `averaged`, `alike` and `guess`.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] = field(default=(), compare=False)

    name: ClassVar[str] = "tags"
    smooths: ClassVar[bool] = True

    def by_token(self, logits: Tensor) -> Tensor:
        """The log-probabilities (…, T, K) of logits (…, T·K); of a token that isn't there all are -inf."""
        tokens = logits.unflatten(-1, (-1, len(self.names)))
        there = tokens != -math.inf  # NaN is there, and stays
        return tokens.where(there, 0).log_softmax(-1).where(there, -math.inf)

    def stacked(self, labels: Sequence[Any]) -> Tensor:
        """Indices of tags, (b, T)."""
        return pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=NO_TAG)

    def normalized(self, logits: Tensor) -> Tensor:
        """Log-probabilities."""
        return self.by_token(logits).flatten(-2)

    def token_log_probs(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log-probability of each token's tag, (…, b, T), of indices (b, T); 0 where there is none."""
        log_probs = self.by_token(logits)
        tagged = (labels != NO_TAG).expand(log_probs.shape[:-1])
        index = labels.clamp_min(0).expand(log_probs.shape[:-1])
        return log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1).where(tagged, 0)

    def log_prob(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of indices (b, T), or of probabilities (b, T·K): the sum over tokens."""
        if not labels.is_floating_point():
            return (self.token_log_probs(logits, labels) * _weights_of(self.weights, labels)).sum(-1)
        log_probs = self.by_token(logits)
        shares = labels.unflatten(-1, (-1, len(self.names)))[..., : log_probs.shape[-2], :]
        return (log_probs.where(log_probs != -math.inf, 0) * shares).sum((-1, -2))

    def averaged(self, draws: Tensor, labels: Tensor) -> Tensor:
        """The sum over tokens of the logarithm of each tag's averaged probability."""
        return self.log_prob(self.merged(draws), labels)

    def alike(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over tokens."""
        log_probs = self.by_token(logits)
        alike = log_probs.where((labels != NO_TAG).unsqueeze(-1), 0).mean(-1)
        return (alike * _weights_of(self.weights, labels)).sum(-1)

    def merged(self, draws: Tensor) -> Tensor:
        """Log of the mean probabilities of each token."""
        return self.normalized(draws).logsumexp(0) - math.log(len(draws))

    def soft_labels(self, logits: Tensor) -> Tensor:
        """Probabilities."""
        return self.normalized(logits).exp()

    def guess(self, seen: Sequence[Any], labels: Sequence[Any]) -> float:
        """By the share of tokens that have each tag, as they count."""
        return _guess(self.weights, [*chain(*seen)], [*chain(*labels)]) / len(labels)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""A number with normal noise, of natural parameters :math:`(\mu/\sigma^2, -1/(2\sigma^2))`.

    Over T they have the same mean and the variance :math:`T\sigma^2`. Examples hold standardized numbers; targets are
    in the units of the data.

    Attributes:
        center: mean of the training values.
        scale: their standard deviation.
    """

    center: float = 0.0
    scale: float = 1.0

    name: ClassVar[str] = "gaussian"
    problem_type: ClassVar[ProblemType] = "regression"

    @staticmethod
    def of(mean: Tensor, precision: Tensor) -> Tensor:
        """Logits (…, 2) of a mean and 1/σ²."""
        return torch.stack([mean * precision, -precision / 2], dim=-1)

    @staticmethod
    def moments(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, standardized, each (…)."""
        variance = -0.5 / logits[..., 1]
        return logits[..., 0] * variance, variance

    def log_prob(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log-density of standardized numbers (b,); of means and variances (b, 2) the mean log-density."""
        mean, variance = self.moments(logits)
        labels, spread = (labels, 0) if labels.ndim == 1 else labels.unbind(-1)
        return -(((labels - mean).square() + spread) / variance + variance.log() + math.log(2 * math.pi)) / 2

    def merged(self, draws: Tensor) -> Tensor:
        """Of the same mean and variance as the mixture."""
        means, variances = self.moments(draws)
        return self.of(means.mean(0), 1 / (variances.mean(0) + means.var(0, correction=0)))

    def soft_labels(self, logits: Tensor) -> Tensor:
        """Means and variances."""
        return torch.stack(self.moments(logits), -1)

    def standardized(self, values: Any) -> Any:
        """Numbers in the units of the data, as examples hold them."""
        return (values - self.center) / self.scale

    def targets(self, labels: Sequence[Any]) -> Tensor:
        """The numbers in the units of the data, (n,) float64."""
        return torch.tensor(labels, dtype=torch.float64) * self.scale + self.center

    def guess(self, seen: Sequence[Any], labels: Sequence[Any]) -> float:
        """By the normal distribution with their mean and variance."""
        known, asked = (torch.tensor(side, dtype=torch.float64) for side in (seen, labels))
        variance = known.var(correction=0).clamp_min(1e-12)
        return -self.log_prob(self.of(known.mean(), 1 / variance), asked).mean().item()


def _weights_of(weights: Sequence[float], labels: Tensor) -> Tensor | float:
    """That of each of the indices, of which a negative one stands for none; 1 without weights."""
    return torch.tensor(weights, device=labels.device)[labels.clamp_min(0)] if weights else 1.0


def _guess(weights: Sequence[float], seen: Sequence[int], labels: Sequence[int]) -> float:
    """Sum of the weighted NLL of labels by the weighted shares of the labels ``seen``."""
    weights = weights or [1.0] * (max([*seen, *labels]) + 1)
    counts = {label: count * weights[label] for label, count in Counter(seen).items()}
    total = sum(counts.values())
    return sum(-weights[y] * math.log(counts.get(y, weights[y]) / total) for y in labels)


def _ratio(expected: Tensor, there: Tensor) -> Tensor:
    return expected / there.clamp_min(torch.finfo(there.dtype).tiny)


CATEGORICAL = Categorical()


def likelihood_of(task: Any) -> Likelihood:
    """That of a task; classes where it says nothing else, and without a task."""
    return getattr(task, "likelihood", CATEGORICAL)


def mean_nll(likelihood: Likelihood, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Of logits (b, C); a share of it is of the classes alike that an example has, whose logits are finite."""
    nll = -likelihood.log_prob(logits, labels).mean()
    return (1 - smoothing) * nll - smoothing * likelihood.alike(logits, labels).mean() if smoothing else nll

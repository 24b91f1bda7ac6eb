"""What N draws of the weights say about n inputs: a class of prediction for each kind of answer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..tasks.likelihood import NO_TAG, Gaussian, Likelihood, Tags
from ..tasks.token_classification import ENTITY_MARKS, entities_of
from .distance import DISTANCES

INTERVAL = 0.9
"""Share of the predictive probability in the interval of a value."""
_BISECTIONS = 60


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
        head_shares: how much of a draw's uncertainty is epistemic already, since it is the mean over a Gaussian head:
            of its entropy, and of each class's variance p(1 - p), (n, 1 + C); None without such a head
            (`bloblora.adapter.head.average_head`).
        distances: how far each input is from the training data, (n,) by name of `DISTANCES`, of the mean weights, where
            that is known.
    """

    log_probs: Tensor
    num_samples: int
    head_shares: Tensor | None = field(default=None, kw_only=True)
    distances: Mapping[str, Tensor] | None = field(default=None, kw_only=True)

    kind: ClassVar[str] = "categorical"
    """Name of the likelihood that it is a prediction of."""
    uncertainties: ClassVar[Mapping[str, str]] = {
        "confidence": "conf.",
        "predictive_entropy": "entropy",
        "mutual_information": "MI",
    }
    """The properties that tell inputs out of scope from others, and what tables call them."""

    @classmethod
    def from_logits(cls, logits: Tensor, num_samples: int, likelihood: Likelihood) -> Prediction:
        """From draws' normalized logits (S, n, C)."""
        return cls(logits, num_samples)

    @property
    def num_draws(self) -> Tensor:
        """Draws that the average is over for each input, (n,): S, or fewer under a `StoppingRule`.

        N where one stands for all, since nothing but a head is Gaussian.
        """
        return self._made if self.head_shares is None else self._made.clamp_min(self.num_samples)

    @property
    def _made(self) -> Tensor:
        return (self.log_probs > -math.inf).any(-1).sum(0)

    def draw_logits(self) -> Tensor:
        """The likelihood's normalized parameters under each draw, (S, n, C): here ``log_probs``."""
        return self.log_probs

    @cached_property
    def log_probabilities(self) -> Tensor:
        """log p̄, (n, C), averaged in log space."""
        return torch.logsumexp(self.log_probs, dim=0) - self._made.log().unsqueeze(-1)

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
        """Standard deviation of each probability over the draws that were made, (n, C); 0 for a single one.

        With a Gaussian head over its draws as well.
        """
        made = (self.log_probs > -math.inf).any(-1, keepdim=True)
        p = self.draw_probabilities
        variances = (p - self.probabilities).where(made, 0).square()
        if self.head_shares is not None:
            variances = variances + p * (1 - p) * self.head_shares[:, 1:]
        return (variances.sum(0) / self._made[:, None]).sqrt()

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
        """Aleatoric uncertainty, the mean of H[p_s] in nats, (n,); of a Gaussian head's mean what its draws leave."""
        entropies = self._mean_entropy
        return entropies if self.head_shares is None else entropies * (1 - self.head_shares[:, 0])

    @property
    def _mean_entropy(self) -> Tensor:
        return _entropy(self.log_probs).sum(0) / self._made

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty in nats, (n,): 0 where draws agree, and for a single one, which doesn't define it.

        Of a Gaussian head it has in addition that of each draw of the adapter, also of a single one.
        """
        if self.head_shares is None:
            return mutual_information(self.predictive_entropy, self.expected_entropy, self.num_draws)
        between = mutual_information(self.predictive_entropy, self._mean_entropy, self._made)
        return between + self._mean_entropy * self.head_shares[:, 0]

    @property
    def knows_epistemic(self) -> bool:
        """Whether there is more than one function, so that they can disagree."""
        return self.head_shares is not None or int(self.num_draws.max()) > 1

    def with_distances(self, distances: Mapping[str, Tensor] | None) -> Self:
        """The same prediction with ``distances``."""
        found = copy.copy(self)
        found.__dict__["distances"] = distances
        return found

    def score(self, name: str) -> Tensor:
        """One of `scores`, (n,).

        Raises:
            ValueError: it is a distance, and that isn't known.
        """
        if name not in DISTANCES:
            return getattr(self, name)
        if name not in (distances := self.distances or {}):
            raise ValueError(f"score {name}: these predictions have no such distance from the training data")
        return distances[name]

    @property
    def scores(self) -> dict[str, Tensor]:
        """What tells inputs out of scope from others, (n,) by name: ``uncertainties`` and ``distances``."""
        return {name: getattr(self, name) for name in self.uncertainties} | dict(self.distances or {})

    @property
    def usual_score(self) -> str:
        """Which score calls an input out of scope where no other is asked for.

        It is the distance from the training data where that is known. Of a Gaussian head else it is the epistemic
        uncertainty: a temperature below 1, as its bound of the NLL leads to, makes the total uncertainty of inputs that
        are unlike all others small.
        """
        if self.distances:
            return next(iter(self.distances))
        return "predictive_entropy" if self.head_shares is None else "mutual_information"

    def answers(self, columns: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Of each input the label, the probability of each of its columns, and the uncertainty in nats."""
        probabilities, labels = self.probabilities, self.labels
        for i, (names, scores) in enumerate(zip(columns, self._scores(), strict=True)):
            yield {
                "label": names[int(labels[i])],
                "probabilities": {name: float(probabilities[i, j]) for j, name in enumerate(names)},
                **scores,
            }

    def _scores(self) -> Iterator[dict[str, float]]:
        """Of each input the uncertainty in nats."""
        names = (*self.uncertainties, "expected_entropy")
        columns = (getattr(self, name).tolist() for name in names)
        return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


class RewardPrediction(Prediction):
    r"""Rewards of responses, and by them which is preferred: a prediction of classes, the responses of a record.

    Only differences between the responses to one prompt mean something. So where a record has several,
    :math:`\tilde r_{si} = r_{si} - \frac1C \sum_j r_{sj}` of each draw s are what is averaged.

    Attributes:
        logits: (S, n, C) float32, the rewards of each draw; -inf where a record has no such response.
    """

    kind = "bradley_terry"
    caution: ClassVar[float] = 1.0
    """Standard deviations by which a lower bound is below the mean."""
    logits: Tensor
    __repr__ = object.__repr__

    def __init__(self, logits: Tensor, num_samples: int) -> None:
        self.__dict__ |= {"logits": logits, "log_probs": logits.log_softmax(-1), "num_samples": num_samples}

    def draw_logits(self) -> Tensor:
        """The attribute ``logits``."""
        return self.logits

    @cached_property
    def draw_rewards(self) -> Tensor:
        """Of each draw, (S, n, C), relative to the mean of a record's responses where it has several; NaN for none."""
        rewards = self.logits.where(self.logits > -math.inf, math.nan)
        several = rewards[0].isfinite().sum(-1, keepdim=True) > 1
        return rewards - rewards.nanmean(-1, keepdim=True).where(several, 0)

    @property
    def rewards(self) -> Tensor:
        """Their mean, (n, C)."""
        return self.draw_rewards.mean(0)

    @property
    def reward_stds(self) -> Tensor:
        """Their standard deviation over the draws, (n, C): epistemic; 0 for a single one."""
        return self.draw_rewards.std(0, correction=0)

    @property
    def lower_bounds(self) -> Tensor:
        """Mean less `caution` standard deviations, (n, C)."""
        return self.rewards - self.caution * self.reward_stds

    @property
    def best(self) -> Tensor:
        """The response with the highest lower bound, (n,)."""
        return self.lower_bounds.nan_to_num(-math.inf).argmax(-1)

    def answers(self, columns: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Of each input the same as of classes, and ``best``, ``rewards``, ``reward_stds``, ``lower_bounds``."""
        numbers = {name: getattr(self, name).tolist() for name in ("rewards", "reward_stds", "lower_bounds")}
        best = self.best.tolist()
        for i, (names, answer) in enumerate(zip(columns, super().answers(columns), strict=True)):
            rows = {name: values[i][: len(names)] for name, values in numbers.items()}
            yield {"best": names[best[i]], **rows, **answer}


class OtherPrediction(Prediction):
    """What draws say of answers that aren't classes, of which there are no probabilities, confidence or entropy.

    Attributes:
        logits: (S, n, C) float32, of each draw.
        num_samples: N; 0 is the posterior mean.
        likelihood: of the answers, given the logits.
    """

    logits: Tensor
    likelihood: Likelihood
    __repr__ = object.__repr__

    def __init__(self, logits: Tensor, num_samples: int, likelihood: Likelihood) -> None:
        self.__dict__ |= {"logits": logits, "num_samples": num_samples, "likelihood": likelihood}

    @classmethod
    def from_logits(cls, logits: Tensor, num_samples: int, likelihood: Likelihood) -> Prediction:
        """From draws' normalized logits (S, n, C)."""
        return cls(logits, num_samples, likelihood)

    @property
    def log_probs(self) -> Tensor:
        """There are none: a TypeError."""
        raise TypeError(f"a {self.kind} prediction has no classes that exclude each other, which this needs")

    def draw_logits(self) -> Tensor:
        """The attribute ``logits``."""
        return self.logits

    @property
    def num_draws(self) -> Tensor:
        """Draws that were made for each input, (n,)."""
        draws, rows = self.logits.shape[:2]
        return torch.full((rows,), draws)

    @property
    def _made(self) -> Tensor:
        return self.num_draws

    @property
    def confidence(self) -> Tensor:
        """There is none: a TypeError."""
        return self.log_probs


class ValuePrediction(OtherPrediction):
    r"""Numbers, each with the mixture of the draws' normal distributions as its predictive distribution.

    With mean :math:`\mu_s` and noise :math:`\sigma_s` of draw s, by the law of total variance:
    :math:`\mathrm{std}^2` = aleatoric :math:`\frac1S\sum_s \sigma_s^2` + epistemic
    :math:`\frac1S\sum_s (\mu_s - \bar\mu)^2`. All are in the units of the data, (n,) float64.
    """

    kind = "gaussian"
    uncertainties: ClassVar[Mapping[str, str]] = {"std": "sd", "epistemic_std": "epistemic sd"}
    likelihood: Gaussian

    @property
    def usual_score(self) -> str:
        """Of values it is ``std``."""
        return "std"

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation under each draw, (S, n)."""
        mean, variance = self.likelihood.moments(self.logits.double())
        return mean * self.likelihood.scale + self.likelihood.center, variance.sqrt() * self.likelihood.scale

    @property
    def mean(self) -> Tensor:
        """Predictive mean."""
        return self.moments[0].mean(0)

    @property
    def aleatoric_std(self) -> Tensor:
        """Root of the draws' mean noise variance: what the input leaves open."""
        return self.moments[1].square().mean(0).sqrt()

    @property
    def epistemic_std(self) -> Tensor:
        """Standard deviation of the draws' means: what the model doesn't know; 0 for a single draw."""
        return self.moments[0].std(0, correction=0)

    @property
    def std(self) -> Tensor:
        """Predictive standard deviation."""
        return (self.aleatoric_std.square() + self.epistemic_std.square()).sqrt()

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-density, nats, of the standardized values; of the values themselves it is less by log ``scale``."""
        standardized = self.likelihood.standardized(values.double())
        return self.likelihood.averaged(self.logits.double(), standardized)

    def cdf(self, values: Tensor) -> Tensor:
        """Probability of at most these values."""
        means, stds = self.moments
        return torch.special.ndtr((values.double() - means) / stds).mean(0)

    def quantile(self, probability: float) -> Tensor:
        """The values of a cumulative probability in (0, 1), by bisection."""
        means, stds = self.moments
        ends = means + stds * torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
        low, high = ends.amin(0), ends.amax(0)  # where each draw has it
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = self.cdf(middle) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def interval(self, share: float = INTERVAL) -> Tensor:
        """The central interval that has a share of the predictive probability, (n, 2)."""
        return torch.stack([self.quantile((1 - share) / 2), self.quantile((1 + share) / 2)], dim=-1)

    def answers(self, columns: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Of each input the mean, the standard deviation and its parts, and the interval."""
        numbers = {"value": self.mean, "std": self.std}
        numbers |= {
            "aleatoric_std": self.aleatoric_std,
            "epistemic_std": self.epistemic_std,
            "interval": self.interval(),
        }
        rows = [values.tolist() for values in numbers.values()]
        return (dict(zip(numbers, row, strict=True)) for row in zip(*rows, strict=True))


def covered(intervals: Tensor, values: Tensor) -> Tensor:
    """Which values (n,) their intervals (n, 2) hold, ends included."""
    low, high = intervals.unbind(-1)
    return (low <= values) & (values <= high)


class AveragedPrediction(OtherPrediction):
    """Answers of several parts, with probabilities that are averaged over the draws part by part; entropies in nats."""

    uncertainties: ClassVar[Mapping[str, str]] = {"predictive_entropy": "entropy", "mutual_information": "MI"}

    @cached_property
    def probabilities(self) -> Tensor:
        """Averaged over the draws, (n, …)."""
        return self.draw_probabilities.mean(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each probability over the draws, (n, …); 0 for a single one."""
        return self.draw_probabilities.std(0, correction=0)


class MultiLabelPrediction(AveragedPrediction):
    """Which labels inputs have, each with a probability of its own.

    Entropies are sums over the labels, and so is the mutual information of each label and the weights.
    """

    kind = "bernoulli"

    @property
    def draw_probabilities(self) -> Tensor:
        """Of each draw, (S, n, L)."""
        return self.logits.sigmoid()

    @property
    def labels(self) -> Tensor:
        """Whether each label is more probable than not, (n, L) bool."""
        return self.probabilities > 0.5

    @cached_property
    def predictive_entropy(self) -> Tensor:
        """Total uncertainty, (n,)."""
        return _binary_entropy(self.probabilities)

    @cached_property
    def expected_entropy(self) -> Tensor:
        """Aleatoric uncertainty, (n,)."""
        return _binary_entropy(self.draw_probabilities).mean(0)

    def answers(self, columns: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Of each input its labels, the most probable first, the probability of each, and the uncertainty."""
        probabilities = self.probabilities
        for i, (names, scores) in enumerate(zip(columns, self._scores(), strict=True)):
            row = dict(zip(names, probabilities[i].tolist(), strict=True))
            yield {
                "labels": [name for name in sorted(row, key=lambda name: -row[name]) if row[name] > 0.5],
                "probabilities": row,
                **scores,
            }


class TagsPrediction(AveragedPrediction):
    """The tag of each of an input's T tokens.

    An input's uncertainty is the mean over its tokens. Where an input has fewer tokens, probabilities (n, T, K) and
    uncertainty are 0, and ``labels`` `NO_TAG`.
    """

    kind = "tags"
    likelihood: Tags

    @cached_property
    def draw_probabilities(self) -> Tensor:
        """Of each draw, (S, n, T, K)."""
        return self.likelihood.by_token(self.logits).exp()

    @property
    def tokens(self) -> Tensor:
        """Which tokens are there, (n, T) bool."""
        return self.probabilities.sum(-1) > 0

    @property
    def labels(self) -> Tensor:
        """Each token's most probable tag, (n, T)."""
        return self.probabilities.argmax(-1).where(self.tokens, NO_TAG)

    def token_log_probs(self, tags: Tensor) -> Tensor:
        """Log-probability of each token's tag, (n, T), of indices; each token counts 1, whatever its class weight."""
        return self.likelihood.token_log_probs(self.likelihood.merged(self.logits.double()), tags)

    @property
    def token_confidence(self) -> Tensor:
        """Probability of that tag, (n, T)."""
        return self.probabilities.amax(-1)

    @cached_property
    def token_entropy(self) -> Tensor:
        """Total uncertainty of each token, (n, T)."""
        return torch.special.entr(self.probabilities).sum(-1)

    @cached_property
    def token_mutual_information(self) -> Tensor:
        """Epistemic uncertainty of each token, (n, T): of its tag and the weights."""
        return mutual_information(self.token_entropy, self._token_aleatoric, len(self.logits))

    @property
    def predictive_entropy(self) -> Tensor:
        """Total uncertainty, (n,)."""
        return self._mean(self.token_entropy)

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric uncertainty, (n,)."""
        return self._mean(self._token_aleatoric)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty, (n,)."""
        return self._mean(self.token_mutual_information)

    @cached_property
    def _token_aleatoric(self) -> Tensor:
        return torch.special.entr(self.draw_probabilities).sum(-1).mean(0)

    def _mean(self, of_tokens: Tensor) -> Tensor:
        return of_tokens.sum(-1) / self.tokens.sum(-1)

    def tags(self) -> list[list[str]]:
        """The names of `labels`, of each input."""
        return [[self.likelihood.names[tag] for tag in row if tag != NO_TAG] for row in self.labels.tolist()]

    def entities(self) -> list[list[dict[str, Any]]]:
        """What `entities_of` reads in the tags of each input: type as ``entity``, ``start``, ``end``, ``probability``.

        The probability is that tags by each draw's probabilities are read as having exactly this entity, averaged over
        the draws.
        """
        return [
            [
                {"entity": kind, "start": start, "end": end, "probability": self._of_entity(i, kind, start, end)}
                for kind, start, end in entities_of(tags)
            ]
            for i, tags in enumerate(self.tags())
        ]

    def _of_entity(self, i: int, kind: str, start: int, end: int) -> float:
        draws = self.draw_probabilities[:, i].double()
        begins, goes_on = (
            draws[..., [name in {f"{mark}-{kind}" for mark in marks} for name in self.likelihood.names]].sum(-1)
            for marks in ENTITY_MARKS.values()
        )
        first = begins[:, start] + goes_on[:, start] * (1 - (begins + goes_on)[:, start - 1] if start else 1)
        last = 1 - goes_on[:, end] if end < draws.shape[1] else 1
        return (first * goes_on[:, start + 1 : end].prod(-1) * last).mean().item()

    def answers(self, columns: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Of each input the tag of each token, the entities, and how uncertain each token and the whole are."""
        per_token = ("token_confidence", "token_entropy", "token_mutual_information")
        rows = {name: getattr(self, name).tolist() for name in per_token}
        inputs = zip(columns, self.tags(), self.entities(), self._scores(), strict=True)
        for i, (words, tags, found, scores) in enumerate(inputs):
            yield {
                "tags": tags,
                "entities": [one | {"text": " ".join(words[one["start"] : one["end"]])} for one in found],
                **{name: values[i][: len(words)] for name, values in rows.items()},
                **scores,
            }


def _binary_entropy(probabilities: Tensor) -> Tensor:
    """Sum over the last dimension."""
    return (torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)).sum(-1)


def prediction_of(
    logits: Tensor,
    num_samples: int,
    likelihood: Likelihood,
    head_shares: Tensor | None = None,
    distances: Mapping[str, Tensor] | None = None,
) -> Prediction:
    """What draws' normalized logits (S, n, C) say, by their likelihood; with a Gaussian head's shares (n, 1 + C)."""
    prediction = KINDS[likelihood.name].from_logits(logits, num_samples, likelihood).with_distances(distances)
    return prediction if head_shares is None else replace(prediction, head_shares=head_shares)


def mutual_information(total: Tensor, aleatoric: Tensor, num_draws: Tensor | int) -> Tensor:
    r"""Mutual information of answer and weights, in nats, without the bias of a finite number of draws.

    .. math:: \frac{S}{S-1} \Big(H[\bar p] - \frac1S \sum_s H[p_s]\Big) \le H[\bar p]

    To second order the bracket is the draws' mean of :math:`\sum_c (p_{sc} - \bar p_c)^2 / 2 \bar p_c`, and the mean
    square of S independent deviations from their own mean is on average 1 - 1/S of the variance. So values from
    different S can be compared. Mirrored and linearized draws, which have no such bias, get the factor as well.

    Args:
        total: H[p̄], any shape.
        aleatoric: mean of H[p_s].
        num_draws: S, of each value or of all; the result is 0 for 1, of which it is not defined.
    """
    draws = torch.as_tensor(num_draws, device=total.device)
    estimate = (total - aleatoric).clamp_min(0) * draws / (draws - 1).clamp_min(1)
    return torch.minimum(estimate, total).where(draws > 1, 0)


def _entropy(log_probs: Tensor) -> Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)


KINDS: dict[str, type[Prediction]] = {
    kind.kind: kind for kind in (Prediction, RewardPrediction, MultiLabelPrediction, TagsPrediction, ValuePrediction)
}
"""Classes of predictions by the name of the likelihood."""
CLASSES = tuple(name for name, kind in KINDS.items() if not issubclass(kind, OtherPrediction))
"""The likelihoods of answers that exclude each other, of which there are probabilities."""

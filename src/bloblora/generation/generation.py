"""What N weight draws write, and how far they agree."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .agreement import Agree, clusters, same_text

_SCORES = (
    "log_probability",
    "sequence_log_probability",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "log_probability_variance",
    "agreement",
    "semantic_entropy",
)


@dataclass(frozen=True)
class Generation:
    r"""Answers to n prompts: of the averaged model and of each draw, with their uncertainty.

    The averaged answer y takes each token from :math:`\bar p_t = \frac1S\sum_s p_s(\cdot \mid y_{<t}, x)`, the
    token-level Bayesian model average (product of expectations; Malinin & Gales, arXiv 2002.07650). All draws read the
    same prefix; they aren't weighed anew by how well they foresaw it. T is the longest answer's number of tokens, the
    end-of-text token counted; where an answer has ended, values are 0. Probabilities are the model's own, before
    temperature, top-p and penalties.

    Attributes:
        texts: the averaged answers, n.
        draw_texts: for each prompt the answers of the S draws, each written on its own.
        tokens: the averaged answers, (n, T); the pad token or 0 after their end.
        draw_tokens: those of the draws, (S, n, T'), likewise.
        mask: (n, T) bool, which tokens belong to the averaged answer.
        draw_log_probs: log p_s of the averaged answer's tokens, (S, n, T) float32, nats.
        entropies: H[p̄_t], (n, T), nats.
        expected_entropies: the mean over draws of H[p_st], (n, T), nats.
        num_samples: N; 0 is the posterior mean (S = 1).
        agree: whether two answers mean the same.
    """

    texts: list[str]
    draw_texts: list[list[str]]
    tokens: Tensor
    draw_tokens: Tensor
    mask: Tensor
    draw_log_probs: Tensor
    entropies: Tensor
    expected_entropies: Tensor
    num_samples: int
    agree: Agree = same_text

    @property
    def log_probability(self) -> Tensor:
        """Mean over tokens of log p̄_t(y_t), (n,), nats: the length-normalized log-probability of the answer."""
        return self._token_mean(self._log_probs)

    @property
    def sequence_log_probability(self) -> Tensor:
        """Sum over tokens of log p̄_t(y_t), (n,), nats: the log-probability of the whole answer.

        Where an answer is decided at its first tokens and then spelled out, as a choice that stands in the prompt is,
        the mean over tokens says more of its length than of its truth.
        """
        return (self._log_probs * self.mask).sum(-1)

    @property
    def predictive_entropy(self) -> Tensor:
        """Mean over tokens of H[p̄_t], (n,), nats: total uncertainty."""
        return self._token_mean(self.entropies)

    @property
    def expected_entropy(self) -> Tensor:
        """Mean over tokens of the draws' mean entropy, (n,), nats: aleatoric uncertainty."""
        return self._token_mean(self.expected_entropies)

    @property
    def mutual_information(self) -> Tensor:
        """Mean over tokens of H[p̄_t] less the draws' mean entropy, (n,), nats: epistemic uncertainty."""
        return self._token_mean((self.entropies - self.expected_entropies).clamp_min(0))

    @property
    def log_probability_variance(self) -> Tensor:
        """Variance (S - 1) over draws of log p_s of the whole averaged answer, (n,), nats²; 0 for one draw."""
        return self.draw_log_probs.sum(-1).var(0, correction=min(1, len(self.draw_log_probs) - 1))

    @property
    def agreement(self) -> Tensor:
        """Share of pairs of draws whose answers agree, (n,); 1 for one draw."""
        return self._of_draws(lambda texts: _share_of_pairs(texts, self.agree))

    @property
    def semantic_entropy(self) -> Tensor:
        """Entropy of the draws over the clusters of answers that agree, (n,), nats; each draw counts the same.

        The discrete form of Farquhar et al. 2024 (Nature 630, 625-630); in [0, log S].
        """
        return self._of_draws(lambda texts: _entropy_of_counts(clusters(texts, self.agree)))

    def scores(self) -> dict[str, Tensor]:
        """Every measure of uncertainty by its name, each (n,)."""
        return {name: getattr(self, name) for name in _SCORES}

    @property
    def _log_probs(self) -> Tensor:
        """log p̄_t(y_t), (n, T)."""
        return torch.logsumexp(self.draw_log_probs, dim=0) - math.log(len(self.draw_log_probs))

    def _token_mean(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum(-1) / self.mask.sum(-1)

    def _of_draws(self, score: Callable[[list[str]], float]) -> Tensor:
        return torch.tensor([score(texts) for texts in self.draw_texts])


def _share_of_pairs(texts: list[str], agree: Agree) -> float:
    pairs = [first == second or agree(first, second) for first, second in combinations(texts, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def _entropy_of_counts(numbers: list[int]) -> float:
    shares = torch.tensor(numbers).bincount() / len(numbers)
    return torch.special.entr(shares).sum().item()

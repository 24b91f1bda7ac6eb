"""What weight draws say of the tokens of texts, and of whole texts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..prediction.kinds import mutual_information

SCORES = (
    "log_probability",
    "sequence_log_probability",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "log_probability_variance",
    "mixture_log_probability",
    "tokur_total",
    "tokur_aleatoric",
    "tokur_epistemic",
)
"""The measures of a text that follow from its tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    r"""n texts of up to T tokens under S draws; where a text has ended, values are 0.

    All draws read the same prefix, and :math:`\bar p_t = \frac1S\sum_s p_s(\cdot \mid y_{<t}, x)`: the token-level
    Bayesian model average (product of expectations; Malinin & Gales, arXiv 2002.07650).

    Attributes:
        tokens: the texts, (n, T).
        mask: (n, T) bool, which tokens belong to the text.
        draw_log_probs: log p_s of each token, (S, n, T) float32, nats.
        entropies: H[p̄_t], (n, T), nats.
        expected_entropies: the mean over draws of H[p_st], (n, T), nats.
        ranks: 1 + how many tokens are more probable under p̄_t than the text's, (n, T).
        num_samples: N; 0 is the posterior mean (S = 1).
    """

    tokens: Tensor
    mask: Tensor
    draw_log_probs: Tensor
    entropies: Tensor
    expected_entropies: Tensor
    ranks: Tensor
    num_samples: int

    @property
    def token_log_probs(self) -> Tensor:
        """log p̄_t(y_t), (n, T), nats."""
        return (torch.logsumexp(self.draw_log_probs, dim=0) - math.log(len(self.draw_log_probs))) * self.mask

    @property
    def token_mutual_information(self) -> Tensor:
        """Epistemic uncertainty of each token, (n, T), nats: 0 for a single draw, which doesn't define it."""
        return mutual_information(self.entropies, self.expected_entropies, len(self.draw_log_probs))

    @property
    def log_probability(self) -> Tensor:
        """Mean over tokens of log p̄_t(y_t), (n,), nats: the length-normalized log-probability of the text."""
        return self._token_mean(self.token_log_probs)

    @property
    def sequence_log_probability(self) -> Tensor:
        """Sum over tokens of log p̄_t(y_t), (n,), nats: the log-probability of the whole text.

        Where an answer is decided at its first tokens and then spelled out, as a choice that stands in the prompt is,
        the mean over tokens says more of its length than of its truth.
        """
        return self.token_log_probs.sum(-1)

    @property
    def draw_sequence_log_probs(self) -> Tensor:
        """log p_s of the whole text, (S, n), nats."""
        return self.draw_log_probs.sum(-1)

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
        """Mean over tokens of the epistemic uncertainty, (n,), nats: 0 for a single draw, which doesn't define it."""
        return self._token_mean(self.token_mutual_information)

    @property
    def log_probability_variance(self) -> Tensor:
        """Variance (S - 1) over draws of log p_s of the whole text, (n,), nats²; 0 for one draw."""
        return self.draw_sequence_log_probs.var(0, correction=min(1, len(self.draw_log_probs) - 1))

    @property
    def mixture_log_probability(self) -> Tensor:
        r"""Log of the mean over draws of the probability of the whole text, (n,), nats.

        :math:`\log \frac1S\sum_s \prod_t p_s(y_t \mid y_{<t}, x)`, the expectation of products of Malinin & Gales
        (arXiv 2002.07650), where `sequence_log_probability` is the product of expectations. The two differ where a
        text's first tokens say which draw it is from.
        """
        return self.draw_sequence_log_probs.logsumexp(0) - math.log(len(self.draw_log_probs))

    @property
    def tokur_total(self) -> Tensor:
        r"""Sum over tokens of H[p̄_t], (n,), nats: total uncertainty of a trace of reasoning by TokUR.

        TokUR (Zhang et al., arXiv 2505.11737) adds low-rank noise to a model's weights, takes the uncertainties of each
        token given the text before it, and sums them over the response: :math:`\tilde U(y \mid x) = \sum_t U(y_t \mid
        y_{<t}, x)`, for U the total (H[p̄_t]), the aleatoric (the mean of H[p_st]) and the epistemic uncertainty (their
        difference). Its noise is isotropic and not trained; here it is the adapter's posterior. The means over tokens
        are `predictive_entropy`, `expected_entropy` and, but for the correction for few draws, `mutual_information`.
        """
        return self.entropies.sum(-1)

    @property
    def tokur_aleatoric(self) -> Tensor:
        """Sum over tokens of the draws' mean entropy, (n,), nats: see `tokur_total`."""
        return self.expected_entropies.sum(-1)

    @property
    def tokur_epistemic(self) -> Tensor:
        """`tokur_total` without `tokur_aleatoric`, (n,), nats: 0 for a single draw, which doesn't define it."""
        return self.tokur_total - self.tokur_aleatoric

    def scores(self) -> dict[str, Tensor]:
        """Every measure of uncertainty by its name, each (n,)."""
        return {name: getattr(self, name) for name in SCORES}

    def part(self, row: int, tokens: Tensor) -> TokenScores:
        """One text of which only some tokens count: a claim within its context.

        Args:
            row: of the text.
            tokens: which of its tokens, (T',) bool for T' ≤ T.
        """
        tokens = pad(tokens, (0, self.mask.shape[1] - len(tokens)))
        return TokenScores(
            tokens=self.tokens[row, None],
            mask=(self.mask[row] & tokens)[None],
            draw_log_probs=self.draw_log_probs[:, row, None] * tokens,
            **{name: getattr(self, name)[row, None] * tokens for name in ("entropies", "expected_entropies", "ranks")},
            num_samples=self.num_samples,
        )

    def token_lists(self, row: int) -> dict[str, list]:
        """One text's values a token, as JSON takes them; ``draw_log_probabilities`` is a list for each draw."""
        kept = self.mask[row]
        values = {
            "log_probabilities": self.token_log_probs,
            "predictive_entropies": self.entropies,
            "mutual_information": self.token_mutual_information,
            "ranks": self.ranks,
        }
        lists = {"ids": self.tokens[row, kept].tolist()}
        lists |= {name: value[row, kept].tolist() for name, value in values.items()}
        return lists | {"draw_log_probabilities": self.draw_log_probs[:, row, kept].tolist()}

    def _token_mean(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum(-1) / self.mask.sum(-1)

"""What the model says of its own answer when it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..tasks.encoding import continuation_ids
from .scoring import score

QUESTION = "\nIs the proposed answer:\n (A) True\n (B) False\nThe proposed answer is:"
_CHOICES = (" (A)", " (B)")


def question_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the model reads after its answer: of `QUESTION` and the longer choice."""
    return len(continuation_ids(tokenizer, QUESTION)) + max(len(ids) for ids in _choices(tokenizer))


def p_true(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 10,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    r"""P(True) of Kadavath et al. (arXiv 2207.05221): the probability that an answer is true, by the model itself.

    The model reads the prompt, its answer and `QUESTION`, the paper's without the brainstormed answers and examples
    that the paper also tries. With :math:`\bar p` the mean over weight draws of the probability of a whole
    continuation,

    .. math:: P(\text{True}) = \bar p(\text{(A)}) / (\bar p(\text{(A)}) + \bar p(\text{(B)})),

    over the two choices alone, since a model that is trained on answers gives neither much.

    Args:
        model: as for `bloblora.generation.score`.
        prompts: n lists of token ids, as the model is to read them.
        answers: likewise; an end-of-text token is left out.
        tokenizer: of the question.
        num_samples: N draws; 0 uses the posterior mean.
        seed: of the draws.
        **options: of `bloblora.generation.score`.

    Returns:
        Probabilities (n,), on the CPU.
    """
    special, eos = set(tokenizer.all_special_ids), tokenizer.eos_token_id
    question = continuation_ids(tokenizer, QUESTION)
    asked = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ended = eos is not None and len(prompt) > 1 and prompt[-1] == eos  # of an encoder
        start = [*prompt[:-1]] if ended else [*prompt]
        asked.append([*start, *(t for t in answer if t not in special), *question, *([eos] if ended else [])])
    choices = _choices(tokenizer)
    prompts = [prompt for prompt in asked for _ in choices]
    found = score(model, prompts, choices * len(asked), num_samples, seed, **options)
    return torch.softmax(found.mixture_log_probability.unflatten(0, (-1, 2)), dim=-1)[:, 0]


def _choices(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [continuation_ids(tokenizer, choice) for choice in _CHOICES]

"""What a model is asked about answers: whether one is true, and whether two mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .. import models
from ..messages import quoted
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


class Entailment:
    """Whether two answers entail each other: the relation of Kuhn, Gal & Farquhar (arXiv 2302.09664), both directions.

    A model of natural language inference, such as microsoft/deberta-large-mnli, says of premise and hypothesis which of
    its labels is the most probable. As in the paper each answer stands after its prompt. What was asked once is kept.

    Args:
        model: a folder, or a name on the hub, of a sequence classifier of pairs that has a label ``entailment``.
        max_length: most tokens of a pair. The texts of a longer one lose their beginning, which is the prompt's.

    Raises:
        ModelError: it can't be loaded, lacks a trained head, or has no such label.
    """

    def __init__(self, model: str, max_length: int = 512) -> None:
        self._tokenizer, self._model = models.load_tokenizer(model), models.load_classifier(model)
        self._tokenizer.truncation_side = "left"  # at the end are the answers
        labels = {number: str(label) for number, label in (self._model.config.id2label or {}).items()}
        entails = [number for number, label in labels.items() if label.lower() == "entailment"]
        if len(entails) != 1:
            known = ", ".join(map(quoted, labels.values()))
            raise models.ModelError(f"nli:{model}: must have a label 'entailment'; its labels are {known}")
        self._entails, self._max_length = entails[0], max_length
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, first: str, second: str) -> bool:
        """Whether each of two texts entails the other."""
        key = (min(first, second), max(first, second))
        if key not in self._known:
            self._known[key] = self._asked(*key)
        return self._known[key]

    def after(self, prompt: str, answer: str) -> str:
        """What is compared of an answer to a prompt."""
        return f"{prompt} {answer}".strip()

    @torch.no_grad()
    def _asked(self, first: str, second: str) -> bool:
        pairs = [first, second], [second, first]
        limit = min(self._max_length, self._tokenizer.model_max_length)
        inputs = self._tokenizer(*pairs, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return bool((self._model(**inputs).logits.argmax(-1) == self._entails).all())


def _choices(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [continuation_ids(tokenizer, choice) for choice in _CHOICES]

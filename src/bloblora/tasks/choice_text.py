"""Multiple choice by text: a choice's logit is the log-likelihood of its text after the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bloblora.tasks.prompts import check_template, continuation_ids, fit_question
from bloblora.tasks.task import (
    Batch,
    Example,
    Record,
    Task,
    TaskError,
    check_answer,
    check_choices,
    check_text,
    collate_labels,
)
from bloblora.tasks.tree import collate_trees, tree_length, tree_log_likelihoods


@dataclass(frozen=True, kw_only=True)
class ChoiceText(Task):
    """Each choice scored by its text, log p(" " + choice | prompt); the prompt is computed once.

    Args:
        template: the prompt, with `{question}`; a space and the choice follow it.
        normalization: "length" for the mean of the tokens' log-probabilities, or "sum".
    """

    template: str = "Question: {question}\nAnswer:"
    normalization: str = "length"

    name: ClassVar[str] = "choice_text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template, "question")
        if self.normalization not in ("sum", "length"):
            raise TaskError(f"normalization: {self.normalization!r}; it must be 'sum' or 'length'")

    def columns(self, record: Record) -> list[str]:
        """The record's choices."""
        return list(record["choices"])

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The prompt as `prefix` and each choice as a branch, all of whose tokens are scored."""
        question, choices = check_text(record, "question"), check_choices(record)
        branches = [continuation_ids(tokenizer, " " + choice.strip()) for choice in choices]
        longest = max(map(len, branches))
        limit = None if self.max_length is None else self.max_length - longest
        prefix, cut = fit_question(tokenizer, self.template, question, limit)
        scored = [len(branch) for branch in branches]
        answer = check_answer(record, len(choices))
        return {"prefix": prefix, "branches": branches, "scored": scored, "truncated": cut, **answer}

    def length(self, example: Example) -> int:
        """Tokens of the question and all its choices."""
        return tree_length(example)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A row for each question with all its choices; see `collate_trees`."""
        return {**collate_trees(examples, self.pad_token_id), **collate_labels(examples)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-likelihoods (b, C) of the choices, nats, per token where normalization is "length"."""
        scores = tree_log_likelihoods(model, batch)
        return scores if self.normalization == "sum" else scores / batch["choice_lengths"].clamp(min=1)

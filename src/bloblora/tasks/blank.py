"""WinoGrande's blank: a choice's logit is the log-likelihood of the text after the blank it fills.

"Partial evaluation" of Trinh & Le, A Simple Method for Commonsense Reasoning (arXiv 1806.02847), section 3:
log p(text after | text before, choice), which doesn't depend on how common the choice itself is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bloblora.tasks.prompts import continuation_ids, fit_prefix, prompt_ids
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

_LONGEST = "the longest choice with the text after the blank"


@dataclass(frozen=True, kw_only=True)
class Blank(Task):
    """Which choice fills the `_` in the question, scored by the text that follows it."""

    name: ClassVar[str] = "blank"

    def columns(self, record: Record) -> list[str]:
        """The record's choices."""
        return list(record["choices"])

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The text before the blank as `prefix`; each choice with the text after it is a branch."""
        before, after = _split(check_text(record, "question"))
        choices = check_choices(record)
        # The space before a word is part of its token.
        prefix_text = before.rstrip()
        space = before[len(prefix_text) :]
        suffix = continuation_ids(tokenizer, after)
        prefix = prompt_ids(tokenizer, prefix_text)
        branches = [_filler_ids(tokenizer, prefix_text, space, choice) + suffix for choice in choices]
        longest = max(map(len, branches))
        kept = fit_prefix(prefix, longest, self.max_length, tokenizer.bos_token_id, _LONGEST)
        return {
            "prefix": kept,
            "branches": branches,
            "scored": [len(suffix)] * len(choices),
            "truncated": len(prefix) - len(kept),
            **check_answer(record, len(choices)),
        }

    def length(self, example: Example) -> int:
        """Tokens of the question and all its choices."""
        return tree_length(example)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A row for each question with all its choices; see `collate_trees`."""
        return {**collate_trees(examples, self.pad_token_id), **collate_labels(examples)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-likelihoods (b, C) of the text after the blank, nats."""
        return tree_log_likelihoods(model, batch)


def _filler_ids(tokenizer: PreTrainedTokenizerBase, before: str, space: str, choice: str) -> list[int]:
    """Token ids of a choice in its place, which may be the start of the text."""
    if before:
        return continuation_ids(tokenizer, space + choice.strip())
    return tokenizer(choice.strip(), add_special_tokens=False)["input_ids"]


def _split(question: str) -> tuple[str, str]:
    """The texts before and after the blank."""
    parts = re.split("_+", question)
    if len(parts) != 2:
        raise TaskError(f"field 'question': {question!r} has {len(parts) - 1} blanks '_'; it must have one")
    before, after = parts[0], parts[1].rstrip()
    if not after:
        raise TaskError(f"field 'question': {question!r} has no text after '_', which is what is scored")
    return before, after

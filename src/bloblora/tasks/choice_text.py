"""Multiple choice by text: a choice's logit is the log-likelihood of its text, or of the text after the blank it fills.

A question with all its choices is one row: a shared prefix and a branch for each choice.

    [left padding][prefix][branch 1][branch 2] ...

A 4D attention mask lets each branch see the prefix and itself, and its positions go on from the prefix's end,
so a branch's log-likelihood is the one it has alone after the prefix, while the prefix is computed once.
A row is an example: noise drawn for each row is drawn for each question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..contexts import unwrapped
from ..messages import quoted
from .encoding import check_template, collate_labels, continuation_ids, fit_prefix, fit_question, pad, prompt_ids
from .task import Batch, Choice, Example, Record, Score, TaskError

_MOST_TOKENS = 8192
"""Of a row; the mask of one has as many entries as its square, 0.3 GB in float32."""
_LONGEST = "the longest choice with the text after the blank"


class TreeChoice(Choice):
    """A choice as the branch of a tree."""

    scored_by: ClassVar[tuple[str, ...]] = ("echo",)
    branches: ClassVar[str] = "choices"
    """The field of a record that holds them."""

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """As every task's; a TaskError also where the question with all its choices has too many tokens."""
        example = super().encode(record, tokenizer)
        if (tokens := self.length(example)) > _MOST_TOKENS:
            raise TaskError(
                f"field {self.branches!r}: {len(example['branches'])} {self.branches} have {tokens} tokens with the "
                f"question, which are read together; at most {_MOST_TOKENS}: give fewer {self.branches}"
            )
        return example

    def length(self, example: Example) -> int:
        """Tokens of the question and all its choices."""
        return len(example["prefix"]) + sum(map(len, example["branches"]))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A row for each question with all its choices; see `collate_trees`."""
        return {**collate_trees(examples, self.pad_token_id), **collate_labels(examples)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What `choice_logit` makes of the log-likelihoods of the branches' scored tokens, (b, C)."""
        return self.choice_logit(tree_log_likelihoods(model, batch), batch["choice_lengths"].clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class ChoiceText(TreeChoice):
    """Each choice scored by its text, log p(" " + choice | prompt); the prompt is computed once."""

    template: str = field(
        default="Question: {question}\nAnswer:",
        metadata={"help": "The prompt, with {question}; a space and the choice follow it."},
    )
    normalization: Literal["length", "sum"] = field(
        default="length",
        metadata={
            "help": "How a choice is scored: length, by the average log-probability per token, which avoids favouring "
            "short choices and is less overconfident before training; or sum, by that of the whole text."
        },
    )

    name: ClassVar[str] = "choice_text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template, "question")
        if self.normalization not in ("sum", "length"):
            raise TaskError(f"normalization: {quoted(self.normalization)}; it must be 'sum' or 'length'")

    @classmethod
    def fits(cls, records: Sequence[Record]) -> bool:
        """Whether the records are questions with choices, of which `Blank` takes some."""
        return super().fits(records) and not Blank.fits(records)

    def tokenize(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The prompt as `prefix` and each choice as a branch, all of whose tokens are scored."""
        branches = [continuation_ids(tokenizer, " " + choice.strip()) for choice in record["choices"]]
        scored = [len(branch) for branch in branches]
        limit = None if self.max_length is None else self.max_length - max(scored)
        prefix, cut = fit_question(tokenizer, self.template, record["question"], limit)
        return {"prefix": prefix, "branches": branches, "scored": scored, "truncated": cut}

    def choice_logit(self, log_likelihood: Score, num_tokens: Score) -> Score:
        """The log-likelihood, per token where normalization is "length"."""
        return log_likelihood if self.normalization == "sum" else log_likelihood / num_tokens


@dataclass(frozen=True, kw_only=True)
class Blank(TreeChoice):
    """Which choice fills the `_` in the question, scored by the text that follows it.

    "Partial evaluation" of Trinh & Le, A Simple Method for Commonsense Reasoning (arXiv 1806.02847), section 3:
    log p(text after | text before, choice), which doesn't depend on how common the choice itself is.
    """

    name: ClassVar[str] = "blank"

    @classmethod
    def fits(cls, records: Sequence[Record]) -> bool:
        """Whether every question has a blank and two choices."""
        return super().fits(records) and all(
            "_" in str(record["question"]) and len(record.get("choices", ())) == 2 for record in records
        )

    def tokenize(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The text before the blank as `prefix`; each choice with the text after it is a branch."""
        before, after = _split(record["question"])
        # The space before a word is part of its token.
        prefix_text = before.rstrip()
        space = before[len(prefix_text) :]
        suffix = continuation_ids(tokenizer, after)
        prefix = prompt_ids(tokenizer, prefix_text)
        branches = [_filler_ids(tokenizer, prefix_text, space, choice) + suffix for choice in record["choices"]]
        kept = fit_prefix(prefix, max(map(len, branches)), self.max_length, tokenizer.bos_token_id, _LONGEST)
        scored, cut = [len(suffix)] * len(branches), len(prefix) - len(kept)
        return {"prefix": kept, "branches": branches, "scored": scored, "truncated": cut}


def _filler_ids(tokenizer: PreTrainedTokenizerBase, before: str, space: str, choice: str) -> list[int]:
    """Token ids of a choice in its place, which may be the start of the text."""
    if before:
        return continuation_ids(tokenizer, space + choice.strip())
    return tokenizer(choice.strip(), add_special_tokens=False)["input_ids"]


def _split(question: str) -> tuple[str, str]:
    """The texts before and after the blank."""
    parts = re.split("_+", question)
    if len(parts) != 2:
        raise TaskError(f"field 'question': {quoted(question)} has {len(parts) - 1} blanks '_'; it must have one")
    before, after = parts[0], parts[1].rstrip()
    if not after:
        raise TaskError(f"field 'question': {quoted(question)} has no text after '_', which is what is scored")
    return before, after


def collate_trees(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Examples with `prefix` (ids), `branches` (ids for each choice) and `scored` (how many last ids count).

    Returns, with T the longest row, M the most branch tokens in a row and C the most choices:
        input_ids, position_ids: (b, T).
        attention_mask: (b, 1, T, T) bool, True where a query (dim 2) sees a key (dim 3).
        choice_ids: (b, M), the choice that each of the last M tokens counts for, -1 for none.
        sources: (b, M), which of the last M+1 positions predicts that token.
        choice_lengths: (b, C), scored tokens of each choice, 0 for one that the question lacks.
    """
    rows = [_pack(example) for example in examples]
    window = 1 + max(len(row["choices"]) for row in rows)
    segments = pad([row["segments"] for row in rows], -1, side="left", length=window)
    # Counted from the right, where rows are aligned, a source doesn't depend on the padding.
    sources = [[window - source for source in row["sources"]] for row in rows]
    return {
        "input_ids": pad([row["ids"] for row in rows], pad_token_id, side="left", length=window),
        "position_ids": pad([row["positions"] for row in rows], 0, side="left", length=window),
        "attention_mask": _visible(segments).unsqueeze(1),
        "choice_ids": pad([row["choices"] for row in rows], -1, side="left"),
        "sources": pad(sources, 0, side="left"),
        "choice_lengths": pad([example["scored"] for example in examples], 0, side="right"),
    }


def tree_log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Log-likelihood of each choice's scored tokens, nats: (b, C) float32, -inf for choices it lacks."""
    sources = batch["sources"]
    width, window = batch["input_ids"].shape[1], sources.shape[1] + 1
    # Indices, not a number: a number makes a view, for which torch multiplies by a copy of the head an example.
    last = torch.arange(width - window, width, device=sources.device)
    advice = "use the task 'choice_letter', which needs no such mask"
    output = model(**tree_inputs(model, batch, advice), logits_to_keep=last)
    logits = output.logits.float()
    targets = batch["input_ids"][:, 1 - window :]
    rows = torch.arange(len(targets), device=targets.device).unsqueeze(1)
    return sums_by_choice(logits[rows, sources, targets] - logits.logsumexp(-1).gather(1, sources), batch)


def sums_by_choice(values: Tensor, batch: Batch) -> Tensor:
    """Sums over each choice's scored tokens, (b, C), of values of branch tokens (b, M); -inf for choices it lacks."""
    choice_ids, lengths = batch["choice_ids"], batch["choice_lengths"]
    counts_for = choice_ids.unsqueeze(-1) == torch.arange(lengths.shape[1], device=lengths.device)
    return torch.where(counts_for, values.unsqueeze(-1), 0).sum(1).masked_fill(lengths == 0, -torch.inf)


def tree_inputs(model: nn.Module, batch: Batch, advice: str) -> dict[str, Any]:
    """What a model takes of trees; a TaskError, with an advice, by `check_model`."""
    check_model(model, batch, advice)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": additive_mask(batch["attention_mask"], unwrapped(model).dtype),
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where a query sees a key, and the lowest number elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def check_model(model: nn.Module, batch: Batch, advice: str) -> None:
    """Raise a TaskError when the model would ignore or change the tree's mask."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        raise TaskError(
            f"attn_implementation: '{config._attn_implementation}' takes no 4D attention mask; load the "
            f"model with attn_implementation='sdpa', or {advice}"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(inner, "_is_stateful", False):
        found = ", ".join(sorted(kinds)) or "recurrent"
        raise TaskError(f"model: '{config.model_type}' has {found} layers, which ignore the mask; {advice}")
    window = getattr(config, "sliding_window", None)
    if window and batch["input_ids"].shape[1] > window and (longest := int(batch["position_ids"].max()) + 1) > window:
        raise TaskError(
            f"max_length: a question with its longest choice has {longest} tokens and the model's attention "
            f"window {window}; set max_length to {window} or less, or {advice}"
        )


def _pack(example: Example) -> dict[str, list[int]]:
    """One unpadded row; `sources` are counted from the row's end, 1 being its last token."""
    start = len(example["prefix"])
    ids, positions, segments = list(example["prefix"]), list(range(start)), [0] * start
    choices: list[int] = []
    sources: list[int] = []
    for choice, (branch, scored) in enumerate(zip(example["branches"], example["scored"], strict=True)):
        sources += [start - 1, *range(len(ids), len(ids) + len(branch) - 1)]
        ids += branch
        positions += range(start, start + len(branch))
        segments += [choice + 1] * len(branch)
        choices += [-1] * (len(branch) - scored) + [choice] * scored
    from_end = [len(ids) - source for source in sources]
    return {"ids": ids, "positions": positions, "segments": segments, "choices": choices, "sources": from_end}


def _visible(segments: Tensor) -> Tensor:
    """Which token sees which, (b, T, T) bool; segments (b, T): -1 padding, 0 prefix, 1.. branches."""
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    related = (query >= 0) & ((key == 0) | (key == query))
    # Padding sees itself: a query that sees nothing would be NaN.
    return (related & causal) | torch.eye(length, dtype=torch.bool)

"""Multiple choice by letter, as in the BLoB paper (arXiv 2406.11675): the prompt lists the choices as
"A) text" and the answer is the letter, one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bloblora.tasks.head import label_logits
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
    pad,
)

# Models whose logits are their head's output and nothing more; others scale or cap them.
_PLAIN_LOGITS = frozenset(
    (
        "gemma",
        "gpt2",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    )
)


@dataclass(frozen=True, kw_only=True)
class ChoiceLetter(Task):
    """The letter of the right choice, from the logits of the letters' tokens after the prompt.

    Args:
        template: the prompt, with `{question}` and `{choices}` (a line "A) text" for each); " A" follows it.
    """

    template: str = (
        "Return the label of the correct answer for the question below.\n\n"
        "Question: {question}\nChoices:\n{choices}\nAnswer:"
    )

    name: ClassVar[str] = "choice_letter"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template, "question", "choices")

    def columns(self, record: Record) -> list[str]:
        """The record's choices, whose letters are A, B, ... in this order."""
        return list(record["choices"])

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """`input_ids` of the prompt and `letter_ids`, the token of each choice's letter."""
        question, choices = check_text(record, "question"), check_choices(record)
        if len(choices) > len(ascii_uppercase):
            raise TaskError(f"field 'choices': {len(choices)} of them; there are letters for at most 26")
        letters = ascii_uppercase[: len(choices)]
        lines = "\n".join(f"{letter}) {text.strip()}" for letter, text in zip(letters, choices, strict=True))
        ids, cut = fit_question(tokenizer, self.template, question, self.max_length, choices=lines)
        return {
            "input_ids": ids,
            "letter_ids": [_letter_id(tokenizer, letter) for letter in letters],
            "truncated": cut,
            **check_answer(record, len(choices)),
        }

    def collate(self, examples: Sequence[Example]) -> Batch:
        """`input_ids`, `attention_mask`, `position_ids` (b, T) padded left; `letter_ids` (b, C), -1: none."""
        rows = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad(rows, self.pad_token_id, side="left"),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, side="left"),
            "position_ids": pad([range(len(row)) for row in rows], 0, side="left"),
            "letter_ids": pad([example["letter_ids"] for example in examples], -1, side="right"),
            **collate_labels(examples),
        }

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The letters' logits (b, C) at the last position, float32."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        # A letter's token is the same in every question, so the longest question has them all.
        letters = batch["letter_ids"].amax(0)
        if (causal := _plain_causal_model(model)) is not None:
            hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state[:, -1:]
            logits = label_logits(causal.get_output_embeddings(), hidden, letters)
        else:
            # An index, not a number, for the reason given in `tree_log_likelihoods`.
            last = torch.tensor([inputs["input_ids"].shape[1] - 1], device=letters.device)
            logits = model(**inputs, logits_to_keep=last, use_cache=False).logits[:, -1:, letters]
        return logits.squeeze(1).float().masked_fill(batch["letter_ids"] < 0, -torch.inf)


def _plain_causal_model(model: nn.Module) -> PreTrainedModel | None:
    """The language model if its parts can be called by themselves: not in training or split by FSDP, where wrappers
    (DDP, mixed precision) must see the forward, and only where logits are the head's output.
    """
    if isinstance(model, FSDPModule):
        return None
    if isinstance(model, PeftModel) and not model.active_peft_config.is_prompt_learning:
        model = model.get_base_model()
    known = isinstance(model, PreTrainedModel) and model.config.model_type in _PLAIN_LOGITS
    return model if known and not model.training else None  # type: ignore[return-value]


def _letter_id(tokenizer: PreTrainedTokenizerBase, letter: str) -> int:
    ids = continuation_ids(tokenizer, " " + letter)
    if len(ids) != 1:
        raise TaskError(f"tokenizer: ' {letter}' is {len(ids)} tokens, not one; use the task 'choice_text'")
    return ids[0]

"""Multiple choice by letter, as in the BLoB paper (arXiv 2406.11675): the prompt lists the choices as
"A) text" and the answer is the letter, one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..contexts import standing_for
from .encoding import check_template, collate_labels, continuation_ids, fit_question, pad, pad_left
from .task import Batch, Choice, Example, Record, TaskError

# Models whose logits are their head's output and nothing more; others scale or cap them.
_PLAIN_LOGITS = {
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
}


@dataclass(frozen=True, kw_only=True)
class ChoiceLetter(Choice):
    """The letter of the right choice, from the logits of the letters' tokens after the prompt."""

    template: str = field(
        default="Return the label of the correct answer for the question below.\n\n"
        "Question: {question}\nChoices:\n{choices}\nAnswer:",
        metadata={
            "help": "The prompt, with {question} and {choices} (a line 'A) text' for each); the letter follows it "
            "after a space."
        },
    )

    name: ClassVar[str] = "choice_letter"
    scored_by: ClassVar[tuple[str, ...]] = ("echo", "top_logprobs")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template, "question", "choices")

    @classmethod
    def fits(cls, records: Sequence[Record]) -> bool:
        """Never: `choice_text` takes any question with choices."""
        return False

    def tokenize(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """`input_ids` of the prompt and `letter_ids`, the token of each choice's letter, A, B, ... in their order."""
        choices = record["choices"]
        if len(choices) > len(ascii_uppercase):
            raise TaskError(f"field 'choices': {len(choices)} of them; there are letters for at most 26")
        letters = ascii_uppercase[: len(choices)]
        lines = "\n".join(f"{letter}) {text.strip()}" for letter, text in zip(letters, choices, strict=True))
        ids, cut = fit_question(tokenizer, self.template, record["question"], self.max_length, choices=lines)
        return {"input_ids": ids, "letter_ids": [_letter_id(tokenizer, x) for x in letters], "truncated": cut}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """`input_ids`, `attention_mask`, `position_ids` (b, T) padded left; `letter_ids` (b, C), -1: none."""
        return {
            **pad_left([example["input_ids"] for example in examples], self.pad_token_id),
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

    def continuations(self, example: Example) -> tuple[list[int], list[list[int]], list[int]]:
        """The prompt, and the letters' tokens, each scored."""
        return example["input_ids"], [[token] for token in example["letter_ids"]], [1] * len(example["letter_ids"])


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


def label_logits(head: nn.Module, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """`head(hidden)[..., token_ids]`, computed for those rows alone where the head allows it.

    Args:
        head: nn.Linear, or PEFT's LoRA of one (plain, or a variant with `project` and `expand`); others run in full.
        hidden: (b, T, d); the first dimension is the examples, which a variant's noise is drawn for.
        token_ids: (C,).

    Returns: (b, T, C).
    """
    if _is_plain(head):
        return _rows(head, hidden, token_ids)
    head = standing_for(head)
    if not isinstance(head, LoraLinear) or not _splits_by_row(head):
        return head(hidden)[..., token_ids]
    result = _rows(head.base_layer, hidden, token_ids)
    dtype = result.dtype
    if head.merged or head.disable_adapters:
        return result
    for adapter in head.active_adapters:
        if adapter in head.lora_A:
            result = result + _adapter_rows(head, adapter, hidden, token_ids) * head.scaling[adapter]
    return result.to(dtype)


def _is_plain(layer: nn.Module) -> bool:
    """True for a Linear with an ordinary weight: quantized ones subclass it, offloaded ones have a hook."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not _is_hooked(layer)


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"))


def _splits_by_row(head: LoraLinear) -> bool:
    """True when the layer is base rows plus rows of B and nobody asks for its input; disabling a merged one makes PEFT
    unmerge it first.
    """
    if _is_hooked(head):
        return False
    variants = [head.lora_variant[name] for name in head.active_adapters if name in head.lora_variant]
    projects = all(hasattr(variant, "expand") for variant in variants)
    return _is_plain(head.base_layer) and projects and not (head.merged and head.disable_adapters)


def _adapter_rows(head: LoraLinear, adapter: str, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """The adapter's part, unscaled: (b, T, C)."""
    variant: Any = head.lora_variant.get(adapter)
    weight: Any = head.lora_A[adapter].weight
    x = head._cast_input_dtype(hidden, weight.dtype)
    if variant is not None:
        return variant.expand(head, adapter, variant.project(head, adapter, x), token_ids)
    return _rows(head.lora_B[adapter], head.lora_A[adapter](head.lora_dropout[adapter](x)), token_ids)


def _rows(linear: Any, x: Tensor, token_ids: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias[token_ids]
    return F.linear(x, linear.weight[token_ids], bias)

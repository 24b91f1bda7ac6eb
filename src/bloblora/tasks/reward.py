r"""Preferences between pairs of texts: a reward for each, a sequence classification head with one output.

.. math:: p(\text{a is preferred to b} \mid x, w) = \sigma\big(r_w(x, a) - r_w(x, b)\big)

(Bradley & Terry 1952, doi 10.2307/2334029), and of several responses a softmax of their rewards. Where a pair has a
margin m, training takes m off the difference, so that it grows beyond m (Llama 2, arXiv 2307.09288, equation 2; TRL);
evaluation and prediction know no margin, because with it the two probabilities don't add up to 1. A prompt with all its
responses is one row, a tree as of `choice_text`: the head is read at the last token of each response. So the prompt is
computed once, and noise that is drawn for a row is the same for both responses of a pair, of whose difference the
likelihood is. A reward is that of the text alone, as plain transformers give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..contexts import hooked, unwrapped
from .choice_text import TreeChoice, sums_by_choice, tree_inputs
from .encoding import fit_prefix, prompt_ids
from .generation import chat_ids, ended, plain_ids
from .likelihood import BradleyTerry, Likelihood
from .task import Batch, Example, Record, TaskError


@dataclass(frozen=True, kw_only=True)
class Reward(TreeChoice):
    """Which response to a prompt is preferred, by the reward of each; what is too long loses the prompt's beginning.

    Prompts and responses are texts, or lists of messages in the tokenizer's chat template. A response that is a text
    follows its prompt as of the task `generation`, and ends in the end-of-text token.
    """

    name: ClassVar[str] = "reward"
    kind: ClassVar[str] = "preference"
    branches: ClassVar[str] = "responses"
    scored_by: ClassVar[tuple[str, ...]] = ()
    answer: ClassVar[str] = "chosen"
    pipeline_tag: ClassVar[str] = "text-classification"
    task_type: ClassVar[str] = "SEQ_CLS"
    family: ClassVar[type[Likelihood]] = BradleyTerry
    head: ClassVar[tuple[str, ...]] = ("reward",)
    head_module: ClassVar[str] = "score"
    needs: ClassVar[str] = "rewards are read at the end of each response, which needs a causal model, such as Llama"

    @classmethod
    def check(cls, records: Sequence[Record], **options: Any) -> None:
        """Raise a TaskError also for a record without a preference."""
        super().check(records, **options)
        for number, record in enumerate(records, start=1):
            if "chosen" not in record:
                raise TaskError(f"record {number}: field 'chosen': missing; task {cls.name!r} learns from pairs")

    @property
    def head_note(self) -> str:
        """Where the output is, and what it means."""
        return (
            "the head's output at the last token, the end of the text, is the reward of a prompt with its response; "
            "only differences between responses to one prompt mean something"
        )

    @property
    def purpose(self) -> str:
        """What it is for, in a sentence."""
        return "Says which response to a prompt is better, by a reward for each."

    def columns(self, record: Record) -> list[str]:
        """The responses; of messages the last one's content."""
        return [one if isinstance(one, str) else one[-1]["content"] for one in responses_of(record)]

    def target(self, record: Record) -> int | None:
        """Index of the chosen one."""
        return responses_of(record).index(record["chosen"]) if "chosen" in record else None

    def tokenize(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The prompt as `prefix` and each response as a branch; what is before it too where prompts differ."""
        pairs = [_ids(record.get("prompt"), response, tokenizer) for response in responses_of(record)]
        longest = max(len(response) for _, response in pairs)
        room = (longest, self.max_length, tokenizer.bos_token_id, "the longest response")
        kept = [fit_prefix(prompt, *room) for prompt, _ in pairs]
        cut = max(len(prompt) - len(rest) for (prompt, _), rest in zip(pairs, kept, strict=True))
        prefix = kept[0] if all(one == kept[0] for one in kept) else []
        branches = [[*one[len(prefix) :], *ids] for one, (_, ids) in zip(kept, pairs, strict=True)]
        return {"prefix": prefix, "branches": branches, "scored": [1] * len(branches), "truncated": cut}

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """As of choices; with the `margin` of a preference that has one."""
        margin = record.get("margin") if "chosen" in record else None
        return super().encode(record, tokenizer) | ({"margin": float(margin)} if margin else {})

    def collate(self, examples: Sequence[Example]) -> Batch:
        """As of choices; and `margins` (b,), where there are any."""
        margins = torch.tensor([example.get("margin", 0.0) for example in examples])
        return {**super().collate(examples), **({"margins": margins} if margins.any() else {})}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The reward of each response, (b, C) float32; -inf for responses that a record lacks.

        In training that of the chosen one is less by the margin.

        Raises:
            TaskError: a model whose head isn't one output of each token, as that of causal models is.
        """
        found: list[Tensor] = []
        inner = unwrapped(model)
        head = getattr(inner.get_base_model() if isinstance(inner, PeftModel) else inner, self.head_module, None)
        if head is None:
            raise TaskError(f"model: it has no head named {self.head_module!r}; {self.needs}")

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            found.append(output)

        with hooked([(head.register_forward_hook, keep)]):
            model(**tree_inputs(model, batch, "shorten responses, or load another model"))
        choice_ids = batch["choice_ids"]
        values = found[0][:, -choice_ids.shape[1] :].float()
        if values.shape != (*choice_ids.shape, 1):
            raise TaskError(f"model: its head gives {values.shape[-1]} numbers; load it with num_labels=1")
        rewards = sums_by_choice(values.squeeze(-1), batch)
        if model.training and "margins" in batch:
            return rewards.scatter_add(1, batch["labels"].unsqueeze(1), -batch["margins"].to(rewards).unsqueeze(1))
        return rewards


def responses_of(record: Record) -> list[Any]:
    """A record's responses; of a preference both, in an order that doesn't say which was chosen."""
    if "responses" in record:
        return list(record["responses"])
    return sorted([record["chosen"], record["rejected"]], key=str)


def _ids(prompt: Any, response: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a response, which may bring its own prompt as messages."""
    if not isinstance(response, str):
        before = prompt if isinstance(prompt, list | tuple) else [{"role": "user", "content": prompt}] if prompt else []
        messages = [*response] if len(response) > 1 else [*before, *response]
        given, answer = chat_ids({"messages": messages}, tokenizer)
    elif prompt is None:
        text = tokenizer(response, add_special_tokens=False)["input_ids"]
        given, answer = prompt_ids(tokenizer, ""), ended(tokenizer, text)
    elif isinstance(prompt, str):
        given, answer = plain_ids({"prompt": prompt, "response": response}, tokenizer)
    else:
        given, answer = chat_ids({"messages": [*prompt, {"role": "assistant", "content": response}]}, tokenizer)
    assert answer is not None
    return given, answer

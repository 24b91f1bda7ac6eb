r"""Open text: a record's log-likelihood is that of its whole response after its prompt.

.. math:: \log p(y \mid x) = \sum_t \log p(y_t \mid y_{<t}, x)

The sum and not the mean over tokens, because the ELBO weighs the KL against the likelihood of whole examples: with D of
them its weight is 1/D, whatever their lengths. A mean would count the KL once per token of an average response instead,
and the tokens of a short response more than those of a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..limits import time_limit
from ..messages import quoted, shortened
from .encoding import collate_labels, continuation_ids, fit_prefix, pad, pad_left, prompt_ids
from .likelihood import Likelihood, Text
from .task import Batch, Example, Record, Task, TaskError

_NO_TOKEN = -100
_MOST_LIKELY = -1e-6


@dataclass(frozen=True, kw_only=True)
class TextGeneration(Task):
    """The response to a prompt, or the last message of a chat in the tokenizer's template.

    A response follows its prompt after a space, unless there is white space already, and ends in the end-of-text token.
    Of a chat only the last message, the assistant's, is learnt.
    """

    name: ClassVar[str] = "generation"
    kind: ClassVar[str] = "generation"
    answer: ClassVar[str] = "response"
    family: ClassVar[type[Likelihood]] = Text
    pipeline_tag: ClassVar[str] = "text-generation"

    @property
    def purpose(self) -> str:
        """What it is for, in a sentence."""
        return "Writes the answer to a prompt."

    def columns(self, record: Record) -> list[str]:
        """The record's response, and whatever else could be written."""
        return ["response", "other"]

    def target(self, record: Record) -> int | None:
        """The response's column."""
        messages = record.get("messages")
        answered = messages[-1]["role"] == "assistant" if messages else record.get("response") is not None
        return 0 if answered else None

    def tokenize(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """Token ids of `prompt` and, where the record has one, of `response`, all of whose tokens count."""
        prompt, response = (chat_ids if "messages" in record else plain_ids)(record, tokenizer)
        if not prompt:
            field = "messages" if "messages" in record else "prompt"
            maker = "the tokenizer's chat template" if "messages" in record else "the tokenizer"
            raise TaskError(f"field '{field}': {maker} makes no token of {quoted(record[field])}; it must have one")
        room, what = (1, "an answer") if response is None else (len(response), "the response")
        kept = fit_prefix(prompt, room, self.max_length, tokenizer.bos_token_id, what)
        example = {"prompt": kept, "truncated": len(prompt) - len(kept)}
        return example if response is None else example | {"response": response}

    def length(self, example: Example) -> int:
        """Tokens of the prompt and the response."""
        return len(example["prompt"]) + len(example.get("response", ()))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """`input_ids`, `attention_mask`, `position_ids` (b, T) padded left; `response_ids` and `labels` of responses.

        `response_ids` (b, M), M = the longest response, are padded left with -100; `labels` (b,) are 0, the response's
        column. Where an example has none, the batch is of prompts alone.
        """
        responses = [example.get("response", []) for example in examples]
        rows = [[*example["prompt"], *response] for example, response in zip(examples, responses, strict=True)]
        batch = pad_left(rows, self.pad_token_id)
        if not all(responses):
            return batch
        return batch | {"response_ids": pad(responses, _NO_TOKEN, side="left")} | collate_labels(examples)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities (b, 2) of the response and of anything else, nats, float32.

        The second keeps a softmax from changing the first, so that cross-entropy is the response's own NLL.
        """
        log_likelihood = self.token_log_probs(model, batch).sum(-1).clamp(max=_MOST_LIKELY)
        return torch.stack([log_likelihood, torch.log(-torch.expm1(log_likelihood))], dim=-1)

    def token_log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """log p of each token of the responses, nats, (b, M) float32; 0 where a shorter response has none."""
        logits = self.token_logits(model, batch)
        return -F.cross_entropy(logits.mT, batch["response_ids"], ignore_index=_NO_TOKEN, reduction="none")

    def token_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (b, M, V) that predict the tokens of the responses, float32."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        width, window = inputs["input_ids"].shape[1], batch["response_ids"].shape[1]
        # Indices, not a number, for the reason given in `tree_log_likelihoods`.
        before = torch.arange(width - window - 1, width - 1, device=inputs["input_ids"].device)
        return model(**inputs, logits_to_keep=before, use_cache=False).logits.float()


def plain_ids(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int] | None]:
    """Token ids of the prompt and the response."""
    # A space at the end belongs to the response's first token.
    prompt = record["prompt"].rstrip(" ")
    ids = prompt_ids(tokenizer, prompt)
    if record.get("response") is None:
        return ids, None
    response = record["response"].strip(" ")
    space = "" if prompt[-1].isspace() or response[0].isspace() else " "
    return ids, ended(tokenizer, continuation_ids(tokenizer, space + response))


def chat_ids(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int] | None]:
    """Token ids up to where the assistant's last message starts, and of that message."""
    if tokenizer.chat_template is None:
        raise TaskError("tokenizer: has no chat template; write records with 'prompt' and 'response'")
    messages = [dict(message) for message in record["messages"]]
    if [message["role"] for message in messages] == ["assistant"]:
        raise TaskError("field 'messages': the only one is the assistant's; there must be one that it answers")
    answered = messages[-1]["role"] == "assistant"
    try:
        with time_limit("tokenizer: filling its chat template"):
            prompt = _render(tokenizer, messages[:-1] if answered else messages, add_generation_prompt=True)
            whole = _render(tokenizer, messages) if answered else prompt
    except TimeoutError:  # of any record
        raise
    except Exception as error:  # a template is a program, which fails in any way
        reason = shortened(str(error) or type(error).__name__)
        raise TaskError(f"field 'messages': the chat template can't be filled: {reason}") from None
    if not whole.startswith(prompt):
        raise TaskError(
            "tokenizer: its chat template changes what precedes the last message; use 'prompt' and 'response'"
        )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not answered:
        return ids, None
    return ids, ended(tokenizer, tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"])


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """A response up to the end-of-text token, which is added where there is none.

    Raises:
        TaskError: more of its text follows that token; white space may, as chat templates have it.
    """
    eos = tokenizer.eos_token_id
    if eos is None or eos not in ids:
        return ids if eos is None else [*ids, eos]
    end = ids.index(eos) + 1
    if (rest := str(tokenizer.decode(ids[end:], skip_special_tokens=True))).strip():
        raise TaskError(
            f"response: {quoted(rest)} follows the end-of-text token {tokenizer.eos_token!r}, which ends a response; "
            "leave that token out"
        )
    return ids[:end]

"""Texts to token ids, and those of several examples to one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import Formatter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..messages import quoted
from .task import Batch, Example, TaskError


def check_template(template: str, *fields: str) -> None:
    """Raise a TaskError unless the template has exactly these fields, each once, and no space at its end."""
    try:
        found = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise TaskError(f"template: {quoted(template)}: {error}; write literal braces as '{{{{' and '}}}}'") from None
    wanted = " and ".join(f"{{{field}}}" for field in fields)
    if sorted(found) != sorted(fields):
        raise TaskError(f"template: {quoted(template)}; it must have {wanted}, each once, and no other field")
    if template != template.rstrip(" "):
        raise TaskError(f"template: {quoted(template)} ends in a space, which belongs to the answer; leave it out")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that opens a sequence, with the tokenizer's BOS if it adds one, never an EOS."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id]
    adds_bos = tokenizer(text)["input_ids"][:1] == bos != ids[:1]
    return [*bos, *ids] if adds_bos else ids


def ends_with_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts no token of its own behind a text, as those of decoders do."""
    return tokenizer("a")["input_ids"][-1:] == tokenizer("a", add_special_tokens=False)["input_ids"][-1:]


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that follows another.

    SentencePiece tokenizers (Llama 2) put a space before whatever they are given, so the text is tokenized
    after a letter, which is taken off again, unless the two merge into one token.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a" + text, add_special_tokens=False)["input_ids"]
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def fit_prefix(ids: list[int], room: int, limit: int | None, bos_token_id: int | None, what: str) -> list[int]:
    """Token ids that leave ``room`` within ``limit``, shortened from the left but for their BOS.

    Raises:
        TaskError: nothing would be left; ``what`` says for what the room is.
    """
    if limit is None or len(ids) + room <= limit:
        return ids
    bos = ids[:1] if ids[:1] == [bos_token_id] else []
    kept = limit - room - len(bos)
    if kept < 1:
        raise TaskError(f"max_length: {limit} tokens are too few for {what}, {room} tokens")
    return bos + ids[-kept:]


def fit_question(
    tokenizer: PreTrainedTokenizerBase, template: str, question: str, limit: int | None, **fields: str
) -> tuple[list[int], int]:
    """Token ids of the filled template within `limit` tokens, and how many of the question's were cut off.

    Only the question is shortened, from its left: what is asked usually stands at its end.

    Raises:
        TaskError: the prompt is too long even without the question.
    """

    def encode(**texts: str) -> list[int]:
        return prompt_ids(tokenizer, template.format(**texts, **fields))

    return fit_texts(encode, tokenizer, {"question": question}, limit, side="left")


def fit_texts(
    encode: Callable[..., list[int]],
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    limit: int | None,
    *,
    side: str,
) -> tuple[list[int], int]:
    """What `encode` makes of texts by name within `limit` tokens, and how many of the texts' were cut off.

    The text with the most tokens is shortened, from this side.

    Raises:
        TaskError: it is too long even without that text.
    """
    ids = encode(**texts)
    if limit is None or len(ids) <= limit:
        return ids, 0
    words = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
    shorter, total = dict(texts), sum(map(len, words.values()))
    # Tokens can merge differently after a cut, so one may leave a few too many.
    while (excess := len(ids) - limit) > 0:
        name = max(words, key=lambda name: len(words[name]))
        if excess >= len(words[name]):
            raise TaskError(f"max_length: {max(limit, 0)} tokens are left for the prompt, too few for a {name}")
        words[name] = words[name][excess:] if side == "left" else words[name][:-excess]
        text = str(tokenizer.decode(words[name]))
        shorter[name] = text.lstrip() if side == "left" else text
        ids = encode(**shorter)
    return ids, total - sum(map(len, words.values()))


def pad(rows: Sequence[Sequence[int]], value: int, *, side: str, length: int = 0) -> Tensor:
    """Rows of ints as one (b, T) tensor, T = the longest row or `length` if that is more."""
    width = max(length, *(len(row) for row in rows), 0)
    filler = [[value] * (width - len(row)) for row in rows]
    pairs = zip(filler, rows, strict=True)
    return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for f, row in pairs])


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> Batch:
    """`input_ids`, `attention_mask` and `position_ids` (b, T) of token ids, padded on the left."""
    return {
        "input_ids": pad(rows, pad_token_id, side="left"),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, side="left"),
        "position_ids": pad([range(len(row)) for row in rows], 0, side="left"),
    }


def collate_labels(examples: Sequence[Example]) -> Batch:
    """`{"labels": (b,)}` when every example has a label, otherwise empty."""
    if not all("label" in example for example in examples):
        return {}
    return {"labels": torch.tensor([example["label"] for example in examples])}

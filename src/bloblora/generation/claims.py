"""Claims: the parts of a text that have scores of their own, such as its sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..messages import quoted
from ..tasks import TaskError

Span = tuple[int, int]
"""Where a claim starts and ends in its text, in characters."""


def sentences(text: str) -> list[Span]:
    """The sentences of a text: what ends in ``.``, ``!`` or ``?`` before white space, or at the end of a line.

    It knows no abbreviations: "e.g. this" is two.
    """
    return [match.span() for match in re.finditer(r"(?=\S)(?:.*?[.!?](?=\s|$)|.*\S)", text)]


def claims_of(record: Mapping[str, Any], text: str, by: str | None) -> list[Span]:
    """The claims of a record: those it has as ``claims``, texts or ``[start, end]``; else the sentences, or none.

    Args:
        record: with its claims, or without.
        text: that they are parts of.
        by: ``sentences``, or None.

    Raises:
        TaskError: a claim isn't a part of the text.
        ValueError: ``by`` is another word.
    """
    if by not in (None, "sentences"):
        raise ValueError(f"claims must be 'sentences' or None, got {quoted(by)}")
    if (claims := record.get("claims")) in (None, ""):  # the second of a table
        return sentences(text) if by == "sentences" else []
    if not isinstance(claims, list | tuple):
        raise TaskError(f"field 'claims': {quoted(claims)} must be a list of texts or of [start, end]")
    return [_span(claim, number, text) for number, claim in enumerate(claims)]


def claim_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, spans: Sequence[Span]) -> list[Tensor]:
    """Which of a text's tokens each of its spans has a character of, (T,) bool.

    Raises:
        TaskError: the tokens aren't those of the text, as where a tokenizer changes its case.
    """
    bare = text.strip()  # white space around it may be without tokens
    # A character may have several tokens, so each token's end is that of all tokens so far.
    ends = torch.tensor([len(str(tokenizer.decode(ids[: i + 1]))) for i in range(len(ids))])
    starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
    starts = torch.where(starts < ends, starts, (ends - 1).clamp_min(0))  # one more of the last character
    # Of a chat the template has text before it, and special tokens after it.
    silent = (not str(tokenizer.decode(token, skip_special_tokens=True)).strip() for token in reversed(ids))
    end = len(ids) - len([*takewhile(bool, silent)])
    if (place := str(tokenizer.decode(ids[:end])).rfind(bare)) < 0:
        raise TaskError(f"claims: the tokenizer changes the text {text[:40]!r}, so that no claim can be found in it")
    shift = place - text.index(bare)
    return [(starts < shift + end) & (ends > shift + start) for start, end in spans]


def _span(claim: Any, number: int, text: str) -> Span:
    where = f"field 'claims', item {number}: {quoted(claim)}"
    if isinstance(claim, str):
        if not claim.strip() or (start := text.find(claim)) < 0:
            raise TaskError(f"{where} must be a part of the response, {text[:40]!r}")
        return start, start + len(claim)
    if not (isinstance(claim, list | tuple) and len(claim) == 2 and all(type(place) is int for place in claim)):
        raise TaskError(f"{where} must be a text, or [start, end]")
    start, end = claim
    if not 0 <= start < end <= len(text):
        raise TaskError(f"{where} must be places in the response, 0 <= start < end <= {len(text)}")
    if text[start:end].isspace():
        raise TaskError(f"{where} must be places of more than white space")
    return start, end

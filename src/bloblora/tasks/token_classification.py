"""Token classification: a text as a list of words, a tag for each of them, a head that reads each token.

The words are read as one text, with spaces between them, and a word's tag at the last of its sub-tokens: a causal
model, which has not seen the others at the first, can't tell "card" from "carbon" there. A record is one row, so all
its words see one draw of the weights, and given that their tags are independent.

In tags of the form BIO (Ramshaw & Marcus 1995, arXiv cmp-lg/9505040) entities are read as conlleval and seqeval do:
``B-X`` begins one of type X, and so does an ``I-X`` that doesn't follow a tag of the same type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..contexts import unwrapped
from ..messages import quoted
from .classification import OneOfLabels, shown_labels
from .encoding import pad
from .likelihood import Likelihood, Tags
from .task import Batch, Example, Record, Task, TaskError

ENTITY_MARKS = {"B": ("B", "S", "U"), "I": ("I", "E", "L")}
"""What stands before the ``-`` of tags that begin an entity, and that go on with one: in BIO, and in BIOES (BILOU)."""
_MARKS = [*ENTITY_MARKS["B"], *ENTITY_MARKS["I"]]


@dataclass(frozen=True, kw_only=True)
class TokenClassification(OneOfLabels):
    """The tag of each token."""

    sub_token: Literal["last", "first"] = field(
        default="last",
        metadata={
            "help": "At which of a word's tokens its tag is read: `last`, where also a causal model has read the whole "
            "word; or `first`, as usual with encoders and in other programs."
        },
    )

    name: ClassVar[str] = "token_classification"
    kind: ClassVar[str] = "tokens"
    answer: ClassVar[str] = "tags"
    family: ClassVar[type[Likelihood]] = Tags
    pipeline_tag: ClassVar[str] = "token-classification"
    task_type: ClassVar[str] = "TOKEN_CLS"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sub_token not in ("last", "first"):
            raise TaskError(f"sub_token: {quoted(self.sub_token)}; it must be 'last' or 'first'")

    @classmethod
    def build(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
        """As of labels.

        Raises:
            TaskError: also for a tokenizer that doesn't say which text a token is of.
        """
        if not tokenizer.is_fast:
            raise TaskError(
                f"tokenizer: {type(tokenizer).__name__} knows no offsets, which words need; load a fast one"
            )
        return super().build(records, tokenizer, **options)

    @classmethod
    def labels_of(cls, record: Record) -> Sequence[str]:
        """The tags."""
        return record.get("tags") or ()

    @classmethod
    def check(cls, records: Sequence[Record], **options: Any) -> None:
        """Raise a TaskError also for a record without tags."""
        for number, record in enumerate(records, start=1):
            if "tokens" in record and record.get("tags") is None:
                raise TaskError(f"record {number}: field 'tags': missing; task {cls.name!r} learns them")
        super().check(records, **options)

    @property
    def likelihood(self) -> Tags:
        """Tags, by their names, with their weights."""
        return Tags(self.labels, self._weights)

    @property
    def purpose(self) -> str:
        """What it is for, in a sentence."""
        return f"Gives each word of a text one of {shown_labels(self.labels)}"

    @property
    def head_note(self) -> str:
        """How words are read."""
        return (
            f"words are read as one text with spaces between them, a word's tag at the {self.sub_token} of its tokens"
        )

    def about(self, records: Sequence[Record]) -> str:
        """How many tags there are, and how many tokens have each."""
        counts = Counter(tag for record in records for tag in self.labels_of(record))
        rarest, few = min(counts.items(), key=lambda pair: pair[1])
        words = sum(counts.values())
        return f" with {words} tokens and {len(counts)} tags, the rarest {quoted(rarest)} at {few}"

    def columns(self, record: Record) -> list[str]:
        """The tokens."""
        return list(record["tokens"])

    def width(self, record: Record) -> int:
        """A logit for each token and tag."""
        return len(record["tokens"]) * len(self.labels)

    def target(self, record: Record) -> list[int] | None:
        """The index of each token's tag."""
        if (tags := record.get("tags")) is None:
            return None
        if unknown := sorted({*tags}.difference(self.labels)):
            raise TaskError(f"field 'tags': {quoted(unknown[0])} is not one of {shown_labels(self.labels)}")
        return [self.labels.index(tag) for tag in tags]

    def tokenize(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """`input_ids` of the words with spaces between them, and `places`, where each word's tag is read.

        A word of which the tokenizer leaves nothing, such as one of control characters, is read where the one before it
        is.

        Raises:
            TaskError: the record has more tokens than ``max_length``.
        """
        words = record["tokens"]
        encoded = tokenizer(" ".join(words))
        ids = encoded["input_ids"]
        if self.max_length is not None and len(ids) > self.max_length:
            raise TaskError(
                f"field 'tokens': {len(words)} of them are {len(ids)} tokens of the model, of which it reads "
                f"max_length={self.max_length}: give shorter records, such as sentences"
            )
        places, start, step = [0], 0, -1 if self.sub_token == "last" else 1
        for word in words:
            found = (encoded.char_to_token(i) for i in range(start, start + len(word))[::step])
            places.append(next((place for place in found if place is not None), places[-1]))
            start += len(word) + 1
        return {"input_ids": ids, "places": places[1:], "truncated": 0}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """`input_ids` and `attention_mask` (b, T), padded right; `places` (b, W), -1 for none; `labels` (b, W)."""
        rows = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": pad(rows, self.pad_token_id, side="right"),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, side="right"),
            "places": pad([example["places"] for example in examples], -1, side="right"),
        }
        if not all("label" in example for example in examples):
            return batch
        return batch | {"labels": self.likelihood.stacked([example["label"] for example in examples])}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The head's outputs at each word's place, (b, W·K) float32; -inf where a record has no more words.

        Raises:
            TaskError: a model with another kind of head, or number of outputs.
        """
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if logits.shape != (*batch["input_ids"].shape, len(self.labels)):
            raise TaskError(
                f"model: {type(unwrapped(model)).__name__} has logits of the shape "
                f"{tuple(logits.shape)}, but the task has {len(self.labels)} tags; load a token classification model "
                f"with num_labels={len(self.labels)}"
            )
        places = batch["places"]
        rows = torch.arange(len(places), device=places.device).unsqueeze(1)
        words = logits[rows, places.clamp_min(0)].float()
        return words.masked_fill((places < 0).unsqueeze(-1), -torch.inf).flatten(1)


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first token and the one after the last of each entity in BIO tags, or BIOES; other tags are of none."""
    found: list[tuple[str, int, int]] = []
    before = ""
    for place, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark in ENTITY_MARKS["I"] and kind and kind == before:
            found[-1] = (kind, found[-1][1], place + 1)
        elif mark in _MARKS and kind:
            found.append((kind, place, place + 1))
        before = kind if mark in _MARKS else ""
    return found

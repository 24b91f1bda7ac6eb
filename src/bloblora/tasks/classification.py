"""Classification: a text, one of a fixed set of labels, a sequence classification head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..messages import quoted
from .encoding import collate_labels, pad
from .task import Batch, Example, Record, Task, TaskError

_OF_TOKENS = ("input_ids", "token_type_ids")


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """A text's label from an `AutoModelForSequenceClassification`; a text that is too long loses its end.

    Args:
        labels: names of the logits' columns, in order.
    """

    labels: tuple[str, ...] = field(  # type: ignore[misc]  # the base class has None: no fixed columns
        default=(),
        metadata={
            "help": "The outputs of the model's head, in order; default: the labels of the data, sorted, as numbers "
            "where all are whole numbers. "
            "For a head that exists already, and for a label that the data lack."
        },
    )

    name: ClassVar[str] = "classification"
    kind: ClassVar[str] = "classification"
    pipeline_tag: ClassVar[str] = "text-classification"
    task_type: ClassVar[str] = "SEQ_CLS"
    truncates: ClassVar[str] = "the end of the text"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise TaskError(f"labels: {list(self.labels)}; there must be at least 2, all different")

    @classmethod
    def build(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
        """The task with the records' labels, sorted, unless `labels` is given."""
        found = {record["label"] for record in records if record.get("label") is not None}
        options.setdefault("labels", sorted_labels(map(str, found)))
        return super().build(records, tokenizer, **options)

    @classmethod
    def check(cls, records: Sequence[Record], **options: Any) -> None:
        """Raise a TaskError also for labels that are not among those given, or fewer than two."""
        super().check(records, **options)
        found, given = {record["label"] for record in records}, options.get("labels")
        if given is not None and not 2 <= len(given) == len(set(given)):
            raise TaskError(f"labels must be at least 2, all different, got {given}")
        if unknown := sorted(found.difference(given or found)):
            raise TaskError(f"field 'label': {', '.join(unknown)} not among labels; add them to it")
        if len(found) < 2 and given is None:
            raise TaskError(f"field 'label': all are {quoted(found.pop())}; there must be at least 2 labels")

    def columns(self, record: Record) -> list[str]:
        """The labels, the same for every record."""
        return list(self.labels)

    def target(self, record: Record) -> int | None:
        """The label's index."""
        label = record.get("label")
        if label is not None and label not in self.labels:
            known = ", ".join(self.labels[:8]) + (", …" if len(self.labels) > 8 else "")
            raise TaskError(f"field 'label': {quoted(label)} is not one of the {len(self.labels)} labels ({known})")
        return None if label is None else self.labels.index(label)

    def tokenize(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """`input_ids` of the record's `text`, with the tokenizer's special tokens; with `text_pair` those of both.

        A pair is encoded as the tokenizer does, with `token_type_ids` where it has them; one that puts nothing between
        two texts gets a line break there. Of a pair that is too long the longer text is cut first.
        """
        texts = [record["text"], *([record["text_pair"]] if "text_pair" in record else [])]
        counts = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
        if len(texts) > 1 and counts[0] == counts[1]:
            texts = ["\n".join(texts)]
        ids = tokenizer(*texts)["input_ids"]
        encoded = tokenizer(*texts, truncation=self.max_length is not None, max_length=self.max_length)
        names = [name for name in _OF_TOKENS[: len(texts)] if name in encoded]
        return {name: encoded[name] for name in names} | {"truncated": len(ids) - len(encoded["input_ids"])}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """`input_ids` and `attention_mask` (b, T), padded on the right; of pairs also `token_type_ids`."""
        rows = [example["input_ids"] for example in examples]
        types = [example.get("token_type_ids", [0] * len(row)) for example, row in zip(examples, rows, strict=True)]
        return {
            **({"token_type_ids": pad(types, 0, side="right")} if any(map(any, types)) else {}),
            "input_ids": pad(rows, self.pad_token_id, side="right"),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, side="right"),
            **collate_labels(examples),
        }

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The head's logits (b, C), float32.

        Raises:
            TaskError: a model with another pad token (it finds a text's end by it) or number of labels.
        """
        pad_token_id = extract_model_from_parallel(model).config.get_text_config().pad_token_id
        if pad_token_id != self.pad_token_id:
            raise TaskError(
                f"model: config.pad_token_id is {pad_token_id}; the tokenizer pads with {self.pad_token_id}, "
                "so set it to that"
            )
        inputs = {name: batch[name] for name in (*_OF_TOKENS, "attention_mask") if name in batch}
        logits = model(**inputs).logits.float()
        if logits.shape != (len(batch["input_ids"]), len(self.labels)):
            raise TaskError(
                f"model: its logits have the shape {tuple(logits.shape)}, but the task has "
                f"{len(self.labels)} labels; load a sequence classification model with that num_labels"
            )
        return logits


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in order: as numbers where all are whole numbers, 2 before 10."""
    found = [*labels]
    numbers = all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in found)
    return tuple(sorted(found, key=lambda label: (int(label) if numbers else 0, label)))

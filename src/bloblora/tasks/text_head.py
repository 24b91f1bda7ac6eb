"""Texts, or pairs of them, and the outputs of a sequence classification head: what such tasks have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..contexts import unwrapped
from ..messages import quoted
from .encoding import collate_labels, pad
from .task import Batch, Example, Record, Task, TaskError

_OF_TOKENS = ("input_ids", "token_type_ids")


class TextHead(Task):
    """A task of an `AutoModelForSequenceClassification`; a text that is too long loses its end."""

    kind: ClassVar[str] = "text"
    pipeline_tag: ClassVar[str] = "text-classification"
    task_type: ClassVar[str] = "SEQ_CLS"
    truncates: ClassVar[str] = "the end of the text"

    @classmethod
    def check(cls, records: Sequence[Record], **options: Any) -> None:
        """Raise a TaskError also for a record without its answer."""
        super().check(records, **options)
        for number, record in enumerate(records, start=1):
            if record.get("label") is None and record.get(cls.answer) is None:
                other = next((name for name in ("labels", "value") if record.get(name) is not None), None)
                found = "missing" if other is None else f"missing, and {other!r} is {quoted(record[other])}"
                raise TaskError(f"record {number}: field {cls.answer!r}: {found}; task {cls.name!r} learns it")

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
        """The head's outputs (b, number of them), float32.

        Raises:
            TaskError: a model with another pad token (it finds a text's end by it) or number of outputs.
        """
        pad_token_id = unwrapped(model).config.get_text_config().pad_token_id
        if pad_token_id != self.pad_token_id:
            raise TaskError(
                f"model: config.pad_token_id is {pad_token_id}; the tokenizer pads with {self.pad_token_id}, "
                "so set it to that"
            )
        inputs = {name: batch[name] for name in (*_OF_TOKENS, "attention_mask") if name in batch}
        logits = model(**inputs).logits.float()
        assert self.head is not None
        if logits.shape != (len(batch["input_ids"]), len(self.head)):
            outputs = f"{len(self.head)} labels" if self.labels else f"the outputs {', '.join(self.head)}"
            raise TaskError(
                f"model: its logits have the shape {tuple(logits.shape)}, but the task has {outputs}; load a sequence "
                f"classification model with num_labels={len(self.head)}"
            )
        return logits

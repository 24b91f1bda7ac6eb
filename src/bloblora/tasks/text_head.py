"""Texts, or pairs of them, and the outputs of a sequence classification head: what such tasks have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..contexts import unwrapped
from ..messages import quoted
from .encoding import check_template, collate_labels, fit_texts, pad
from .task import Batch, Example, Record, Task, TaskError

_OF_TOKENS = ("input_ids", "token_type_ids")
TEXT_ALONE = "{text}"
_PAIR = "{text_pair}"
ONE_WORD = 'This sentence: "{text}" means in one word: "'
"""PromptEOL, of Jiang et al., Scaling Sentence Embeddings with Large Language Models (arXiv 2307.16645), section 3.2.

A model that reads from left to right has the text's meaning in its last state where it is about to say it, and else
that of the word that comes next.
"""


@dataclass(frozen=True, kw_only=True)
class TextHead(Task):
    """A task of an `AutoModelForSequenceClassification`; a text that is too long loses its end.

    Args:
        template: what the model reads, with the text, or both texts, in their places.
    """

    template: str = field(
        default=TEXT_ALONE,
        metadata={
            "help": "What the model reads: words around {text}, and around {text_pair} for pairs. `{text}` is the text "
            "alone, and pairs as the tokenizer joins them. Default: for classes of single texts, where the head is new "
            f"and the tokenizer puts nothing of its own behind a text, `{ONE_WORD}`; otherwise `{TEXT_ALONE}`."
        },
    )

    kind: ClassVar[str] = "text"
    pipeline_tag: ClassVar[str] = "text-classification"
    task_type: ClassVar[str] = "SEQ_CLS"
    truncates: ClassVar[str] = "the end of the text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template != TEXT_ALONE:
            check_template(self.template, "text", *(["text_pair"] if _PAIR in self.template else []))

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

        A pair is encoded as the template or the tokenizer has it, with `token_type_ids` where that has them; where it
        puts nothing between two texts there is a line break. Of a pair that is too long the longer text is cut first.
        """
        if self.template != TEXT_ALONE:
            return self._filled(record, tokenizer)
        texts = [record["text"], *([record["text_pair"]] if "text_pair" in record else [])]
        counts = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
        if len(texts) > 1 and counts[0] == counts[1]:
            texts = ["\n".join(texts)]
        ids = tokenizer(*texts)["input_ids"]
        encoded = tokenizer(*texts, truncation=self.max_length is not None, max_length=self.max_length)
        names = [name for name in _OF_TOKENS[: len(texts)] if name in encoded]
        return {name: encoded[name] for name in names} | {"truncated": len(ids) - len(encoded["input_ids"])}

    def _filled(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        names = ["text", *(["text_pair"] if "text_pair" in record else [])]
        if (len(names) == 2) != (_PAIR in self.template):
            found, other = ("a", "no ") if len(names) == 2 else ("no", "")
            raise TaskError(
                f"field 'text_pair': the record has {found} second text, and the template {quoted(self.template)} has "
                f"{other}{_PAIR}"
            )

        def encode(**texts: str) -> list[int]:
            return tokenizer(self.template.format(**texts))["input_ids"]

        texts = {name: record[name] for name in names}
        ids, cut = fit_texts(encode, tokenizer, texts, self.max_length, side="right")
        return {"input_ids": ids, "truncated": cut}

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

    @property
    def head_note(self) -> str | None:
        """The template, where there is one."""
        if self.template == TEXT_ALONE:
            return None
        return f"the model reads {quoted(self.template)}, with the text in its place, so give it that"

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

"""What every task is: a frozen, JSON-able description with columns, encode, collate and logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]
Example = dict[str, Any]
Batch = dict[str, Tensor]


class TaskError(ValueError):
    """A record, an option or a model that a task can't work with; `problems` lists them all."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class Task:
    """One way of asking a model for a distribution over labels or choices.

    Args:
        pad_token_id: id that fills a batch, the tokenizer's; a classification head must know the same one.
        max_length: most tokens the model reads for one answer; longer inputs are truncated. None: no limit.
    """

    pad_token_id: int
    max_length: int | None = None

    name: ClassVar[str]
    labels: ClassVar[tuple[str, ...] | None] = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise TaskError(f"max_length: {self.max_length} is not a number of tokens; at least 1, or None")

    @classmethod
    def build(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
        """The task for these records; what `options` leaves open comes from the tokenizer.

        Raises:
            TaskError: an option that the task doesn't have, or a tokenizer without a pad token.
        """
        check_options(cls, options)
        if tokenizer.pad_token_id is None:
            raise TaskError("tokenizer: has no pad token; set one, for example pad_token = eos_token")
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
        # A tokenizer that knows no limit says so with a huge number.
        limit = tokenizer.model_max_length
        options.setdefault("max_length", limit if limit < 1_000_000 else None)
        return cls(**options)

    def columns(self, record: Record) -> list[str]:
        """Name of each column of this record's logits, in order."""
        raise NotImplementedError

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The record as plain ints and lists; `label` is there when the record has its answer.

        Raises:
            TaskError: naming the field, its value and what would be right.
        """
        raise NotImplementedError

    def length(self, example: Example) -> int:
        """Tokens that an encoded example takes in a batch."""
        return len(example["input_ids"])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Encoded examples as one padded batch; `labels` (b,) is there when every example has a label."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (b, C) in float32, C = most choices in this batch, -inf for the ones a question lacks."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON-able values; `task_from_dict` reads it back."""
        values = asdict(self).items()
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values}


def check_options(task: type[Task], options: Mapping[str, Any]) -> None:
    """Raise a TaskError that names every option which this task doesn't have."""
    known = [field.name for field in fields(task)]
    if unknown := sorted(set(options) - set(known)):
        raise TaskError(*(f"{task.name} has no option '{name}'; it has {', '.join(known)}" for name in unknown))


def check_text(record: Record, field: str) -> str:
    """The record's text in `field`; a TaskError when it is missing, no text, or blank."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        found = repr(value) if field in record else "missing"
        raise TaskError(f"field '{field}': {found}; it must be a text that isn't empty")
    return value


def check_choices(record: Record) -> list[str]:
    """The record's choices; a TaskError when they aren't two or more texts."""
    choices = record.get("choices")
    if not isinstance(choices, (list, tuple)) or len(choices) < 2:
        found = repr(choices) if "choices" in record else "missing"
        raise TaskError(f"field 'choices': {found}; it must be a list of at least 2 texts")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise TaskError(f"field 'choices', item {index}: {choice!r}; it must be a text that isn't empty")
    return list(choices)


def check_answer(record: Record, num_choices: int) -> Example:
    """`{"label": index}` of the record's answer, empty when it has none; a TaskError when it is no index."""
    answer = record.get("answer")
    if answer is None:
        return {}
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < num_choices:
        raise TaskError(f"field 'answer': {answer!r} is not an index into {num_choices} choices (0..{num_choices - 1})")
    return {"label": answer}


def collate_labels(examples: Sequence[Example]) -> Batch:
    """`{"labels": (b,)}` when every example has a label, otherwise empty."""
    if not all("label" in example for example in examples):
        return {}
    return {"labels": torch.tensor([example["label"] for example in examples])}


def pad(rows: Sequence[Sequence[int]], value: int, *, side: str, length: int = 0) -> Tensor:
    """Rows of ints as one (b, T) tensor, T = the longest row or `length` if that is more."""
    width = max(length, *(len(row) for row in rows), 0)
    filler = [[value] * (width - len(row)) for row in rows]
    pairs = zip(filler, rows, strict=True)
    return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for f, row in pairs])

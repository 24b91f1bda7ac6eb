"""Classification: a text, one of a fixed set of labels, a sequence classification head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ..messages import quoted
from .encoding import ends_with_text
from .likelihood import Categorical
from .task import Record, Task, TaskError
from .text_head import ONE_WORD, TextHead

LABELS = (
    "The outputs of the model's head, in order; default: the labels or tags of the data, sorted, as numbers where all "
    "are whole numbers. For a head that exists already, and for a label that the data lack."
)
"""What the option ``labels`` is."""
_WHOLE = re.compile("[+-]?[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True)
class OneOfLabels(Task):
    """A task whose answers are of a fixed set of labels that exclude each other: one a record, or one a token.

    Args:
        labels: their names, in the order of the head's outputs.
        class_weights: how much each counts in training.
    """

    labels: tuple[str, ...] = field(  # type: ignore[misc]  # the base class has None: no fixed columns
        default=(),
        metadata={"help": LABELS},
    )

    class_weights: tuple[float, ...] | str = field(
        default="none",
        metadata={
            "help": "How much a training record counts, by its label, or a word, by its tag: `none`, each 1; "
            "`balanced`, in inverse proportion to the label's share, 1 on average; or a number for each of `labels`. "
            "Probabilities are then those of the weighted population, in which balanced labels are equally frequent."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.class_weights, str):
            object.__setattr__(self, "class_weights", tuple(map(float, self.class_weights)))
        _check_weights(self.class_weights, len(self.labels))
        object.__setattr__(self, "labels", tuple(self.labels))
        _check_labels(self.labels)

    @classmethod
    def build(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
        """The task with the records' labels, sorted, unless `labels` is given."""
        counts = Counter(label for record in records for label in cls.labels_of(record))
        options.setdefault("labels", sorted_labels(counts))
        if options.get("class_weights") == "balanced":
            even = counts.total() / len(options["labels"])
            options["class_weights"] = tuple(even / max(1, counts[label]) for label in options["labels"])
        return super().build(records, tokenizer, **options)

    @classmethod
    def check(cls, records: Sequence[Record], **options: Any) -> None:
        """Raise a TaskError also for labels that are not among those given, or fewer than two."""
        if (weights := options.get("class_weights", "none")) != "balanced":
            _check_weights(weights, None)
        super().check(records, **options)
        found, given = {label for record in records for label in cls.labels_of(record)}, options.get("labels")
        if given is not None:
            _check_labels(given)
        if unknown := sorted(found.difference(given or found)):
            raise TaskError(f"field {cls.answer!r}: {', '.join(unknown)} not among labels; add them to it")
        if len(found) < 2 and given is None:
            raise TaskError(f"field {cls.answer!r}: all are {quoted(found.pop())}; there must be at least 2 labels")

    @property
    def _weights(self) -> tuple[float, ...]:
        return () if isinstance(self.class_weights, str) else self.class_weights


@dataclass(frozen=True, kw_only=True)
class Classification(OneOfLabels, TextHead):
    """A text's label."""

    name: ClassVar[str] = "classification"

    @classmethod
    def build(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
        """The task; without a template it has PromptEOL's where that fits the records and the tokenizer."""
        if ends_with_text(tokenizer) and not any("text_pair" in record for record in records):
            options.setdefault("template", ONE_WORD)
        return super().build(records, tokenizer, **options)

    @classmethod
    def labels_of(cls, record: Record) -> Sequence[str]:
        """The label."""
        return [] if record.get("label") is None else [record["label"]]

    @property
    def likelihood(self) -> Categorical:
        """Classes, with their weights."""
        return Categorical(self._weights)

    @property
    def purpose(self) -> str:
        """What it is for, in a sentence."""
        return f"Sorts a text into one of {shown_labels(self.labels)}"

    def about(self, records: Sequence[Record]) -> str:
        """How many labels there are, and how many records of each."""
        counts = Counter(record["label"] for record in records)
        rarest, few = min(counts.items(), key=lambda pair: pair[1])
        most = max(counts.values())
        each = f"{few} each" if few == most else f"{few} to {most} each, the rarest {quoted(rarest)}"
        return f" with {len(counts)} labels, {each}"

    def assumed(self, records: Sequence[Record]) -> str | None:
        """Names, where all are numbers, of which there are more than two."""
        if len(self.labels) < 3 or not all(map(_WHOLE.fullmatch, self.labels)):
            return None
        return (
            f"all labels are whole numbers, which are taken for the names of {len(self.labels)} classes; for a number "
            "to predict give --task regression"
        )

    def columns(self, record: Record) -> list[str]:
        """The labels, the same for every record."""
        return list(self.labels)

    def target(self, record: Record) -> int | None:
        """The label's index."""
        label = record.get("label")
        if label is not None and label not in self.labels:
            raise TaskError(f"field 'label': {quoted(label)} is not one of {shown_labels(self.labels)}")
        return None if label is None else self.labels.index(label)


def _check_labels(labels: Sequence[str]) -> None:
    if not 2 <= len(labels) == len(set(labels)):
        raise TaskError(f"labels must be at least 2, all different, got {list(labels)}")


def _check_weights(weights: Any, count: int | None) -> None:
    """Raise a TaskError unless class weights are none, or numbers above 0, as many as there are labels."""
    if weights == "none":
        return
    numbers = not isinstance(weights, str) and all(isinstance(w, int | float) and w > 0 for w in weights)
    if not numbers or (count is not None and len(weights) != count):
        raise TaskError(f"class_weights: {quoted(weights)}; it must be none, balanced, or a number above 0 a label")


def shown_labels(labels: Sequence[str]) -> str:
    """How many there are, and the first of them, at the end of a sentence."""
    return f"{len(labels)} labels: {', '.join(labels[:8])}{', …' if labels[8:] else '.'}"


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in order: as numbers where all are whole numbers, 2 before 10."""
    found = [*labels]
    numbers = all(map(_WHOLE.fullmatch, found))
    return tuple(sorted(found, key=lambda label: (int(label) if numbers else 0, label)))

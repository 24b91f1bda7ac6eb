"""Several labels at once: a text, each of a fixed set of labels or not, a head with a sigmoid for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ..messages import quoted
from .classification import LABELS, shown_labels, sorted_labels
from .likelihood import Bernoulli, Likelihood
from .task import Record, Task, TaskError
from .text_head import TextHead


@dataclass(frozen=True, kw_only=True)
class MultiLabel(TextHead):
    """Which labels a text has.

    Args:
        labels: names of the logits' columns, in order.
    """

    labels: tuple[str, ...] = field(  # type: ignore[misc]  # the base class has None: no fixed columns
        default=(),
        metadata={"help": LABELS},
    )

    name: ClassVar[str] = "multi_label"
    answer: ClassVar[str] = "labels"
    family: ClassVar[type[Likelihood]] = Bernoulli

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(set(self.labels)) != len(self.labels) or not self.labels:
            raise TaskError(f"labels: {list(self.labels)}; there must be at least 1, all different")

    @classmethod
    def labels_of(cls, record: Record) -> Sequence[str]:
        """The `labels`, or the `label` alone."""
        if (labels := record.get("labels")) is not None:
            return labels
        return [] if record.get("label") is None else [record["label"]]

    @classmethod
    def build(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
        """The task with the records' labels, sorted, unless `labels` is given."""
        found = {label for record in records for label in cls.labels_of(record)}
        options.setdefault("labels", sorted_labels(found))
        return super().build(records, tokenizer, **options)

    @classmethod
    def fits(cls, records: Sequence[Record]) -> bool:
        """Whether each record has `labels`."""
        return super().fits(records) and all("labels" in record and "label" not in record for record in records)

    @classmethod
    def check(cls, records: Sequence[Record], **options: Any) -> None:
        """Raise a TaskError also for labels that are not among those given, or that none of the records has or all."""
        super().check(records, **options)
        found, given = {label for record in records for label in cls.labels_of(record)}, options.get("labels")
        if unknown := sorted(found.difference(given or found)):
            raise TaskError(f"field 'labels': {', '.join(unknown)} not among labels; add them to it")
        if not found and given is None:
            raise TaskError("field 'labels': no record has any; there must be at least 1 label")
        if given is None and all({*cls.labels_of(record)} == found for record in records):
            raise TaskError(f"field 'labels': all records have all, such as {quoted(min(found))}; some must lack one")

    def about(self, records: Sequence[Record]) -> str:
        """How many labels there are, and how many records have each."""
        counts = Counter(label for record in records for label in self.labels_of(record))
        rarest, few = min(counts.items(), key=lambda pair: pair[1])
        each = sum(counts.values()) / len(records)
        return f" with {len(counts)} labels, {each:.2g} of them each, the rarest {quoted(rarest)} in {few}"

    def assumed(self, records: Sequence[Record]) -> str | None:
        """That the labels don't exclude each other, where each record has one."""
        if any(len(self.labels_of(record)) != 1 for record in records):
            return None
        return (
            "each record has one of the labels, which needn't exclude each other; where they do, --task classification"
        )

    @property
    def purpose(self) -> str:
        """What it is for, in a sentence."""
        return f"Says which of {shown_labels(self.labels)}"

    def columns(self, record: Record) -> list[str]:
        """The labels, the same for every record."""
        return list(self.labels)

    def target(self, record: Record) -> list[int] | None:
        """1 for each label that the record has, 0 for the others."""
        if record.get("labels") is None and record.get("label") is None:
            return None
        found = self.labels_of(record)
        if unknown := sorted({*found}.difference(self.labels)):
            raise TaskError(f"field 'labels': {quoted(unknown[0])} is not one of {shown_labels(self.labels)}")
        return [int(label in found) for label in self.labels]

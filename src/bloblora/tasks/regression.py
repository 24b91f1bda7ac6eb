r"""Regression: a text, a number with normal noise, a sequence classification head with two outputs.

.. math:: y \mid x, w \sim \mathcal N\big(c + s\,\mu_w(x),\ s^2 / \lambda_w(x)\big), \qquad
          \lambda = \log(1 + (e - 1)\,e^{a}) + \varepsilon

c and s are the mean and standard deviation of the training values; μ and a are the outputs. The noise is the second
output rather than a parameter of its own: then the likelihood is a function of the weights alone, as the ELBO has it,
every method trains it and PEFT saves it with the head, and it may differ between inputs. The output is the precision
and not the logarithm of the variance because both the NLL and its gradient then grow at most linearly in it, whatever a
fresh head says at first; at a = 0 the noise has the spread of the training values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..files import is_finite
from ..messages import quoted
from .likelihood import Gaussian, Likelihood
from .task import Batch, Record, Task, TaskError
from .text_head import TextHead

_LEAST_PRECISION = 1e-4  # a standard deviation of 100 times that of the training values


@dataclass(frozen=True, kw_only=True)
class Regression(TextHead):
    """A text's value, and how far it spreads.

    Args:
        value_mean: c.
        value_std: s.
    """

    value_mean: float | None = field(
        default=None,
        metadata={"help": "The value that the head's 0 stands for; default: the mean of the training values."},
    )
    value_std: float | None = field(
        default=None,
        metadata={"help": "The difference that the head's 1 stands for; default: their standard deviation."},
    )

    name: ClassVar[str] = "regression"
    answer: ClassVar[str] = "value"
    family: ClassVar[type[Likelihood]] = Gaussian
    head: ClassVar[tuple[str, ...]] = ("mean", "noise")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_finite(self.value_mean):
            raise TaskError(f"value_mean: {self.value_mean}; it must be a number, such as the mean of the values")
        if self.value_std is None or not (is_finite(self.value_std) and self.value_std > 0):
            raise TaskError(f"value_std: {self.value_std}; it must be above 0, such as the values' standard deviation")

    @classmethod
    def build(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
        """The task with mean and standard deviation of the records' values, where they aren't given."""
        values = [value for record in records if (value := value_of(record)) is not None]
        if values and options.get("value_mean") is None:
            options["value_mean"] = statistics.fmean(values)
        if values and options.get("value_std") is None:
            options["value_std"] = statistics.pstdev(values)
        return super().build(records, tokenizer, **options)

    @classmethod
    def fits(cls, records: Sequence[Record]) -> bool:
        """Whether each record has a `value` and no `label`; or a label that is a number, some of them with fractions.

        Labels that are all whole numbers are names of classes, as "0" and "1" are.
        """
        if not super().fits(records):
            return False
        if all("value" in record and "label" not in record for record in records):
            return True
        fractions = False
        for record in records:
            if (number := _number(record.get("label"))) is None:
                return False
            fractions |= number % 1 != 0
        return fractions

    @classmethod
    def check(cls, records: Sequence[Record], **options: Any) -> None:
        """Raise a TaskError also for values that are all alike."""
        super().check(records, **options)
        if options.get("value_std") is None and len(found := {value_of(record) for record in records}) < 2:
            raise TaskError(f"field 'value': all are {found.pop()}; there must be at least 2 different ones")

    @property
    def likelihood(self) -> Gaussian:
        """Normal noise, in the units of the data."""
        return Gaussian(self.value_mean, self.value_std)  # type: ignore[arg-type]  # __post_init__ has checked them

    def about(self, records: Sequence[Record]) -> str:
        """Range, mean and standard deviation of the values."""
        values = [value for record in records if (value := value_of(record)) is not None]
        spread = f"mean {statistics.fmean(values):.4g} and standard deviation {statistics.pstdev(values):.4g}"
        return f" with values from {min(values):.4g} to {max(values):.4g}, {spread}"

    def assumed(self, records: Sequence[Record]) -> str | None:
        """Numbers, where they were labels."""
        if any(record.get("value") is not None for record in records):
            return None
        return (
            "all labels are numbers, some with fractions: a number is predicted; for classes give --task classification"
        )

    @property
    def purpose(self) -> str:
        """What it is for, in a sentence."""
        return f"Predicts a number for a text: {self.value_mean:.4g} on average, with a spread of {self.value_std:.4g}."

    @property
    def head_note(self) -> str:
        """How a value and its noise follow from the outputs, and what the model reads."""
        outputs = (
            f"the head's outputs are m and a: the value is {self.value_mean!r} + {self.value_std!r}·m, and its noise "
            f"variance {self.value_std!r}²/(log(1 + (e - 1)·exp(a)) + {_LEAST_PRECISION})"
        )
        return "; ".join(filter(None, [super().head_note, outputs]))

    def columns(self, record: Record) -> list[str]:
        """None: a value has no columns."""
        return []

    def target(self, record: Record) -> float | None:
        """The value, standardized."""
        return None if (value := value_of(record)) is None else self.likelihood.standardized(value)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The natural parameters of the standardized value, (b, 2), float32."""
        mean, raw = super().logits(model, batch).unbind(-1)
        return Gaussian.of(mean, F.softplus(raw + math.log(math.e - 1)) + _LEAST_PRECISION)


def value_of(record: Record) -> float | None:
    """A record's `value`, or a `label` that is a number; None where it has neither.

    Raises:
        TaskError: the label is no number.
    """
    if (value := record.get("value")) is not None or (label := record.get("label")) is None:
        return value
    if (number := _number(label)) is None:
        raise TaskError(f"field 'label': {quoted(label)} is no number; give 'value', a number, or train classes")
    return number


def _number(label: Any) -> float | None:
    try:
        number = float(label)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None

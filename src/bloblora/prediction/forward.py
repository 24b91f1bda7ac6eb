"""The model on one batch: once, for several draws at a time, or for the rows that are left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapter.sharding import is_split
from .trunk import repeat_rows, trunk_below

_TOKENS = {"cpu": 512}
_MANY_TOKENS = 8192
"""Tokens from which on a larger forward is no faster a token: measured on a CPU (benchmarks/prediction.py); on other
devices a guess, a forward that fills them."""


class PredictionTask(Protocol):
    """What prediction needs of a task."""

    def length(self, example: Any) -> int:
        """Tokens that an encoded example takes in a batch."""
        ...

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Encoded examples to a padded batch."""
        ...

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (b, C) of a batch; -inf for a class that an example lacks."""
        ...


class BatchForward:
    """The model on one batch; rows may be dropped between its calls.

    Attributes:
        rows: b, the rows that are left.
        limit: most draws to make before rows may be dropped; None: no limit.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], task: PredictionTask | None) -> None:
        self._model, self._batch, self._task = model, dict(batch), task
        self._trunk_output: Any = None
        self.limit: int | None = None

    def __call__(self, copies: int = 1) -> Tensor:
        """Logits (copies·b, C) of the batch, repeated."""
        batch = {name: repeat_rows(tensor, copies) for name, tensor in self._batch.items()}
        return self._model(**batch).logits if self._task is None else self._task.logits(self._model, batch)

    @property
    def rows(self) -> int:
        """Rows that are left."""
        return len(next(iter(self._batch.values())))

    def keep(self, rows: Tensor) -> None:
        """Drop all but some of the rows that are left."""
        self._batch = {name: tensor[rows.to(tensor.device)] for name, tensor in self._batch.items()}
        if self._trunk_output is not None:
            self._trunk_output = _select(self._trunk_output, rows)

    def wave(self, left: int) -> list[int]:
        """How to make the next of ``left`` draws: for each of the forwards to run side by side, its number of draws.

        A forward of few tokens waits for weights rather than for arithmetic, so draws share it. On a CPU two forwards
        on half of the cores each are faster than one after the other on all.
        """
        left = min(left, self.limit or left)
        tensor = self._batch.get("input_ids", next(iter(self._batch.values())))
        workers = min(torch.get_num_threads(), left) if self._can_thread(tensor.device) else 1
        together = max(1, _TOKENS.get(tensor.device.type, _MANY_TOKENS) // max(tensor.numel(), 1))
        size = min(together, math.ceil(left / workers))
        return [min(size, left - start) for start in range(0, left, size)][:workers]

    @contextmanager
    def shared_trunk(self, layers: Iterable[str]) -> Iterator[None]:
        """Compute what lies below some layers now, and not again in any forward inside."""
        trunk = trunk_below(self._model, layers)
        if trunk is None:
            yield
            return
        self._trunk_output = trunk.compute(self)
        try:
            with trunk.replayed(lambda: self._trunk_output):
                yield
        finally:
            self._trunk_output = None

    def _can_thread(self, device: torch.device) -> bool:
        """Whether forwards may run side by side; autocast is a setting of one thread, shards are gathered in order."""
        return device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not is_split(self._model)


def _select(output: Any, rows: Tensor) -> Any:
    if isinstance(output, tuple):
        return tuple(_select(part, rows) for part in output)
    return output[rows.to(output.device)] if isinstance(output, Tensor) else output

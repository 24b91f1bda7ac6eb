"""The model on one batch: once, for several draws at a time, or for the rows that are left; and what draws share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapter.head import trained_head
from ..adapter.sharding import is_split
from ..contexts import hooked, replaced

Output = Tensor | tuple[Any, ...]
HEADS = ("lm_head", "score", "classifier")
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
        limit: most draws to make before rows may be dropped; None: no limit.
        head_shares: of each draw so far, with a Gaussian head (`bloblora.adapter.head.average_head`), (b, 1 + C).
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], task: PredictionTask | None) -> None:
        self._model, self._batch, self._task = model, dict(batch), task
        self._trunk: Trunk | None = None
        self._trunk_output: Any = None
        self.limit: int | None = None
        self.head_shares: list[Tensor] = []

    def __call__(self, copies: int = 1) -> Tensor:
        """Logits (copies·b, C) of the batch, repeated."""
        batch = {name: repeat_rows(tensor, copies) for name, tensor in self._batch.items()}
        with self._trunk.replayed(self._trunk_output) if self._trunk else nullcontext():
            return class_logits(self._model, batch) if self._task is None else self._task.logits(self._model, batch)

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

    def share_trunk(self, layers: Iterable[str]) -> None:
        """Compute what lies below some layers now, and not again until a call with other layers."""
        trunk = trunk_below(self._model, layers)
        below, known = (len(one.blocks) if one else 0 for one in (trunk, self._trunk))
        if below < known:
            self._trunk = None
        if trunk and below != known:
            self._trunk_output = trunk.compute(self)
            self._trunk = trunk

    def _can_thread(self, device: torch.device) -> bool:
        """Whether forwards may run side by side; autocast is a setting of one thread, shards are gathered in order."""
        return device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not is_split(self._model)


@dataclass(frozen=True)
class Trunk:
    """The first blocks of a model, which are computed once a batch.

    Attributes:
        blocks: those blocks, one or more.
        above: the block that comes next.
    """

    blocks: Sequence[nn.Module]
    above: nn.Module

    def compute(self, forward: Callable[[], Any]) -> Output:
        """Output of the last block; ``forward`` runs the model, of which nothing above is computed."""
        outputs = []

        def stop(*_: Any, **__: Any) -> None:
            raise _ReachedError

        def keep(_module: nn.Module, _inputs: Any, output: Output) -> None:
            outputs.append(output)

        hooks = [(self.blocks[-1].register_forward_hook, keep)]
        with suppress(_ReachedError), hooked(hooks), replaced({self.above: stop}):
            forward()
        return outputs[-1]

    def replayed(self, output: Output) -> AbstractContextManager[None]:
        """Forwards inside take this output of the trunk, repeated for a batch that is repeated."""
        rows = len(output[0] if isinstance(output, tuple) else output)

        def replay(hidden: Tensor, *_: Any, **__: Any) -> Output:
            return repeat_rows(output, len(hidden) // rows)

        return replaced(dict.fromkeys(self.blocks, replay))


def output_head(model: nn.Module) -> nn.Module:
    """The module that gives a model's logits; a ValueError where it has none that is known."""
    for name, module in model.named_modules():
        if name.split(".")[-1] in HEADS:
            return module
    if isinstance(model, PeftModel) and (trained := trained_head(model, model.active_adapter)) is not None:
        return trained[1]
    raise ValueError(f"model: {type(model).__name__} has no output head called {', '.join(HEADS)}, and none is trained")


def trunk_below(model: nn.Module, layers: Iterable[str]) -> Trunk | None:
    """The trunk below the first of some layers, None where there is none.

    Args:
        model: whose blocks stand in one `torch.nn.ModuleList`.
        layers: names of the layers that draws change; they are in that list, or are the model's output head.
    """
    found = {name: block_of(model, name) for name in layers}
    places = [place for place in found.values() if place]
    others = [name for name, place in found.items() if place is None]
    if len({blocks for blocks, _ in places}) != 1 or any({*HEADS}.isdisjoint(name.split(".")) for name in others):
        return None
    blocks = list(model.get_submodule(places[0][0]).children())
    first = min(index for _, index in places)
    return Trunk(blocks[:first], blocks[first]) if first else None


def block_of(model: nn.Module, layer: str) -> tuple[str, int] | None:
    """Name of the `torch.nn.ModuleList` that a layer stands in, and its block's index; None for one outside."""
    parts = layer.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(name := ".".join(parts[:end])), nn.ModuleList):
            return name, int(parts[end])
    return None


def repeat_rows(value: Any, times: int) -> Any:
    """A batch, or a tuple of batches, repeated as a whole; what is no tensor of rows stays."""
    if isinstance(value, tuple):
        return tuple(repeat_rows(part, times) for part in value)
    if times == 1 or not isinstance(value, Tensor) or not value.ndim:
        return value
    return value.repeat(times, *[1] * (value.ndim - 1))


def class_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A model's logits (b, C).

    Raises:
        ValueError: they have another shape, or there are none, or they aren't those of classes that exclude each other.
    """
    config = getattr(model, "config", None)
    if (kind := getattr(config, "problem_type", None)) in ("regression", "multi_label_classification"):
        raise ValueError(
            f"model: its problem_type is {kind!r}, for which a softmax over its logits is wrong; give "
            "a task of bloblora.tasks, Regression or MultiLabel"
        )
    logits = getattr(model(**batch), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else "missing"
        raise ValueError(
            f"model: without a task its logits must be (n, C), as of one that classifies sequences; they are {found}; "
            "for answers in text use posterior_generate, for choices a task of bloblora.tasks"
        )
    if logits.shape[1] == 1:
        raise ValueError("model: it has one label (num_labels=1), whose softmax is always 1; it must have two or more")
    return logits


class _ReachedError(Exception):
    """The forward is where the trunk ends."""


def _select(output: Any, rows: Tensor) -> Any:
    if isinstance(output, tuple):
        return tuple(_select(part, rows) for part in output)
    return output[rows.to(output.device)] if isinstance(output, Tensor) else output

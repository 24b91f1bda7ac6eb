"""What all draws of a batch share: the blocks below the first one that a draw changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Output = Tensor | tuple[Any, ...]
_HEADS = ("lm_head", "score", "classifier")


class _ReachedError(Exception):
    """The forward is where the trunk ends."""


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

        hook = self.blocks[-1].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            with _replaced([self.above], stop):
                forward()
        except _ReachedError:
            pass
        finally:
            hook.remove()
        return outputs[-1]

    @contextmanager
    def replayed(self, output: Callable[[], Output]) -> Iterator[None]:
        """Forwards inside take the trunk's output from ``output``, repeated for a batch that is repeated."""

        def replay(hidden: Tensor, *_: Any, **__: Any) -> Output:
            found = output()
            rows = len(found[0] if isinstance(found, tuple) else found)
            return repeat_rows(found, len(hidden) // rows)

        with _replaced(self.blocks, replay):
            yield


def trunk_below(model: nn.Module, layers: Iterable[str]) -> Trunk | None:
    """The trunk below the first of some layers, None where there is none.

    Args:
        model: whose blocks stand in one `torch.nn.ModuleList`.
        layers: names of the layers that draws change; they are in that list, or are the model's output head.
    """
    found = {name: block_of(model, name) for name in layers}
    places = [place for place in found.values() if place]
    others = [name for name, place in found.items() if place is None]
    if len({blocks for blocks, _ in places}) != 1 or any(name.split(".")[-1] not in _HEADS for name in others):
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


@contextmanager
def _replaced(blocks: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    before = [vars(block).get("forward") for block in blocks]  # accelerate may have put one there
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            del block.forward
            if old is not None:
                block.forward = old

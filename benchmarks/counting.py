"""What a model's forward and backward cost, counted operation by operation: on meta tensors without any memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_WITHOUT_TRAFFIC = {torch.ops.aten.empty_like, torch.ops.aten.new_empty}


@dataclass(frozen=True)
class Operation:
    """One kernel: floating point operations, bytes read and written, and bytes of an element."""

    flops: int
    bytes: int
    element: int


@dataclass
class Cost:
    """What was counted.

    Attributes:
        operations: all that are no views.
        saved: bytes of activations kept for the backward, each once, parameters left out.
    """

    operations: list[Operation] = field(default_factory=list)
    saved: int = 0

    @property
    def flops(self) -> int:
        """Of matrix products and convolutions, as torch counts them; a masked attention counts whole."""
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes(self) -> int:
        """Read and written, were nothing fused or kept in a cache."""
        return sum(operation.bytes for operation in self.operations)


def count(model: nn.Module, batch: Mapping[str, Tensor], *, backward: bool = False) -> Cost:
    """A forward of a batch, and the backward of the model's loss; the count is this thread's.

    Args:
        model: in the mode that is to be counted, on the batch's device.
        batch: the model's arguments.
        backward: count it too, and what is kept for it; ``batch`` must have labels.
    """
    cost = Cost()
    with _saved_into(cost, model) if backward else torch.no_grad(), _Counter(cost):
        output = model(**batch)
    if backward:
        with _Counter(cost):
            output.loss.backward()
        model.zero_grad()
    return cost


def count_call(function: Callable[[], Any]) -> Cost:
    """A function's operations."""
    cost = Cost()
    with _Counter(cost):
        function()
    return cost


class _Counter(TorchDispatchMode):
    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self._operations = cost.operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if packet in _WITHOUT_TRAFFIC or not outputs or _is_view(func, inputs, outputs):
            return out
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        if packet is torch.ops.aten.embedding:  # reads the rows that it looks up
            inputs = outputs
        traffic = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        self._operations.append(Operation(flops, traffic, outputs[0].element_size()))
        return out


@contextmanager
def _saved_into(cost: Cost, model: nn.Module) -> Iterator[None]:
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, Any] = {}  # holds the storages: an address is used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    cost.saved = sum(storage.nbytes() for storage in found.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    return outputs[0].untyped_storage()._cdata in {tensor.untyped_storage()._cdata for tensor in inputs}


def _bytes(tensor: Tensor) -> int:
    """Of the elements, or of the storage where they are an expansion of it."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

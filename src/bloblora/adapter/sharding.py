"""A model of which each process holds a part: the DTensors that FSDP2 makes of its parameters.

Gathering is a collective: what gathers must be called by all processes, in the same order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate


def is_sharded(model: nn.Module) -> bool:
    """Whether some of what requires a gradient is."""
    return _several() and any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)


def is_split(model: nn.Module) -> bool:
    """Whether any parameter is, so that all processes must call the model together."""
    return _several() and any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, differentiable; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_(tensor: Tensor, values: Tensor) -> None:
    """Copy values, which all processes have, into a tensor, sharded or not."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        values = DTensor.from_local(values.to(tensor.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    tensor.copy_(values)


@contextmanager
def changing(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The same tensors, whole, to change in place; the shards follow at the end."""
    with torch.no_grad():
        wholes = [whole(tensor) for tensor in tensors]
        yield wholes
        for tensor, changed in zip(tensors, wholes, strict=True):
            if changed is not tensor:
                put_(tensor, changed)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What requires a gradient or is an adapter's, whole, by its names in the model's ``state_dict``."""
    state = model.state_dict(keep_vars=True)
    return {name: whole(tensor.detach()) for name, tensor in state.items() if _is_saved(name, tensor)}


def reshard(model: nn.Module) -> None:
    """Leave each process its part alone: a forward that no backward follows leaves some weights whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_(model: nn.Module) -> None:
    """Give each process all of the adapter, in place: one of them can then save it, or look at it, alone.

    For after the training: the next forward brings the shards back.
    """
    reshard(model)
    for name, parameter in [*model.named_parameters()]:
        if isinstance(parameter, DTensor) and _is_saved(name, parameter):
            module, _, attribute = name.rpartition(".")
            own = nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(module), attribute, own)


def _is_saved(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is trained, or an adapter's that is frozen."""
    return tensor.requires_grad or any(part in name for part in (".lora_", ".blob_", ".modules_to_save."))


def _several() -> bool:
    """Whether there can be shards: to look through all parameters takes as long as a step's KL."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()

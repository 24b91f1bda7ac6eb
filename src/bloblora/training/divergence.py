"""Where a training that has diverged did so."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer

from ..adapter.sharding import reshard


class DivergedError(FloatingPointError):
    """A loss, gradient or weight is not finite; the message names the step, the layer and the likely cause."""


def all_finite(tensors: list[Tensor]) -> bool:
    """One reduction and one wait for the device, however many tensors there are.

    The 2-norm is several times faster than the largest magnitude, but overflows for weights that are large and finite.
    """
    if not tensors:
        return True
    for order in (2, torch.inf):
        norms = torch._foreach_norm(tensors, order)
        if torch.isfinite(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms])).all():
            return True
    return False


def first_bad_weight(model: nn.Module) -> str | None:
    """Name of the first trainable weight that is not finite; of a sharded model its shards are looked at."""
    reshard(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if all_finite([p for _, p in trainable]):
        return None
    return next((name for name, p in trainable if not torch.isfinite(p).all()), None)


def last_bad_gradient(model: nn.Module, optimizer: Optimizer) -> str | None:
    """Name of the last weight whose gradient is not finite: gradients flow backwards, so that is where it began.

    The optimizer lists its parameters; to walk through all modules at every step would take longer than the check.
    """
    trained = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if all_finite(trained):
        return None
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return next((name for name, gradient in reversed(gradients) if not torch.isfinite(gradient).all()), None)


def first_bad_activation(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Name of the first module whose output is not finite when ``forward`` runs again; None if all are."""
    names = {module: name for name, module in model.named_modules() if name}
    found: list[str] = []

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if not found and module in names and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
            found.append(names[module])

    with torch.no_grad(), register_module_forward_hook(look):
        forward()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)

"""What a head read of each input in a forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..contexts import hooked

_ROUNDING = 1e-6  # of the largest slope of an input


def with_states(head: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Logits (b, C) of a forward, and what a head read of each input, (b, d), the mean where it read several states.

    None where the forward was without it, as in ``disable_adapter``.
    """
    with _differentiable_from(head) as read:
        logits = forward()
        if not read:
            return logits, None
        slopes = torch.autograd.grad(logits, read, torch.ones_like(logits))
    return logits.detach(), mean_where_read(read[0], slopes[0]).detach()


def mean_where_read(x: Tensor, slope: Tensor) -> Tensor:
    """Mean of inputs x (b, ..., n) over the positions at which the logits have a slope, (b, n).

    A slope that is rounding isn't one, as that of the first query of a text, which sees one key alone.
    """
    size = slope.abs().amax(-1, keepdim=True)
    read = size > _ROUNDING * size.amax([*range(1, size.dim())], keepdim=True)
    return (x * read).reshape(len(x), -1, x.shape[-1]).sum(1) / read.flatten(1).sum(1, keepdim=True).clamp(min=1)


@contextmanager
def _differentiable_from(module: nn.Module) -> Iterator[list[Tensor]]:
    """Gradients are recorded from the input of a module on, and of nothing before it; that input."""
    inputs: list[Tensor] = []

    def begin(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        torch.set_grad_enabled(True)
        x = args[0].clone() if args[0].is_inference() else args[0].detach()
        inputs.append(x.requires_grad_())
        return inputs[-1], *args[1:]

    hooks = [(module.register_forward_pre_hook, begin)]
    with hooked(hooks), torch.inference_mode(False), torch.no_grad():  # and as it was afterwards
        yield inputs

"""The last hidden state of each input, as the model's output head reads it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..contexts import eval_mode
from .forward import HEADS, PredictionTask
from .prediction import check_finite, forwards, order_of, sampler_of
from .sampler import Forward, Sampler
from .states import with_states


@torch.no_grad()
def hidden_states(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    task: PredictionTask,
    sampler: Sampler | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """What the output head reads of each input under the mean weights (N = 0), (n, d) float32 on the CPU.

    A head reads one position of a text that it classifies; where choices are scored by their tokens, the state is the
    mean over the positions that the scores depend on.

    Args:
        model: as for `predict`; its head is a module called ``lm_head``, ``score`` or ``classifier``.
        inputs: encoded examples of ``task``.
        task: collates examples and reads the logits.
        sampler: whose mean is meant; default that of the model's posterior.
        batch_size: inputs a forward.
        progress: show a bar.

    Raises:
        ValueError: the model has no such head, or there is no input.
        FloatingPointError: a state is NaN or infinite.
    """
    sampler, order, rows = sampler or sampler_of(model), order_of(inputs, task), []
    head = next((module for name, module in model.named_modules() if name.split(".")[-1] in HEADS), None)
    if head is None:
        raise ValueError(f"model: {type(model).__name__} has no output head called {', '.join(HEADS)}")
    with eval_mode(model):
        for forward in forwards(model, inputs, task, order, batch_size, progress):
            states = with_states(head, partial(_mean_logits, sampler, forward))[1]
            assert states is not None
            rows.append(check_finite(states.float().cpu(), model))
    return torch.cat(rows)[torch.tensor(order).argsort()]


def _mean_logits(sampler: Sampler, forward: Forward) -> Tensor:
    (logits,) = sampler.logits(forward, 0, 0)
    return logits

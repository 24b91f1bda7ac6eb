"""The last hidden state of each input, as the model's output head reads it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..contexts import eval_mode
from .forward import PredictionTask, output_head
from .prediction import check_finite, encoded, forwards, order_of, sampler_of, with_read
from .sampler import Sampler


@torch.no_grad()
def hidden_states(
    model: nn.Module,
    inputs: Any,
    *,
    task: PredictionTask | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sampler: Sampler | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """What the output head reads of each input under the mean weights (N = 0), (n, d) float32 on the CPU.

    A head reads one position of a text that it classifies; where choices are scored by their tokens, the state is the
    mean over the positions that the scores depend on.

    Args:
        model: as for `predict`; its head is called ``lm_head``, ``score`` or ``classifier``, or PEFT trains it.
        inputs: as for `predict`, but no DataLoader.
        task: collates examples and reads the logits.
        tokenizer: makes ``inputs`` of texts, as for `predict`.
        sampler: whose mean is meant; default that of the model's posterior.
        batch_size: inputs a forward.
        progress: show a bar.

    Raises:
        ValueError: the model has no such head, or there is no input.
        FloatingPointError: a state is NaN or infinite.
    """
    inputs, task = encoded(inputs, task, tokenizer)
    sampler, order, rows, head = sampler or sampler_of(model), order_of(inputs, task), [], output_head(model)
    if order is None:
        raise ValueError("inputs: a DataLoader has its own order; give its data")
    with eval_mode(model):
        for forward in forwards(model, inputs, task, order, batch_size, progress):
            rows.append(with_read(head, sampler, forward)[1])
    return check_finite(torch.cat(rows)[torch.tensor(order).argsort()], model)

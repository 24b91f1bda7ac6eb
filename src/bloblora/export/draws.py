"""Draws of a run as the weights of plain LoRAs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from ..adapter.variant import mean_of
from ..methods import Draw


@contextmanager
@torch.no_grad()
def in_force(model: PeftModel, draw: Draw) -> Iterator[None]:
    """The model's active adapter is the draw inside."""
    active = model.active_adapter
    model.set_adapter(draw.adapter_name)
    parameters = {
        (layer, factor): mean_of(model.get_submodule(layer), draw.adapter_name, factor)
        for layer, factors in draw.weights.items()
        for factor in factors
    }
    before = {key: parameter.clone() for key, parameter in parameters.items()}
    try:
        for (layer, factor), parameter in parameters.items():
            parameter.copy_(draw.weights[layer][factor])
        yield
    finally:
        for key, parameter in parameters.items():
            parameter.copy_(before[key])
        model.set_adapter(active)

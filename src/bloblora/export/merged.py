"""One draw as a whole model: no adapter is left."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..methods import Draw
from ..runs import Run
from .draws import in_force


def write_merged(run: Run, draw: Draw, folder: Path) -> None:
    """Write model and tokenizer as ``from_pretrained`` takes them.

    Args:
        run: its model is changed for good.
        draw: what to merge, where the model has adapters.
        folder: where to.
    """
    model: Any = run.model
    if isinstance(model, PeftModel):
        with in_force(model, draw):
            _untie(model)
            model = model.merge_and_unload()
    if run.task.labels is not None:
        model.config.id2label = dict(enumerate(run.task.labels))
        model.config.label2id = {label: index for index, label in enumerate(run.task.labels)}
    model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _untie(model: PeftModel) -> None:
    """Give an adapted head a weight of its own: a merge must not change the embedding that it is tied to."""
    base: Any = model.get_base_model()
    embedding = base.get_input_embeddings()
    heads: list[Any] = [layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer)]
    for head in heads:
        if getattr(head, "weight", None) is embedding.weight:
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            base.config.tie_word_embeddings = False

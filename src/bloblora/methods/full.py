r"""Full fine-tuning: every weight of the base model, no adapter.

.. math:: \min_{W}\ \frac1D \sum_k -\log p(y_k \mid x_k, W)

The learning rate is a tenth of LoRA's, as is usual (Hu et al., arXiv 2106.09685, table 11 and appendix D).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..adapter import AdapterFileError
from ..files import as_os_error, check_finite_tensors, share
from ..prediction import Point, Sampler
from .method import Method


class Full(Method):
    """A point in the space of all weights."""

    name = "full"
    class_means = False
    paper = "2106.09685"
    starts_from_lora = False
    training_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-5}
    deterministic = True
    whole_model = True
    files = ("config.json", "generation_config.json", "*.safetensors")

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base model itself."""
        return base.train()

    def save(self, model: nn.Module, sampler: Sampler, folder: Path) -> None:
        """Write the whole model as ``from_pretrained`` takes it, in one file."""
        check_finite_tensors(dict(model.named_parameters()), "the model")
        partial = folder / ".full"
        with as_os_error(folder):
            model.save_pretrained(partial, max_shard_size="1TB")  # type: ignore[operator]
        share(*partial.glob("*.safetensors"))
        for file in partial.iterdir():
            file.replace(folder / file.name)
        shutil.rmtree(partial)

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The base model with the saved weights."""
        try:
            load_model(base, self.weights_file(folder))
        except RuntimeError as error:
            raise AdapterFileError(f"{folder}: these weights don't fit {type(base).__name__}: {error}") from error
        return base.eval(), Point()

    def weights_file(self, folder: Path) -> Path:
        """The model's file."""
        file = folder / SAFE_WEIGHTS_NAME
        if not file.is_file():
            raise AdapterFileError(f"{folder}: {SAFE_WEIGHTS_NAME} is missing; a fine-tuned model has it")
        return file

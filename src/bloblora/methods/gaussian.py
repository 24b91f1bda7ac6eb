"""What methods that end in a Gaussian over LoRA's factors share: how it is kept, and drawn from."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from .. import adapter
from ..adapter import AdapterFileError, find_posterior
from ..adapter.storage import BLOB_CONFIG
from ..prediction import Sampler, WeightDraws
from .method import Method


class GaussianMethod(Method):
    """A method whose model has a `bloblora.adapter.Posterior` after `fit`."""

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The adapter with its posterior."""
        model = adapter.load(base, folder)
        return model, posterior_draws(model)

    def weights_file(self, folder: Path) -> Path:
        """The mean's file."""
        file = super().weights_file(folder)
        if not (file.parent / BLOB_CONFIG).is_file():
            raise AdapterFileError(f"{folder}: the posterior's files are missing; without them this is a plain LoRA")
        return file


def posterior_draws(model: nn.Module) -> WeightDraws:
    """Draws from the posterior of a model that has one."""
    posterior = find_posterior(model)
    assert posterior is not None
    return WeightDraws(posterior)

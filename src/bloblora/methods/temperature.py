r"""Temperature scaling (Guo et al., arXiv 1706.04599): one number, fitted on held-out data.

.. math:: p(y \mid x) = \mathrm{softmax}(f(x)/T), \qquad T = \arg\min_T \sum_{k \in \text{held out}} \mathrm{NLL}_k

It goes on top of any method: for draws, T divides the logits of each one, and the NLL is that of the averaged
probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..prediction import Prediction, Sampler, Tempered, predict
from .method import Method, Training, read_state, write_state

_LOG_RANGE = math.log(20.0)
_NUM_SAMPLES = 10
# What is the inner method's: attributes, and functions.
_INNERS = (
    *("name", "paper", "training_defaults", "lora_defaults"),
    *("starts_from_lora", "post_hoc", "whole_model", "gaussian", "takes_prior", "deterministic", "needs_head"),
    *("check_run", "described", "prepare", "weights_file"),
)


@dataclass(kw_only=True)
class TemperatureScaled(Method):
    """Another method whose confidence is scaled, on a share ``holdout`` of the records: ``temperature_scaling``."""

    inner: Method
    holdout: float  # type: ignore[misc]  # an option here

    writes_text = False

    def __post_init__(self) -> None:
        for attribute in _INNERS:
            setattr(self, attribute, getattr(self.inner, attribute))
        self.files = (*self.inner.files, "temperature.json")  # type: ignore[misc]

    def check_draws(self, num_samples: int) -> None:
        """Raises: a temperature divides logits."""
        raise ValueError(
            f"method {self.name!r} with temperature scaling: a temperature divides logits, which no weights of an "
            "adapter do; export a run that was trained without it"
        )

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train on what isn't held out, then fit T."""
        sampler = self.inner.fit(model, training)
        prediction = predict(model, training.holdout, _NUM_SAMPLES, task=training.task, sampler=sampler)
        labels = torch.tensor([example["label"] for example in training.holdout])
        return Tempered(sampler, fit_temperature(prediction.log_probs, labels))

    def save(self, model: nn.Module, sampler: Sampler, folder: Path) -> None:
        """Write the inner method's files and T."""
        assert isinstance(sampler, Tempered)
        self.inner.save(model, sampler.sampler, folder)
        write_state(folder, "temperature", {"temperature": sampler.temperature})

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The inner method's model and sampler, and T."""
        model, sampler = self.inner.load(base, folder)
        return model, Tempered(sampler, read_state(folder, "temperature")[0]["temperature"])


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """T in [1/20, 20] with the lowest NLL of the averaged probabilities.

    ``log_probs`` is (S, n, C), -inf for a class that an input lacks; ``labels`` is (n,).
    """
    log_probs = log_probs.double()

    def nll(log_temperature: float) -> float:
        scaled = (log_probs / math.exp(log_temperature)).log_softmax(-1)
        return F.nll_loss(Prediction(scaled, len(scaled)).log_probabilities, labels).item()

    return math.exp(minimize_scalar(nll, bounds=(-_LOG_RANGE, _LOG_RANGE), method="bounded").x)

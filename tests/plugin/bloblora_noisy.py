"""A trained LoRA with noise of one relative size: a method that bloblora knows nothing of."""

from dataclasses import dataclass, field

import torch

from bloblora import adapter
from bloblora.methods.scaled_a import ScaledA, ScaledMethod
from bloblora.prediction import WeightDraws


@dataclass(kw_only=True)
class Noisy(ScaledMethod):
    """A point that is trained, and noise that isn't."""

    noise_size: float = field(
        default=0.1, metadata={"help": "Relative size of the noise on each row of A.", "search": (0.03, 0.3)}
    )

    name = "noisy"
    paper = "0000.00000"

    def __post_init__(self):
        if not self.noise_size > 0:
            raise ValueError(f"noise_size must be above 0, got {self.noise_size}")

    def fit(self, model, training):
        """Train a plain LoRA."""
        training.run(model)
        return WeightDraws(NoisyRows(model, self.noise_size))

    def load(self, base, folder):
        """The LoRA, with this method's noise."""
        model = adapter.load(base, folder)
        return model, WeightDraws(NoisyRows(model, self.noise_size))


class NoisyRows(ScaledA):
    """Row i of A times 1 + ε."""

    def __init__(self, model, size):
        super().__init__(model)
        self.size = size

    def scale(self, layer, weight, generator):
        """1 + ε, (r, 1)."""
        return 1 + self.size * torch.randn(len(weight), 1, generator=generator).to(weight)

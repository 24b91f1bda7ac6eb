"""From draws of the weights to probabilities and their uncertainty."""

from .linearized import Linearized
from .predict import average_draws, predict
from .prediction import Prediction
from .sampler import Point, Sampler, Tempered, WeightDraws
from .stopping import StoppingRule
from .top_blocks import TopBlocks

__all__ = [
    "Linearized",
    "Point",
    "Prediction",
    "Sampler",
    "StoppingRule",
    "Tempered",
    "TopBlocks",
    "WeightDraws",
    "average_draws",
    "predict",
]

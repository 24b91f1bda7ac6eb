"""From draws of the weights to probabilities and their uncertainty."""

from .approximations import Linearized, StoppingRule, TopBlocks
from .hidden import hidden_states
from .prediction import Prediction, average_draws, predict
from .sampler import Point, Sampler, ScalableWeights, Tempered, WeightDraws

__all__ = [
    "Linearized",
    "Point",
    "Prediction",
    "Sampler",
    "ScalableWeights",
    "StoppingRule",
    "Tempered",
    "TopBlocks",
    "WeightDraws",
    "average_draws",
    "hidden_states",
    "predict",
]

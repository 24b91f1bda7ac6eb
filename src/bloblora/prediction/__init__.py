"""From draws of the weights to probabilities and their uncertainty."""

from .predict import average_draws, predict
from .prediction import Prediction
from .sampler import Point, Sampler, Tempered, WeightDraws

__all__ = ["Point", "Prediction", "Sampler", "Tempered", "WeightDraws", "average_draws", "predict"]

"""From draws of the weights to probabilities and their uncertainty."""

from .predict import average_draws, predict
from .prediction import Prediction

__all__ = ["Prediction", "average_draws", "predict"]

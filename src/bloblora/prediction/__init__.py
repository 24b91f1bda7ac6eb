"""From draws of the weights to probabilities and their uncertainty."""

from .approximations import Linearized, StoppingRule, TopBlocks
from .distance import DISTANCES, Distance
from .hidden import hidden_states
from .kinds import KINDS, MultiLabelPrediction, Prediction, RewardPrediction, TagsPrediction, ValuePrediction
from .prediction import average_draws, predict
from .sampler import Point, Sampler, ScalableWeights, Tempered, WeightDraws
from .temperature import fit_temperature, set_temperature, tempered_nll

__all__ = [
    "DISTANCES",
    "KINDS",
    "Distance",
    "Linearized",
    "MultiLabelPrediction",
    "Point",
    "Prediction",
    "RewardPrediction",
    "Sampler",
    "ScalableWeights",
    "StoppingRule",
    "TagsPrediction",
    "Tempered",
    "TopBlocks",
    "ValuePrediction",
    "WeightDraws",
    "average_draws",
    "fit_temperature",
    "hidden_states",
    "predict",
    "set_temperature",
    "tempered_nll",
]

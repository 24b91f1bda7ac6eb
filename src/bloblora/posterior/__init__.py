"""Distributions over LoRA's A: pure torch, no transformer, no PEFT."""

from .estimators import ESTIMATORS, project, separate_noise
from .gaussian import (
    STD_PARAMETERIZATIONS,
    init_std_parameter,
    kl_divergence,
    kl_flow_,
    kl_gradients,
    log_std,
    sample,
    scaled,
    stack,
    std,
)
from .priors import (
    PRIORS,
    LaplacePrior,
    LearnedNormalPrior,
    NormalPrior,
    Prior,
    ScaleMixturePrior,
    StudentTPrior,
    build_prior,
)

__all__ = [
    "ESTIMATORS",
    "PRIORS",
    "STD_PARAMETERIZATIONS",
    "LaplacePrior",
    "LearnedNormalPrior",
    "NormalPrior",
    "Prior",
    "ScaleMixturePrior",
    "StudentTPrior",
    "build_prior",
    "init_std_parameter",
    "kl_divergence",
    "kl_flow_",
    "kl_gradients",
    "log_std",
    "project",
    "sample",
    "scaled",
    "separate_noise",
    "stack",
    "std",
]

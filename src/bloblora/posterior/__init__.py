"""Distributions over LoRA's A: pure torch, no transformer, no PEFT."""

from .estimators import ESTIMATORS, PER_EXAMPLE, project, separate_noise
from .gaussian import (
    STD_PARAMETERIZATIONS,
    init_std_parameter,
    kl_divergence,
    kl_flow_,
    kl_gradients,
    log_std,
    sample,
    stack,
    std,
    std_parameter,
)
from .located import LocatedPrior
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
    "PER_EXAMPLE",
    "PRIORS",
    "STD_PARAMETERIZATIONS",
    "LaplacePrior",
    "LearnedNormalPrior",
    "LocatedPrior",
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
    "separate_noise",
    "stack",
    "std",
    "std_parameter",
]

"""Distributions over LoRA's A: pure torch, no transformer, no PEFT."""

from .estimators import ESTIMATORS, project
from .gaussian import STD_PARAMETERIZATIONS, init_std_parameter, kl_divergence, kl_flow_, log_std, sample, std

__all__ = [
    "ESTIMATORS",
    "STD_PARAMETERIZATIONS",
    "init_std_parameter",
    "kl_divergence",
    "kl_flow_",
    "log_std",
    "project",
    "sample",
    "std",
]

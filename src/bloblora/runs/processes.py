"""The processes of one run, as `accelerate launch` or `torchrun` start them."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpu() -> bool:
    """Whether the processes compute on the CPU: there is nothing else, or accelerate was told so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def processes() -> PartialState:
    """This process among all of the run, which can wait for one another; the only one where no launcher started it."""
    return PartialState(cpu=on_cpu())

"""The processes of one run, as `accelerate launch` or `torchrun` start them."""

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn

from .config import RunError


def on_cpu() -> bool:
    """Whether the processes compute on the CPU: there is nothing else, or accelerate was told so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def processes() -> PartialState:
    """This process among all of the run, which can wait for one another; the only one where no launcher started it."""
    return PartialState(cpu=on_cpu())


def sharded() -> bool:
    """Whether FSDP2 splits models over the processes, so that all must call a model together."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and Accelerator(cpu=on_cpu()).is_fsdp2


def shard(model: nn.Module) -> nn.Module:
    """Leave each process a part of every weight; those of the first process count."""
    return fsdp2_prepare_model(Accelerator(cpu=on_cpu()), model)


def check_alone(command: str) -> None:
    """Raise a RunError where several processes were started for a command that isn't for them."""
    if (count := processes().num_processes) > 1:
        raise RunError(f"{command} is one process, not {count}; `bloblora predict` is what several can share")

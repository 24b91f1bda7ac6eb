"""Noise apart from that of the training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def separate_noise(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave torch's global generators of the CPU and of ``device`` as they were; with a seed they start from it inside.

    Other devices are not touched: asking all of them at every step would cost time, and torch warns of it.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield

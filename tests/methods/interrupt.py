"""A training that is stopped from outside."""

from transformers import TrainerCallback


class Stop(Exception):
    """What stops it."""


class Interrupt(TrainerCallback):
    """Raises `Stop` after so many steps, of one training or of several together."""

    def __init__(self, after):
        self.left = after

    def on_step_end(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            raise Stop

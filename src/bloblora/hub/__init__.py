"""Runs on the Hugging Face hub: the model card, and the upload. `bloblora.runs.load_run` reads ``hub:user/name``."""

from .card import model_card, write_card
from .push import push

__all__ = ["model_card", "push", "write_card"]

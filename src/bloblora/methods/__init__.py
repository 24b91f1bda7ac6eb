"""One file a method, all of one shape: how an adapter is prepared, fitted, saved and loaded, and drawn from."""

from dataclasses import fields
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

from ..registry import Registry
from .method import TEMPERED_NLL, Draw, GaussianMethod, Method, Training
from .rescaled import Rescaled


def _problem(name: str, kind: Any) -> str | None:
    """Why a class of another package can't be a method, or None."""
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        return "it isn't a class of bloblora.methods.Method"
    if kind.name != name:
        return f"its name is {kind.name!r}"
    taken = {option.name for owner in (LoraConfig, TrainingArguments) for option in fields(owner)}
    if clash := sorted(taken & kind.options().keys()):
        return f"options of LoRA or the Trainer have the names of its own: {', '.join(clash)}"
    return None


METHODS: Registry[type[Method]] = Registry(
    "bloblora.methods",
    {
        "lora": f"{__name__}.lora:Lora",
        "map": f"{__name__}.map:Map",
        "full": f"{__name__}.full:Full",
        "mc-dropout": f"{__name__}.mc_dropout:McDropout",
        "ensemble": f"{__name__}.ensemble:Ensemble",
        "blob": f"{__name__}.blob:Blob",
        "mixture": f"{__name__}.mixture:Mixture",
        "laplace-lora": f"{__name__}.laplace:LaplaceLora",
        "tfb": f"{__name__}.tfb:Tfb",
        "swag": f"{__name__}.swag:Swag",
        "ivon": f"{__name__}.ivon:Ivon",
        "scalabl": f"{__name__}.scalabl:Scalabl",
        "c-lora": f"{__name__}.c_lora:CLora",
        "distilled": f"{__name__}.distilled:Distilled",
    },
    _problem,
)
"""The methods by name."""

__all__ = ["METHODS", "TEMPERED_NLL", "Draw", "GaussianMethod", "Method", "Rescaled", "Training"]

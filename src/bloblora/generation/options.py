"""Options of transformers' ``generate``: what is left open comes from the model's generation config, which has some of
its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNCHANGED: Mapping[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "top_h": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""With a temperature of 1, sampling by the model's own probabilities, whatever its generation config has."""
_ONE = ("num_beams", "num_return_sequences")


def option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """What ``generate`` takes: of the options, of a ``generation_config`` among them, or of the model's."""
    if name in options:
        return options[name]
    configs = (options.get("generation_config"), getattr(model, "generation_config", None))
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def check_one_answer(options: Mapping[str, Any]) -> None:
    """Raise a ValueError where options ask for several answers to a prompt."""
    for name in _ONE:
        value = options.get(name, getattr(options.get("generation_config"), name, None) or 1)
        if value != 1:
            raise ValueError(f"{name} must be 1, got {value}: there is one answer, and one of each draw")


def of_one_answer(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with one answer to each prompt where the model's generation config has several."""
    return {**options, **dict.fromkeys(_ONE, 1)}

"""Options of transformers' ``generate``: what is left open comes from the model's generation config, which has some of
its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

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
LEAST_TEMPERATURE = 1e-6
"""Below it logits over a temperature leave float32."""
_ONE = ("num_beams", "num_return_sequences")


def option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """What ``generate`` takes: of the options, of a ``generation_config`` among them, or of the model's."""
    if name in options:
        return options[name]
    configs = (options.get("generation_config"), getattr(model, "generation_config", None))
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a ValueError where options ask for several answers, for no cache, or for a temperature near 0."""
    for name in _ONE:
        value = options.get(name, getattr(options.get("generation_config"), name, None) or 1)
        if value != 1:
            raise ValueError(f"{name} must be 1, got {value}: there is one answer, and one of each draw")
    if 0 < (option(None, options, "temperature") or 0) < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature must be at least {LEAST_TEMPERATURE}, got {option(None, options, 'temperature')}; "
            "do_sample=False takes the most probable token"
        )
    if option(None, options, "use_cache") is False:
        raise ValueError("use_cache must be True, got False: each draw reads one token at a time, and keeps the others")


def of_one_answer(model: Any, options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Options under which `Decoding` can write, with what the model's generation config would add.

    That is one answer to each prompt, a cache that can be copied unless another one is asked for, and stop strings as a
    stopping criterion, since ``generate`` hands no tokenizer to a decoding method of one's own.

    Raises:
        ValueError: there are stop strings without a tokenizer.
    """
    found = {**options, **dict.fromkeys(_ONE, 1), "use_cache": True}
    if option(None, options, "cache_implementation") is None:
        found["cache_implementation"] = None
    if not (texts := option(model, options, "stop_strings")):
        return found
    if tokenizer is None:
        raise ValueError(
            f"stop_strings: {texts!r} are found in texts; give the tokenizer, or stop_strings=None to write on"
        )
    criteria = [*(options.get("stopping_criteria") or []), StopStringCriteria(tokenizer, texts)]
    return found | {"stop_strings": None, "stopping_criteria": StoppingCriteriaList(criteria)}


def decoder_start(model: Any, options: Mapping[str, Any] | None = None) -> Any:
    """The token that an encoder-decoder's answers start from, as ``generate`` takes it.

    Raises:
        ValueError: there is none.
    """
    for name in ("decoder_start_token_id", "bos_token_id"):
        if (token := option(model, options or {}, name)) is not None:
            return token
    if (token := getattr(model.config, "decoder_start_token_id", None)) is None:
        raise ValueError(
            "decoder_start_token_id: the model's generation config has none, and no bos_token_id; set the token that "
            "answers start from in model.generation_config"
        )
    return token


def with_mask(model: Any, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Inputs with the attention mask that ``generate`` infers where there is none, so that the draws read the same."""
    padding, ends = (option(model, options, name) for name in ("pad_token_id", "eos_token_id"))
    known = "attention_mask" in inputs or model.config.is_encoder_decoder
    if known or padding is None or padding in (ends if isinstance(ends, list) else [ends]):
        return inputs
    ids = torch.as_tensor(inputs["input_ids"])
    return {**inputs, "attention_mask": (ids != padding).long()} if (ids == padding).any() else inputs

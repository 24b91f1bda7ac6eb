"""Logits of a few tokens, from only those rows of the output head."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F


def label_logits(head: nn.Module, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """`head(hidden)[..., token_ids]`, computed for those rows alone where the head allows it.

    Args:
        head: nn.Linear, or PEFT's LoRA of one (plain, or a variant with `project` and `expand`); others run in full.
        hidden: (b, T, d); the first dimension is the examples, which a variant's noise is drawn for.
        token_ids: (C,).

    Returns: (b, T, C).
    """
    if _is_plain(head):
        return _rows(head, hidden, token_ids)
    if not isinstance(head, LoraLinear) or not _splits_by_row(head):
        return head(hidden)[..., token_ids]
    result = _rows(head.base_layer, hidden, token_ids)
    dtype = result.dtype
    if head.merged or head.disable_adapters:
        return result
    for adapter in head.active_adapters:
        if adapter in head.lora_A:
            result = result + _adapter_rows(head, adapter, hidden, token_ids) * head.scaling[adapter]
    return result.to(dtype)


def _is_plain(layer: nn.Module) -> bool:
    """True for a Linear with an ordinary weight: quantized ones subclass it, offloaded ones have a hook."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooked


def _splits_by_row(head: LoraLinear) -> bool:
    """True when the layer is base rows plus rows of B; disabling a merged one makes PEFT unmerge it first."""
    variants = [head.lora_variant[name] for name in head.active_adapters if name in head.lora_variant]
    projects = all(hasattr(variant, "expand") for variant in variants)
    return _is_plain(head.base_layer) and projects and not (head.merged and head.disable_adapters)


def _adapter_rows(head: LoraLinear, adapter: str, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """The adapter's part, unscaled: (b, T, C)."""
    variant: Any = head.lora_variant.get(adapter)
    weight: Any = head.lora_A[adapter].weight
    x = head._cast_input_dtype(hidden, weight.dtype)
    if variant is not None:
        return variant.expand(head, adapter, variant.project(head, adapter, x), token_ids)
    return _rows(head.lora_B[adapter], head.lora_A[adapter](head.lora_dropout[adapter](x)), token_ids)


def _rows(linear: Any, x: Tensor, token_ids: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias[token_ids]
    return F.linear(x, linear.weight[token_ids], bias)

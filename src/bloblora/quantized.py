"""Quantized base models: bitsandbytes, HQQ, torchao, GPTQ and AWQ, with a LoRA on top of frozen integers."""

import logging
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

LIBRARIES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "hqq": "hqq", "torchao": "torchao"}
"""What each kind of quantization needs."""

_BITSANDBYTES = ("Params4bit", "Int8Params")
_SPEAKS_EACH_TIME = "bitsandbytes.autograd._functions"  # of a cast to float16, once for each layer and forward


def loading_options(
    kind: str, dtype: torch.dtype, device: torch.device, unquantized: list[str] | None
) -> dict[str, Any]:
    """What ``from_pretrained`` takes to quantize a model while it is loaded onto a device; of HQQ nothing.

    ``4bit`` is QLoRA's: NF4 with quantized constants. ``8bit`` is LLM.int8(), ``torchao`` int8 weights. Modules that
    are named as ``unquantized`` stay as they are; None leaves it to Transformers, which keeps the last layer only.
    """
    if kind in ("none", "hqq"):
        return {}
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=unquantized)
    elif kind == "8bit":
        logging.getLogger(_SPEAKS_EACH_TIME).setLevel(logging.ERROR)
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantized)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=unquantized,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def quantize_hqq(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Quantize a model's linear layers below its head by HQQ, 4 bit in groups of 64: Transformers 5.24 doesn't.

    Raises:
        ValueError: a layer's weight doesn't divide into groups.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    options = BaseQuantizeConfig(nbits=4, group_size=64)
    trunk: Any = model.base_model
    for name, layer in [*trunk.named_modules()]:
        if type(layer) is nn.Linear:
            try:
                quantized = HQQLinear(layer, options, compute_dtype=dtype, device=str(device))
            except AssertionError as error:
                raise ValueError(f"{name}: HQQ can't quantize a weight {tuple(layer.weight.shape)}: {error}") from error
            trunk.set_submodule(name, quantized)


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> None:
    """Put ordinary layers, of the weights that the integers stand for, in the quantized ones' place."""
    for name, layer in [*model.named_modules()]:
        if is_quantized(layer):
            weight = _weight_of(layer, model.dtype)
            plain: nn.Module
            with torch.device("meta"):
                if getattr(layer, "source_cls", None) is Conv1D:  # GPT-2's, which bitsandbytes transposes
                    plain, weight = Conv1D(*weight.shape), weight.T.contiguous()
                else:
                    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
            plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach().to(model.dtype), requires_grad=False)
            model.set_submodule(name, plain)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)


def _weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    if not is_packed(layer):
        return dequantize_module_weight(layer).to(dtype)
    identity = torch.eye(layer.in_features, dtype=dtype, device=layer.qweight.device)
    product = layer(identity)  # each of gptqmodel's kernels packs weights in a way of its own
    return (product if layer.bias is None else product - layer.bias).T.contiguous()


def is_packed(layer: nn.Module) -> bool:
    """Whether this layer of a base model is a linear one of GPTQ or AWQ, which PEFT's `all-linear` doesn't find."""
    return hasattr(layer, "qweight")


def is_quantized(layer: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes, HQQ, torchao, GPTQ or AWQ, and not PEFT's around one."""
    if isinstance(layer, BaseTunerLayer):
        return False
    weight = type(getattr(layer, "weight", None))
    by_weight = weight.__name__ in _BITSANDBYTES or weight.__module__.startswith("torchao.")
    return by_weight or hasattr(layer, "W_q") or is_packed(layer)


def keep_differentiable(model: nn.Module) -> None:
    """Switch off what bitsandbytes 0.50 does to 4-bit weights in a CPU's first forward in eval mode.

    Where the CPU computes in bfloat16 it packs them anew, for a product in bfloat16 that has no gradient
    (``Linear4bit.forward`` and ``matmul_4bit``): a training that was evaluated would go on without the gradients of
    what is below each layer.

    Raises:
        ValueError: it has happened already.
    """
    for name, layer in model.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: bitsandbytes has packed this 4-bit layer for a CPU's forwards without gradients, and "
                    "gradients no longer go through it; load the base model again, and add the adapter before its "
                    "first forward"
                )

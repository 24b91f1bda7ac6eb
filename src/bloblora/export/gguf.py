"""LoRAs as llama.cpp takes them.

llama.cpp's ``convert_lora_to_gguf.py`` is in no package, so the files are written here, for the families of models of
which the tests compare them with what llama.cpp answers. A file holds A (r, n) and B (m, r) of each layer under
llama.cpp's name of it; the update is scaled by α/r. Llama's rotary embedding turns neighbours there, and dimensions
half a head apart in transformers, so the rows of q and k change places, in B as in the weights.
"""

from pathlib import Path
from typing import Any

import gguf
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig

from .. import models
from ..runs import RunDescription, RunError

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def check_gguf(description: RunDescription) -> None:
    """Raise a RunError where a run's adapters have no GGUF form that is known to be right."""
    if description.task.labels is not None:
        raise RunError("a classification head has no place in a LoRA's GGUF; use --format merged")
    kind = AutoConfig.from_pretrained(models.resolve(description.config.model)).model_type
    if kind not in _ARCHITECTURES:
        raise RunError(
            f"format 'gguf' knows {', '.join(_ARCHITECTURES)}, not {kind!r}; use --format lora, and for each of its "
            "folders `python convert_lora_to_gguf.py --base BASE FOLDER` of a checkout of llama.cpp"
        )


def write_gguf(file: Path, model: PeftModel, adapter_name: str) -> None:
    """Write an adapter, in float32.

    Raises:
        RunError: it has a layer that llama.cpp has no name for, or a head that is tied to the embedding.
    """
    config: Any = model.get_base_model().config
    lora: Any = model.peft_config[adapter_name]
    architecture = _ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.lora_alpha))
    for key, tensor in model.state_dict().items():
        layer, found, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not found or not factor.endswith(f".{adapter_name}.weight"):
            continue
        name = names.get_name(layer)
        if name is None or (layer == "lm_head" and config.tie_word_embeddings):
            raise RunError(f"{layer}: llama.cpp takes no LoRA of this layer; train with other --targets")
        heads = _PERMUTED.get(name.rpartition(".")[2]) if architecture == gguf.MODEL_ARCH.LLAMA else None
        if heads and factor.startswith("B"):
            tensor = _permuted(tensor, getattr(config, heads))
        writer.add_tensor(f"{name}.weight.lora_{factor[0].lower()}", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(b: Tensor, heads: int) -> Tensor:
    """B (m, r) with the rows of each head from halves to neighbours."""
    return b.reshape(heads, 2, -1, b.shape[-1]).transpose(1, 2).reshape(b.shape).contiguous()

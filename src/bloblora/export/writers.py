"""One draw as files: a LoRA as PEFT or llama.cpp takes it, or a merged model.

llama.cpp's ``convert_lora_to_gguf.py`` is in no package, so GGUF files are written here, for the families of models of
which the tests compare them with what llama.cpp answers. A file holds A (r, n) and B (m, r) of each layer under
llama.cpp's name of it; the update is scaled by α/r, with r of the layer. Llama's rotary embedding turns neighbours
there, and dimensions half a head apart in transformers, so the rows of q and k change places, in B as in the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from .. import adapter, models
from ..adapter.bayesianize import moves_base
from ..adapter.storage import MEAN_CONFIG, MEAN_FILE
from ..adapter.variant import mean_of
from ..files import as_os_error, check_finite_tensors, read_json, share, write_json, write_tensors
from ..methods import Draw
from ..runs import Run, RunDescription, RunError

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


@contextmanager
@torch.no_grad()
def in_force(model: PeftModel, draw: Draw) -> Iterator[None]:
    """The model's active adapter is the draw inside."""
    active = model.active_adapter
    model.set_adapter(draw.adapter_name)
    parameters = {
        (layer, factor): mean_of(model.get_submodule(layer), draw.adapter_name, factor)
        for layer, factors in draw.weights.items()
        for factor in factors
    }
    before = {key: parameter.clone() for key, parameter in parameters.items()}
    try:
        for (layer, factor), parameter in parameters.items():
            parameter.copy_(draw.weights[layer][factor])
        yield
    finally:
        for key, parameter in parameters.items():
            parameter.copy_(before[key])
        model.set_adapter(active)


def write_lora(folder: Path, model: PeftModel, adapter_name: str, dtype: torch.dtype) -> None:
    """Write an adapter as PEFT does, its tensors in ``dtype``; all its layers have one rank and the scale α/r."""
    adapter.save(model, folder, adapter_name)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    lora: Any = model.peft_config[adapter_name]
    if lora.use_rslora or lora.rank_pattern or lora.alpha_pattern:
        _unify(folder, layers_of(model, adapter_name), adapter_name)
    if dtype != torch.float32:
        file = folder / MEAN_FILE
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        check_finite_tensors(tensors, f"dtype {dtype}")  # float16 ends at 65,504
        write_tensors(file, tensors)


def layers_of(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that an adapter has a LoRA on, by their names, which are those of its files."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.scaling}


def beside(lora: LoraConfig) -> list[str]:
    """What adapters have beside A and B of layers, options of PEFT that servers of LoRAs don't know."""
    start = str(lora.init_lora_weights).lower()
    found = {
        "lora_bias": lora.lora_bias,
        "bias": lora.bias != "none",
        "modules_to_save": lora.modules_to_save,
        "trainable_token_indices": lora.trainable_token_indices,
        f"init_lora_weights={start} (a part of the base weights)": moves_base(start),
    }
    return [name for name, there in found.items() if there]


def _unify(folder: Path, layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Give a saved adapter one rank and one α: zeros fill A and B up, and B is multiplied by what the scales differ.

    Servers know neither rsLoRA's scale nor ranks and alphas of single layers.
    """
    rank = max(layer.r[adapter_name] for layer in layers.values())
    scale = max(layer.scaling[adapter_name] for layer in layers.values())
    tensors = load_file(folder / MEAN_FILE)
    for name, layer in layers.items():
        factor, missing = layer.scaling[adapter_name] / scale, rank - layer.r[adapter_name]
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if f"{name}.{a}" in tensors:
                tensors[f"{name}.{a}"] = F.pad(tensors[f"{name}.{a}"], (0, 0, 0, missing))
                tensors[f"{name}.{b}"] = F.pad(tensors[f"{name}.{b}"] * factor, (0, missing))
        if (bias := f"{name}.lora_B.bias") in tensors:
            tensors[bias] = tensors[bias] * factor
    write_tensors(folder / MEAN_FILE, tensors)
    config = read_json(folder / MEAN_CONFIG, RunError)
    one = {"r": rank, "lora_alpha": scale * rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_json(folder / MEAN_CONFIG, config | one)


def check_gguf(description: RunDescription) -> None:
    """Raise a RunError where a run's adapters have no GGUF form that is known to be right."""
    if description.task.head is not None:
        raise RunError("a classification head has no place in a LoRA's GGUF; use --format merged")
    if extra := beside(description.config.build_lora()):
        raise RunError(f"a LoRA's GGUF holds A and B alone, and this run has {', '.join(extra)}; use --format merged")
    kind = models.model_type(description.config.model)
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
    layers = layers_of(model, adapter_name)
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
        if factor.startswith("B"):  # by what the layer's scale differs from α/r
            own = layers[f"base_model.model.{layer}"]
            tensor = tensor * (own.scaling[adapter_name] * own.r[adapter_name] / lora.lora_alpha)
        writer.add_tensor(f"{name}.weight.lora_{factor[0].lower()}", tensor.float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_merged(run: Run, draw: Draw, folder: Path) -> None:
    """Write model and tokenizer as ``from_pretrained`` takes them; the run's model is changed for good.

    Raises:
        RunError: PEFT can't merge the adapter.
        FloatingPointError: a weight is NaN or infinite.
    """
    model: Any = run.model
    if isinstance(model, PeftModel):
        with in_force(model, draw):
            _untie(model)
            try:
                model = model.merge_and_unload()
            except RuntimeError as error:
                raise RunError(f"the adapter can't be merged: {error}") from error
    name_labels(model.config, run)
    check_finite_tensors(model.state_dict(), "the merged model")
    with as_os_error(folder):
        model.save_pretrained(folder)
        share(*folder.glob("*.safetensors"))
        run.tokenizer.save_pretrained(folder)


def name_labels(config: PretrainedConfig, run: Run) -> None:
    """Give a model's configuration the names of its labels, or other outputs, in the order of its head's rows.

    It also says whether these are labels that exclude each other, so that transformers takes a softmax of no others.
    """
    if run.task.head is not None:
        config.id2label = dict(enumerate(run.task.head))
        config.label2id = {label: index for index, label in enumerate(run.task.head)}
        config.problem_type = run.task.likelihood.problem_type


def _permuted(b: Tensor, heads: int) -> Tensor:
    """B (m, r) with the rows of each head from halves to neighbours."""
    return b.reshape(heads, 2, -1, b.shape[-1]).transpose(1, 2).reshape(b.shape).contiguous()


@torch.no_grad()
def _untie(model: PeftModel) -> None:
    """Give an adapted head a weight of its own: a merge must not change the embedding that it is tied to."""
    base: Any = model.get_base_model()
    embedding = base.get_input_embeddings()
    heads: list[Any] = [layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer)]
    for head in heads:
        if getattr(head, "weight", None) is embedding.weight:
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            base.config.tie_word_embeddings = False

"""LoRAs for llama.cpp: the file's form, and what llama.cpp itself makes of it where llama-cpp-python is installed.

Against llama.cpp's own `convert_lora_to_gguf.py`, which no package has, the tensors were compared once by hand: equal
bit for bit for Llama, Mistral, Qwen2 and Qwen3 with all seven linear layers of a block and an untied head.
"""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bloblora import runs
from bloblora.export import export
from bloblora.export.writers import _permuted
from bloblora.runs import RunError
from tests.export.tiny_gguf import write_base
from tests.tasks.conftest import tiny_causal, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def test_rows_of_a_head_go_from_halves_to_neighbours():
    b = torch.arange(8.0)[:, None]  # two heads of four rows
    assert _permuted(b, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_file_holds_the_adapter(run_of, tmp_path):
    directory = run_of("blob", target_modules=TARGETS)
    export(directory, tmp_path / "gguf", "gguf", num_samples=1)
    export(directory, tmp_path / "lora", num_samples=1)
    reader = gguf.GGUFReader(tmp_path / "gguf" / "draw_00.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    config = json.loads((tmp_path / "lora" / "draw_00" / "adapter_config.json").read_text())
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": config["lora_alpha"],
    }
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = load_file(tmp_path / "lora" / "draw_00" / "adapter_model.safetensors")
    assert len(found) == len(expected) == 2 * 2 * len(TARGETS)
    name = "base_model.model.model.layers.1.{}.lora_{}.weight"
    for theirs, ours in {"attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}.items():
        for factor in "AB":
            tensor = found[f"blk.1.{theirs}.weight.lora_{factor.lower()}"]
            assert np.array_equal(tensor, expected[name.format(ours, factor)].numpy())


def test_an_unknown_family_is_told_what_to_run(run_of, tmp_path):
    tiny_causal("gemma").save_pretrained(tmp_path / "base")
    train_tokenizer().save_pretrained(tmp_path / "base")
    directory = run_of("lora", model=str(tmp_path / "base"))
    with pytest.raises(RunError, match=r"knows llama, .* not 'gemma'; use --format lora, .*convert_lora_to_gguf.py"):
        export(directory, tmp_path / "out", "gguf")


@pytest.mark.parametrize("method", ["blob", "mc-dropout"])
def test_llama_cpp_gives_the_draws(method, run_of, tmp_path):
    """Log-probabilities of the next token after each of a text's, against the merged model in transformers."""
    llama_cpp = pytest.importorskip("llama_cpp")
    directory = run_of(method, target_modules=TARGETS)
    export(directory, tmp_path / "gguf", "gguf", num_samples=2, seed=5)
    write_base(tmp_path / "base.gguf", runs.open_run(directory).config.model)
    tokens = list(range(10, 30))
    single = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # the default cache is half
    options = {"logits_all": True, "n_threads": 1, "n_ctx": 64, "verbose": False, **single}
    found = {}
    for name in ("mean", "draw_00", "draw_01"):
        lora = str(tmp_path / "gguf" / f"{name}.gguf")
        model = llama_cpp.Llama(str(tmp_path / "base.gguf"), lora_path=lora, **options)
        model.eval(tokens)
        found[name] = torch.tensor(model.scores[: len(tokens)]).log_softmax(-1)
        draw = None if name == "mean" else int(name[-2:])
        export(directory, tmp_path / name, "merged", seed=5, draw=draw)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            expected = merged(torch.tensor([tokens])).logits[0].log_softmax(-1)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-4)
    assert (found["draw_00"] - found["draw_01"]).abs().max() > 0.5

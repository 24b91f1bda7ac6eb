"""vLLM 0.32's own rules of what it takes for a LoRA, file by file; each says where in vLLM it stands.

vLLM itself served such a folder, see tests/client/test_vllm.py.
"""

import json
import shlex

import pytest
from safetensors import safe_open

from bloblora.export import export

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks in vllm/config/lora.py
SUPPORTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}
"""`get_supported_lora_modules` in vllm/lora/utils.py, with the packed ones expanded, for Llama."""


def check_config(config, largest_rank):
    """`PEFTHelper.__post_init__`, `_validate_features` and `validate_legal` in vllm/lora/peft_helper.py."""
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert 0 < config["r"] <= largest_rank
    assert config["bias"] == "none"
    assert config["init_lora_weights"] is True
    off = ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora")
    assert not any(config.get(name) for name in (*off, "use_qalora", "rank_pattern", "alpha_pattern", "use_rslora"))


def check_names(names):
    """`parse_fine_tuned_lora_name` in vllm/lora/utils.py; `check_unexpected_modules` in vllm/lora/lora_model.py."""
    for name in names:
        prefix, *_, module, factor, kind = name.split(".")
        assert (prefix, kind) == ("base_model", "weight")
        assert name.startswith("base_model.model.")
        assert module in SUPPORTED
        assert factor in ("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("blob", {}),
        ("blob", {"target_modules": ["q_proj", "down_proj", "lm_head"], "r": 9}),
        ("blob-symmetric", {"top_blocks": 1}),
        ("mc-dropout", {}),
        ("ensemble", {}),
    ],
)
def test_files_are_what_vllm_takes(method, options, run_of, tmp_path):
    manifest = export(run_of(method, **options), tmp_path / "out", num_samples=2)
    command = shlex.split(manifest.commands["vllm"])
    assert command[:3] == ["vllm", "serve", manifest.base_model]
    largest = int(command[command.index("--max-lora-rank") + 1])
    assert largest in RANKS
    assert manifest.on_head == ("target_modules" in options)
    names = dict(module.split("=") for module in command[command.index("--lora-modules") + 1 :])
    assert [*names] == ["mean", "draw_00", "draw_01"]
    for folder in names.values():
        assert {file.name for file in (tmp_path / "out" / folder).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        config = json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())
        check_config(config, largest)
        with safe_open(tmp_path / "out" / folder / "adapter_model.safetensors", "pt") as file:
            check_names(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert len(shapes) == len({name.replace("lora_B", "lora_A") for name in shapes}) * 2
        ranks = {shape[0] if "lora_A" in name else shape[1] for name, shape in shapes.items()}
        assert ranks == {config["r"]}

"""PEFT's other kinds of LoRA through a run's whole life: trained, stopped, resumed, saved, loaded, exported, merged."""

import json

import gguf
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from bloblora import find_posterior, runs
from bloblora.export import export
from bloblora.runs import RunError
from tests.runs.test_runs import Kill
from tests.tasks.conftest import tiny_causal, train_tokenizer
from tests.tiny_base import QUESTIONS, write_jsonl

IDS = torch.arange(3, 31).reshape(4, 7)
KINDS = {
    "scales": {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    "beside": {"lora_bias": True, "bias": "lora_only", "modules_to_save": ["norm"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
BESIDE = {
    "beside": "lora_bias, bias, modules_to_save",
    "pissa": "init_lora_weights=pissa (a part of the base weights)",
    "olora": "init_lora_weights=olora (a part of the base weights)",
}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def run(kind, base, tmp_path_factory):
    """A run that was stopped and went on."""
    folder = tmp_path_factory.mktemp(kind)
    if kind == "beside":  # whose q_proj and v_proj have a bias, without which none can be merged
        base = folder / "base"
        tiny_causal("qwen2").save_pretrained(base)
        train_tokenizer().save_pretrained(base)
    targets = ["q_proj", "v_proj"] + ["down_proj"] * (kind != "beside")
    data = write_jsonl(folder / "questions.jsonl", QUESTIONS * 2)
    config = runs.RunConfig.of(
        data=str(data), output=str(folder / "run"), model=str(base), steps=4, save_steps=2, batch_size=2, validation=0,
        r=2, target_modules=targets, init_std=0.1, learning_rate=0.05, **KINDS[kind],
    )  # fmt: skip
    runs.train(config.with_options(output=str(folder / "whole")), progress=False)
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, progress=False, callbacks=[Kill(3)])
    return runs.train(config, progress=False)


def test_a_run_is_resumed_saved_and_loaded(run):
    folder = runs.open_run(run.config.output).folder
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        assert (folder / name).read_bytes() == (folder.parent / "whole" / name).read_bytes()
    loaded = runs.load_run(folder).predict(QUESTIONS, 3)
    torch.testing.assert_close(loaded.log_probs, run.predict(QUESTIONS, 3).log_probs)
    assert not torch.allclose(loaded.log_probs[0], loaded.log_probs[1])


def test_a_draw_is_exported_and_merged(run, kind, tmp_path):
    model = runs.load_run(run.config.output).model
    with find_posterior(model).draw(0):
        expected = logits(model)
    assert (logits(model) - expected).abs().max() > 1e-3
    manifest = export(run.config.output, tmp_path / "lora", num_samples=1, seed=0)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.config.model), tmp_path / "lora" / "draw_00"
    )
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    export(run.config.output, tmp_path / "merged", "merged", draw=0, seed=0)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    if kind in BESIDE:
        assert f"the adapters have {BESIDE[kind]} beside A and B" in manifest.warnings[0]
        assert manifest.commands == {}
        with pytest.raises(RunError, match="GGUF holds A and B alone, and this run has"):
            export(run.config.output, tmp_path / "gguf", "gguf")
        return
    config = json.loads((tmp_path / "lora" / "draw_00" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert "--max-lora-rank 8 " in manifest.commands["vllm"]
    assert manifest.warnings == []


def test_gguf_has_the_scales_of_layers(run, kind, tmp_path):
    if kind != "scales":
        return
    export(run.config.output, tmp_path / "gguf", "gguf", num_samples=0)
    reader = gguf.GGUFReader(tmp_path / "gguf" / "mean.gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    layers = find_posterior(runs.load_run(run.config.output).model).named_layers()
    for theirs, ours in {"attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}.items():
        a, b = (found[f"blk.1.{theirs}.weight.lora_{factor}"] for factor in "ab")
        layer = layers[f"base_model.model.model.layers.1.{ours}"]
        torch.testing.assert_close(alpha / len(a) * b @ a, layer.get_delta_weight("default"))
    assert alpha / 2 != layer.scaling["default"]


def test_a_bias_that_has_no_place(run_of, tmp_path):
    with pytest.raises(RunError, match=r"merged: .*`lora_bias=True` because the base layer has no bias"):
        export(run_of("lora", lora_bias=True), tmp_path / "merged", "merged")


def test_an_exported_head_knows_its_labels(run_of, tmp_path):
    folder = run_of("blob", "texts")
    export(folder, tmp_path / "out", num_samples=0)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "parcel", 1: "refund"}
    assert config.label2id == {"parcel": 0, "refund": 1}
    model = AutoModelForSequenceClassification.from_pretrained(runs.open_run(folder).config.model, config=config)
    adapted = PeftModel.from_pretrained(model, tmp_path / "out" / "mean")
    torch.testing.assert_close(logits(adapted), logits(runs.load_run(folder).model))

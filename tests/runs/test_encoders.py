"""Encoders as they are published, without the layers between them and a head: these are trained, saved and loaded."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    XLNetConfig,
    XLNetLMHeadModel,
)

from bloblora import models, runs
from bloblora.runs.train import _linear_layers
from tests.tasks.conftest import train_tokenizer
from tests.tiny_base import queries

SIZE = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
SIZE |= {"intermediate_size": 64, "max_position_embeddings": 128}
MODERN = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "bert": (lambda: BertModel(BertConfig(**SIZE)), [], "query"),
    "bert, masked": (lambda: BertForMaskedLM(BertConfig(**SIZE)), ["bert.pooler.dense"], "query"),
    "deberta": (lambda: DebertaV2ForMaskedLM(DebertaV2Config(**SIZE)), ["pooler.dense"], "query_proj"),
    "distilbert": (
        lambda: DistilBertForMaskedLM(DistilBertConfig(vocab_size=400, dim=32, n_layers=2, n_heads=4, hidden_dim=64)),
        [],  # PEFT takes pre_classifier for a classifier
        "q_lin",
    ),
    "modernbert": (lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZE, **MODERN)), [], "Wqkv"),
    "xlnet": (
        lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=400, d_model=32, n_layer=2, n_head=4, d_inner=64)),
        ["logits_proj", "sequence_summary.summary"],
        "layer_1",
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def encoder(request, tmp_path_factory):
    """A folder with an encoder, which of its layers are fresh, and a layer that LoRA adapts by default."""
    make, *expected = MODELS[request.param]
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    make().save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return str(folder), *expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_files_lack_is_trained_saved_and_loaded(encoder, dtype, tmp_path):
    model, fresh, adapted = encoder
    if dtype == "bfloat16" and models.model_type(model) == "xlnet":
        pytest.skip("transformers' XLNet has positions in float32")
    assert models.fresh_layers(models.load_model(model, num_labels=2)) == fresh
    options = {"data": queries(), "output": str(tmp_path), "model": model, "dtype": dtype, "seed": 1}
    run = runs.train(runs.RunConfig.of(**options, steps=4, batch_size=2, learning_rate=1e-2), progress=False)
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert any(f".{adapted}.lora_A." in name for name in trained)
    assert not any("lora_" in name and ("pooler" in name or "classifier" in name) for name in trained)
    for layer in fresh:
        (weight,) = (p for name, p in trained.items() if name.endswith(f"{layer}.modules_to_save.default.weight"))
        torch.manual_seed(1)  # as `train` draws it
        start = models.load_model(model, num_labels=2, dtype=dtype).get_submodule(layer)
        assert weight.dtype == start.weight.dtype == torch.float32
        assert (weight - start.weight).abs().max() > 1e-3
    torch.manual_seed(7)
    again = runs.load_run(tmp_path)
    assert torch.equal(again.predict(["where is it"], 2).probabilities, run.predict(["where is it"], 2).probabilities)


@pytest.mark.parametrize(
    "options", [{"top_blocks": 1}, {"layers_to_transform": [1]}, {"top_blocks": 1, "target_modules": "all-linear"}]
)
def test_the_blocks_that_are_asked_for_are_adapted(encoder, options, tmp_path):
    """Also where PEFT doesn't know the model's layers."""
    config = {"data": queries(), "output": str(tmp_path), "model": encoder[0], "method": "lora", "steps": 1}
    run = runs.train(runs.RunConfig.of(**config, **options), progress=False)
    adapted = [name for name, layer in run.model.named_modules() if isinstance(layer, LoraLayer)]
    assert adapted
    assert all(".1." in name for name in adapted)
    again = runs.load_run(tmp_path)
    assert torch.equal(again.predict(["where is it"]).probabilities, run.predict(["where is it"]).probabilities)


def test_own_layers_to_save_stay(encoder, tmp_path):
    model, fresh, _ = encoder
    options = {"data": queries(), "output": str(tmp_path), "model": model, "method": "lora", "steps": 1}
    lora = {"modules_to_save": ["embeddings", "word_embedding"]}
    run = runs.train(runs.RunConfig.of(**options, lora=lora), progress=False)
    saved = {name for name, p in run.model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert any("embedding" in name for name in saved)
    assert all(any(layer in name for name in saved) for layer in fresh)


def test_other_weights_must_be_there(tmp_path):
    model = BertForMaskedLM(BertConfig(**SIZE))
    state = {k: v for k, v in model.state_dict().items() if "layer.1.output.dense" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    train_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(models.ModelError, match=r"its files lack bert\.encoder\.layer\.1\.output\.dense\.bias and 1"):
        models.load_model(str(tmp_path), num_labels=2)


def test_blocks_without_linear_layers():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=0, n_head=2, n_positions=8))
    with pytest.raises(runs.RunError, match=r"known of a gpt2, whose blocks have no linear layers; name some"):
        _linear_layers(model)


def test_a_model_that_writes_no_text_leaves_no_folder(tmp_path):
    T5Config(vocab_size=400).save_pretrained(tmp_path / "t5")  # no weights, which aren't looked for
    train_tokenizer().save_pretrained(tmp_path / "t5")
    records = [{"prompt": f"{i}", "response": "a"} for i in range(4)]
    config = runs.RunConfig.of(data=records, output=str(tmp_path / "run"), model=str(tmp_path / "t5"), steps=1)
    with pytest.raises(
        models.ModelError, match="a t5 is no causal language model, which choices and written text need"
    ):
        runs.train(config)
    assert not (tmp_path / "run/run.json").exists()

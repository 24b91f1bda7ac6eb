"""PEFT's own ``save_pretrained`` of a Bayesian model: it writes what `bloblora.save` writes, whoever calls it."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from bloblora import BlobConfig, bayesianize, find_posterior, load, save
from bloblora.adapter import AdapterFileError, debayesianize
from tests.conftest import tiny_llama, with_lora
from tests.hub import server

from .test_storage import CONFIG, FILES, bayesian, contents, drawn


def several() -> PeftModel:
    """A Bayesian adapter, a plain one, and another Bayesian one."""
    model = bayesian()
    for name, rank in (("plain", 3), ("second", 2)):
        model.add_adapter(name, LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False))
    bayesianize(model, BlobConfig(prior_std=0.9, init_std=0.25), "second")
    return model


def stock(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of what PEFT loads, which must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 asks transformers 5.24 for a name that it is to lose, whatever is loaded.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(tiny_llama(), folder).eval()(tokens).logits


def assert_same(loaded: PeftModel, model: PeftModel, tokens: torch.Tensor) -> None:
    assert find_posterior(loaded).config == find_posterior(model).config
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(drawn(loaded, tokens), drawn(model, tokens))


def test_it_writes_the_bytes_that_save_writes(tokens, tmp_path):
    model = bayesian()
    model.save_pretrained(tmp_path / "peft")
    save(model, tmp_path / "ours")
    assert contents(tmp_path / "peft").keys() == {*FILES, "README.md"}
    assert contents(tmp_path / "peft") == contents(tmp_path / "ours")
    assert_same(load(tiny_llama(), tmp_path / "peft"), model, tokens)
    with find_posterior(model).mean():
        assert torch.equal(stock(tmp_path / "peft", tokens), model(tokens).logits)


def test_every_adapter_that_is_saved(tokens, tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second"), ("plain", tmp_path / "plain")):
        model.set_adapter(name)
        model.eval()
        assert torch.equal(stock(folder, tokens), model(tokens).logits)
        loaded = load(tiny_llama(), folder)
        if name == "plain":
            assert find_posterior(loaded) is None
        else:
            assert_same(loaded, model, tokens)
        save(model, tmp_path / "ours" / name, name)
        for file in FILES if name != "plain" else FILES[:2]:  # PEFT sorts no sets of a plain one
            if (name, file) != ("plain", "adapter_config.json"):
                assert (folder / file).read_bytes() == (tmp_path / "ours" / name / file).read_bytes()


def test_selected_adapters_and_no_others(tokens, tmp_path):
    model = several()
    model.save_pretrained(str(tmp_path), True, ["second"])
    assert {path.name for path in tmp_path.iterdir()} == {"second", "README.md"}
    model.set_adapter("second")
    assert_same(load(tiny_llama(), tmp_path / "second"), model.eval(), tokens)
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])


def test_embeddings_are_saved_too(tokens, tmp_path):
    model = bayesian()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert sum("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors")) == 1
    assert_same(load(tiny_llama(), tmp_path), model, tokens)
    assert torch.equal(stock(tmp_path, tokens), model(tokens).logits)


def test_what_differs_from_the_base_models_files_is_saved(tmp_path):
    """Resized embeddings, or trained ones; and not those of a model whose head has a LoRA, as in the paper."""
    tiny_llama().save_pretrained(tmp_path / "base")

    def base(size=100):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(size, mean_resizing=False)
        return model

    model = with_lora(base())
    bayesianize(model)
    tokens = torch.tensor([[5, 97, 98, 99]])
    save(model, tmp_path / "resized")
    torch.manual_seed(9)
    assert torch.equal(load(base(), tmp_path / "resized")(tokens).logits, model.eval()(tokens).logits)
    with pytest.raises(AdapterFileError, match=r"size mismatch for .*embed_tokens.weight.*\[100, 32\].*\[97, 32\]"):
        load(base(97), tmp_path / "resized")

    model = with_lora(base(97), ["q_proj", "lm_head"])
    bayesianize(model)
    save(model, tmp_path / "same")
    assert all("lora_" in name for name in load_file(tmp_path / "same" / "adapter_model.safetensors"))
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="PEFT doesn't save it beside a LoRA on lm_head"):
        save(model, tmp_path / "same")

    model = bayesian()
    model.get_input_embeddings().weight.requires_grad_(True).data.mul_(2)
    save(model, tmp_path / "trained")
    assert_same(load(tiny_llama(), tmp_path / "trained"), model, torch.tensor([[5, 6]]))
    model.get_input_embeddings().weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="embed_tokens"):
        save(model, tmp_path / "trained")


@pytest.mark.parametrize(
    ("options", "lost"), [({}, True), ({"task_type": "SEQ_CLS"}, False), ({"modules_to_save": ["score"]}, False)]
)
def test_a_head_that_is_not_saved_is_named(tmp_path, options, lost):
    model = with_lora(LlamaForSequenceClassification(tiny_llama().config), **options)
    bayesianize(model)
    for write in (save, lambda model, folder: model.save_pretrained(folder)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            write(model, tmp_path)
        found = ["the head 'score' of LlamaForSequenceClassification" in str(w.message) for w in said]
        assert any(found) == lost


def test_parts_of_a_head_that_peft_knows_by_no_name_are_named(tmp_path):
    sizes = dict(vocab_size=97, num_labels=3, pad_token_id=0)
    t5 = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, **sizes)
    layers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    deberta = DebertaV2Config(**layers, **sizes)
    DebertaV2ForSequenceClassification(deberta).base_model.save_pretrained(tmp_path / "trunk")
    DebertaV2ForSequenceClassification(deberta).save_pretrained(tmp_path / "whole")
    read = DebertaV2ForSequenceClassification.from_pretrained
    for base, targets, lost in (
        (T5ForSequenceClassification(t5), ["q", "v"], ["classification_head"]),
        (T5ForSequenceClassification(t5), "all-linear", ["classification_head"]),
        (read(tmp_path / "trunk", num_labels=3), ["query_proj"], ["pooler"]),
        (read(tmp_path / "whole"), ["query_proj"], []),
        (BertForTokenClassification(BertConfig(**layers, **sizes)), ["query"], ["classifier"]),
    ):
        token = isinstance(base, BertForTokenClassification)
        for more in ([], lost) if lost else ([],):  # a copy has no marks of what was read
            options = {} if token else {"task_type": "SEQ_CLS"}
            lora = LoraConfig(target_modules=targets, modules_to_save=more or None, **options)
            model = get_peft_model(copy.deepcopy(base) if lost else base, lora)
            bayesianize(model)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                save(model, tmp_path / "adapter")
            found = [str(w.message) for w in said if "isn't saved" in str(w.message)]
            assert [f"modules_to_save={lost}" in message for message in found] == [True] * bool(lost and not more)


def test_checkpoints_of_a_plain_trainer(tokens, tmp_path):
    model = bayesian()
    options = dict(max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], disable_tqdm=True)
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.1, use_cpu=True, **options)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    model.eval()
    for folder in ("checkpoint-2", "final"):
        assert_same(load(tiny_llama(), tmp_path / folder), model, tokens)
    assert not torch.equal(drawn(load(tiny_llama(), tmp_path / "checkpoint-1"), tokens), drawn(model, tokens))


_PUSH = """
from peft import PeftModel
from bloblora import load
from tests.adapter.test_storage import bayesian
from tests.conftest import tiny_llama

bayesian().push_to_hub("user/adapter")
PeftModel.from_pretrained(tiny_llama(), "user/adapter")
"""


def test_pushed_to_a_hub(tokens, tmp_path):
    with server.running() as hub:
        # not offline, as the tests are otherwise: the hub is this machine's
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": server.TOKEN,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",  # another protocol, of huggingface.co alone
        }
        command = [sys.executable, "-c", _PUSH]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        _, files = hub.files("user/adapter", "main")
    (tmp_path / "pushed").mkdir()
    for name in FILES:
        (tmp_path / "pushed" / name).write_bytes(files[name])
    assert_same(load(tiny_llama(), tmp_path / "pushed"), bayesian(), tokens)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(copied, tokens, tmp_path):
    model = bayesian()
    other = copied(model)
    with torch.no_grad():
        for parameters in find_posterior(other).parameters():
            for parameter in parameters:
                parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert_same(load(tiny_llama(), tmp_path / "other"), other, tokens)
    assert_same(load(tiny_llama(), tmp_path / "model"), model, tokens)
    assert not torch.equal(other(tokens).logits, model(tokens).logits)


def test_without_a_posterior_it_is_pefts_again(tmp_path):
    model = several()
    debayesianize(model, "second")
    model.save_pretrained(tmp_path / "one")
    assert contents(tmp_path / "one" / "second").keys() == set(FILES[:2])
    assert find_posterior(load(tiny_llama(), tmp_path / "one")) is not None
    debayesianize(model, "default")
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "none")
    assert find_posterior(load(tiny_llama(), tmp_path / "none")) is None


def test_a_save_that_went_around_says_what_is_missing(tokens, tmp_path):
    model = bayesian()
    PeftModel.save_pretrained(model, tmp_path)
    with pytest.raises(
        AdapterFileError,
        match=r"adapter_model\.safetensors: it holds a posterior's Ω .* blob_config\.json and posterior\.safetensors "
        r"are missing: .* call model\.load_adapter",
    ):
        load(tiny_llama(), tmp_path)
    assert torch.equal(stock(tmp_path, tokens), model(tokens).logits)
    # what the message says to do
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    bayesianize(again, CONFIG)
    again.load_adapter(tmp_path, "default")
    again.save_pretrained(tmp_path)
    assert_same(load(tiny_llama(), tmp_path), model, tokens)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    model = bayesian()
    with pytest.raises(ValueError, match=r"safe_serialization is False; .* leave it True"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion is 'start'; it must be None"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="start")
    model.save_pretrained(tmp_path, is_main_process=False)
    assert [*tmp_path.iterdir()] == []


def test_a_state_dict_is_used_and_must_have_the_std(tokens, tmp_path):
    model, other = bayesian(), bayesian(seed=1)
    model.save_pretrained(tmp_path / "other", state_dict=other.state_dict())
    assert_same(load(tiny_llama(), tmp_path / "other"), other, tokens)
    without = {name: tensor for name, tensor in model.state_dict().items() if "blob_std" not in name}
    with pytest.raises(ValueError, match=r"state_dict: Ω of .*q_proj\.lora_A and 3 others is missing"):
        model.save_pretrained(tmp_path / "without", state_dict=without)
    assert len(get_peft_model_state_dict(model)) == 2 * 2 * 3  # layers, targets, and A, B, Ω: PEFT's own view stays


def test_a_plain_lora_is_saved_by_peft_alone():
    assert "save_pretrained" not in vars(with_lora(tiny_llama()))

"""Quantized base models on a CPU: what a posterior on them is, and a run from training to server.

The table of docs/quantized.md has the numbers that are asserted here.
"""

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, RobertaConfig, RobertaModel

from bloblora import BlobConfig, bayesianize, find_posterior, models, runs
from bloblora.export import export
from bloblora.models import ModelError, load_model
from bloblora.quantized import LIBRARIES, is_quantized
from bloblora.runs.checks import lora_of
from bloblora.serving import load_hosted, open_hosted
from tests.conftest import with_lora
from tests.docs.blocks import ROOT
from tests.runs.test_runs import Kill
from tests.serving.conftest import SETTINGS, serving
from tests.tasks.conftest import tiny_causal, train_tokenizer
from tests.tiny_base import QUESTIONS, queries, write_jsonl

TOLERANCE = {"4bit": 1e-5, "8bit": 0.05, "hqq": 1e-5, "torchao": 1e-5}
"""Relative error of logits under a draw, beside those of dequantized weights."""
LOST = {"4bit": 0.3, "8bit": 0.05, "hqq": 0.3, "torchao": 0.05}
"""Relative error of logits after a merge into quantized weights, at most."""
IDS = torch.arange(3, 31).reshape(4, 7)


@pytest.fixture(scope="module", params=LIBRARIES)
def kind(request):
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base model whose rows are whole blocks of bitsandbytes: 64 weights."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_causal(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def bayesian(base):
    model = with_lora(base)
    bayesianize(model, BlobConfig(init_std=0.1))
    return model


def weight_of(layer, width):
    """What a layer does to the identity: its weight, as its own kernel has it."""
    with torch.no_grad():
        return layer.train()(torch.eye(width)).T


def drawn(model, seed=0):
    with torch.no_grad(), find_posterior(model).draw(seed):
        return model.eval()(IDS).logits


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_a_draw_and_its_gradients_are_those_of_the_dequantized_weights(kind, wide):
    """Also after a forward without gradients, for which bitsandbytes would pack 4-bit weights."""
    base, plain = load_model(str(wide), quantize=kind), load_model(str(wide))
    names = [name for name, layer in base.named_modules() if is_quantized(layer)]
    assert names == [name for name, layer in plain.named_modules() if type(layer) is torch.nn.Linear][:-1]
    for name in names:
        linear = plain.get_submodule(name)
        weight = weight_of(base.get_submodule(name), linear.in_features)
        assert 0 < error(weight, linear.weight) < 0.15
        linear.weight.data = weight
    quantized, reference = bayesian(base), bayesian(plain)
    logits, gradients = [], []
    for model in (quantized, reference):
        logits.append(drawn(model))
        with find_posterior(model).draw(0):
            model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert error(logits[0], logits[1]) < TOLERANCE[kind]
    assert error(gradients[0], gradients[1]) < 1e-5
    assert error(drawn(reference, 1), logits[1]) > 0.1


def test_a_merge_is_of_the_draw_and_rounds_it(kind, wide):
    model = bayesian(load_model(str(wide), quantize=kind))
    expected, mean = drawn(model), model(IDS).logits
    with find_posterior(model).draw(0):
        merged = copy.deepcopy(model).merge_and_unload()
        model.merge_adapter()
    assert 1e-4 < error(merged.eval()(IDS).logits, expected) < LOST[kind] < error(mean, expected)
    assert torch.equal(model(IDS).logits, merged(IDS).logits)
    model.unmerge_adapter()  # of that draw, although no draw is in force
    assert error(model(IDS).logits, mean) < 2 * LOST[kind]


@pytest.fixture(scope="module")
def run(kind, wide, tmp_path_factory):
    """A run that was stopped and went on, and the folder of one that wasn't."""
    folder = tmp_path_factory.mktemp(f"run-{kind}")
    data = write_jsonl(folder / "questions.jsonl", QUESTIONS * 2)
    config = runs.RunConfig.of(
        data=str(data), output=str(folder / "run"), model=str(wide), quantize=kind, steps=4, save_steps=2, batch_size=2,
        r=2, init_std=0.1, learning_rate=0.05, validation=0,
    )  # fmt: skip
    runs.train(config.with_options(output=str(folder / "whole")), progress=False)
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, progress=False, callbacks=[Kill(3)])
    return runs.train(config, progress=False)


def test_a_run_is_resumed_saved_and_loaded(run, kind):
    folder = Path(run.config.output)
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        assert (folder / name).read_bytes() == (folder.parent / "whole" / name).read_bytes()
    assert run.training["resumed_from"] == "checkpoint-2"
    assert json.loads((folder / "run.json").read_text())["config"]["quantize"] == kind
    loaded = runs.load_run(folder)
    assert sum(is_quantized(layer) for layer in loaded.model.modules()) == 14
    found = loaded.predict(QUESTIONS, 3)
    assert torch.equal(found.log_probs, run.predict(QUESTIONS, 3).log_probs)
    assert not torch.equal(found.log_probs[0], found.log_probs[1])
    dequantized = runs.load_run(folder, dequantized=True).predict(QUESTIONS, 3)
    assert error(found.log_probs.exp(), dequantized.log_probs.exp()) < TOLERANCE[kind]


def test_exports(run, kind, tmp_path):
    folder = run.config.output
    manifest = export(folder, tmp_path / "lora", num_samples=1)
    assert f"a base model quantized by {kind}" in manifest.warnings[0]
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    assert all(torch.equal(t, saved[n]) for n, t in load_file(tmp_path / "lora/mean/adapter_model.safetensors").items())
    assert "quantizing it again" in export(folder, tmp_path / "merged", "merged").warnings[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        assert error(merged(IDS).logits, runs.load_run(folder).model(IDS).logits) < TOLERANCE[kind]


def test_served(run):
    hosted = load_hosted(open_hosted([run.config.output], SETTINGS), SETTINGS)
    with serving(hosted) as client:
        asked = {name: QUESTIONS[0][name] for name in ("question", "choices")}
        answer = client.post("/v1/predict", json={"inputs": asked}).json()
    expected = run.predict(QUESTIONS[:1], SETTINGS.samples, SETTINGS.seed).probabilities[0]
    found = torch.tensor([*answer["answers"][0]["probabilities"].values()])
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)


def test_heads_stay_as_they_are_and_are_trained(kind, wide, tmp_path):
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=400)
    for name, save in {"bert": BertModel(BertConfig(**sizes)), "roberta": RobertaModel(RobertaConfig(**sizes))}.items():
        save.save_pretrained(tmp_path / name)
        train_tokenizer().save_pretrained(tmp_path / name)
    for base, head in ((wide, "TOKEN_CLS"), (tmp_path / "bert", "TOKEN_CLS"), (tmp_path / "roberta", "SEQ_CLS")):
        model = load_model(str(base), num_labels=3, head=head, quantize=kind)
        trunk = {*model.base_model.modules()}
        assert any(map(is_quantized, trunk))
        assert {type(one) for one in {*model.modules()} - trunk if isinstance(one, torch.nn.Linear)} == {
            torch.nn.Linear
        }
    options = dict(data=queries() * 2, model=str(tmp_path / "bert"), output=str(tmp_path / "run"), head_prior_std=0.2)
    config = runs.RunConfig.of(**options, quantize=kind, steps=2, batch_size=4, r=2, validation=0)
    run = runs.train(config, progress=False)
    assert find_posterior(run.model).head is not None
    found = runs.load_run(tmp_path / "run").predict(queries(), 2).probabilities
    assert torch.equal(found, run.predict(queries(), 2).probabilities)
    dequantized = runs.load_run(tmp_path / "run", dequantized=True).predict(queries(), 2).probabilities
    assert error(found, dequantized) < TOLERANCE[kind]


def test_gpt2_whose_layers_are_transposed(kind, tmp_path):
    """A merged model is loaded as any GPT-2; HQQ and torchao have no form of its layers."""
    tiny_causal("gpt2", hidden_size=64).save_pretrained(tmp_path / "base")
    train_tokenizer().save_pretrained(tmp_path / "base")
    if kind in ("hqq", "torchao"):
        with pytest.raises(ModelError, match=rf"quantize '{kind}': {kind} can quantize no layer of .*; leave quantize"):
            load_model(str(tmp_path / "base"), quantize=kind)
        return
    options = dict(data=QUESTIONS, model=str(tmp_path / "base"), output=str(tmp_path / "run"), quantize=kind)
    config = runs.RunConfig.of(**options, steps=2, batch_size=2, r=2, learning_rate=0.05, validation=0)
    run = runs.train(config, progress=False)
    export(tmp_path / "run", tmp_path / "merged", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert error(merged(IDS).logits, run.model(IDS).logits) < TOLERANCE[kind]


def test_a_linearized_draw_for_many_classes(kind, wide, tmp_path):
    """More classes than three a draw, for which other models take forward mode."""
    data = [{"text": f"the {word}", "label": word} for word in ("card", "refund", "parcel", "gas", "payment")]
    config = runs.RunConfig.of(
        data=data * 2, output=str(tmp_path), model=str(wide), quantize=kind, method="laplace-lora", steps=2, r=2,
        learning_rate=0.02, validation=0,
    )  # fmt: skip
    trained = runs.train(config, progress=False)
    expected = runs.load_run(tmp_path, dequantized=True).predict(data, 1).log_probs
    for run in (trained, runs.load_run(tmp_path)):
        found = run.predict(data, 1).log_probs
        assert error(found, expected) < 10 * TOLERANCE[kind]
    assert error(run.predict(data, 0).log_probs, expected) > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "3bit"}, "quantize must be one of none, 4bit, 8bit, hqq, torchao, got '3bit'"),
        ({"quantize": "4bit", "method": "full"}, "quantize '4bit': method 'full' trains the base model's own weights"),
        ({"quantize": "8bit", "init_lora_weights": "pissa"}, "init_lora_weights 'pissa': .* those of quantize '8bit'"),
        ({"quantize": "hqq", "trunk_cache": "trunk", "top_blocks": 1}, "quantize 'hqq': trunk_cache isn't offered"),
    ],
)
def test_runs_that_cannot_be_quantized(options, message):
    with pytest.raises(runs.RunError, match=message):
        runs.RunConfig.of(data="questions.jsonl", output="run", **options)


def test_a_start_that_moved_base_weights_is_not_for_quantized_ones(tmp_path):
    with_lora(tiny_causal(), init_lora_weights="olora").save_pretrained(tmp_path)
    config = runs.RunConfig.of(
        data="questions.jsonl", output="run", quantize="4bit", start_from=str(tmp_path), r=4, lora_alpha=8
    )
    with pytest.raises(runs.RunError, match=r"init_lora_weights 'olora' moved a part of the base weights, .* '4bit'"):
        lora_of(config)


def test_a_missing_library_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "hqq" else find_spec(name))
    with pytest.raises(ModelError, match=r"quantize 'hqq' needs hqq, which isn't installed: pip install 'bloblora\["):
        runs.train(runs.RunConfig.of(data="nowhere.jsonl", output=str(tmp_path / "run"), quantize="hqq"))


def test_what_is_quantized_already(wide, tmp_path):
    pytest.importorskip("bitsandbytes")
    load_model(str(wide), quantize="4bit").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"quantize 'hqq': model '.*' is quantized already; leave quantize out"):
        load_model(str(tmp_path), quantize="hqq")
    assert sum(map(is_quantized, load_model(str(tmp_path)).modules())) == 14


def test_the_table_of_the_docs():
    page = (ROOT / "docs/quantized.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert {kind: (float(near), float(lost)) for kind, near, lost in rows} == {
        kind: (TOLERANCE[kind], LOST[kind]) for kind in LIBRARIES
    }

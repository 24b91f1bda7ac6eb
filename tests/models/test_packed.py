"""GPTQ and AWQ base models on a CPU: a posterior on them is that on their dequantized weights, and a run works.

Needs what docs/quantized.md says; quantizing the model takes a minute, for gptqmodel compiles what packs it.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bloblora import models, runs
from bloblora.export import export
from bloblora.quantized import dequantize, is_packed, is_quantized
from tests.runs.test_runs import Kill
from tests.tasks.conftest import tiny_causal, train_tokenizer
from tests.tiny_base import QUESTIONS, queries

from .test_quantized import IDS, bayesian, drawn, error

pytest.importorskip("gptqmodel")
pytest.importorskip("optimum")  # by which transformers loads GPTQ


@pytest.fixture(scope="module", params=["gptq", "awq"])
def packed(request, tmp_path_factory):
    """A base model in 4 bits, in groups of 32."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it takes half of the cores, and then asks for two
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    folder, here = tmp_path_factory.mktemp(request.param), Path.cwd()
    plain = tiny_causal(hidden_size=128, intermediate_size=256)
    plain.save_pretrained(folder / "plain")
    train_tokenizer().save_pretrained(folder / "plain")
    kind = {"gptq": GPTQConfig, "awq": AWQConfig}[request.param]
    threads = torch.get_num_threads()
    try:
        os.chdir(folder)  # where it writes logs
        torch.set_num_threads(2)
        quantizing = GPTQModel.load(str(folder / "plain"), kind(bits=4, group_size=32), device="cpu")
        quantizing.quantize([question["question"] * 20 for question in QUESTIONS] * 8, batch_size=1)
        quantizing.save(str(folder / "packed"))
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
    return folder / "packed"


def test_a_draw_and_its_gradients_are_those_of_the_dequantized_weights(packed):
    quantized = models.load_model(str(packed))
    assert sum(map(is_packed, quantized.modules())) == 14
    plain = copy.deepcopy(quantized)
    dequantize(plain)
    assert not any(map(is_quantized, plain.modules()))
    original = AutoModelForCausalLM.from_pretrained(packed.parent / "plain")
    name = "model.layers.1.mlp.down_proj.weight"
    assert 0 < error(plain.get_parameter(name), original.get_parameter(name)) < 0.3
    logits, gradients = [], []
    for model in map(bayesian, (quantized, plain)):
        logits.append(drawn(model))
        torch.manual_seed(0)
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora" in n]))
    assert error(logits[0], logits[1]) < 1e-5
    assert error(drawn(model, 1), logits[1]) > 0.1
    assert error(gradients[0], gradients[1]) < 1e-5


@pytest.mark.parametrize("data", [QUESTIONS * 2, queries() * 2], ids=["questions", "labels"])
def test_a_run_is_resumed_loaded_and_exported(packed, tmp_path, data):
    config = runs.RunConfig.of(
        data=data, output=str(tmp_path / "run"), model=str(packed), steps=4, save_steps=2, batch_size=2, r=2,
        init_std=0.1, learning_rate=0.05, validation=0, target_modules="all-linear",
    )  # fmt: skip
    runs.train(config.with_options(output=str(tmp_path / "whole")), progress=False)
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, progress=False, callbacks=[Kill(3)])
    run = runs.train(config, progress=False)
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = runs.load_run(tmp_path / "run").predict(data, 3).probabilities
    assert torch.equal(found, run.predict(data, 3).probabilities)
    dequantized = runs.load_run(tmp_path / "run", dequantized=True)
    assert error(found, dequantized.predict(data, 3).probabilities) < 1e-5
    if run.task.head is not None:
        return
    assert "quantized by " in export(tmp_path / "run", tmp_path / "lora").warnings[0]
    assert "dequantized" in export(tmp_path / "run", tmp_path / "merged", "merged").warnings[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        assert error(merged(IDS).logits, run.model.eval()(IDS).logits) < 1e-5

"""C-LoRA against closed forms, and against an evidence lower bound that scipy maximizes."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import nn
from torch.distributions import Normal, kl_divergence

from bloblora import runs
from bloblora.methods import METHODS
from bloblora.methods.c_lora import CLora, ContextualNoise, _Kl, _variants
from tests.conftest import tiny_llama
from tests.methods.test_known_answers import LORA, Net, Rows, training
from tests.tiny_base import queries, write_jsonl


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = CLora().prepare(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        if "network" in name and "weight" in name:
            nn.init.normal_(parameter, std=0.5)  # so that contexts differ
    return model.eval()


def layer_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("layers.1.self_attn.v_proj"))


def parts(layer, x):
    """h, μ and Ω of inputs, written out."""
    h = x @ layer.lora_A["default"].weight.T
    first, _, second = layer.c_lora_network["default"]
    output = torch.relu(h @ first.weight.T + first.bias) @ second.weight.T + second.bias
    mean, width = output.unflatten(-1, (2, 4, 4)).unbind(-3)
    return h, mean, torch.sigmoid(width) ** 2


@torch.no_grad()
def test_outputs_over_draws_have_the_closed_forms_mean_and_variance(model):
    layer, x = layer_of(model), torch.randn(1, 3, 32)
    h, mean, std = parts(layer, x)
    b, scaling = layer.lora_B["default"].weight, layer.scaling["default"]
    base = layer.get_base_layer()(x)
    expected = scaling * torch.einsum("mi,btij,btj->btm", b, mean, h)
    variance = scaling**2 * torch.einsum("mi,btij,btj->btm", b.square(), std.square(), h.square())
    torch.testing.assert_close(layer(x) - base, expected, rtol=1e-4, atol=1e-5)
    generator, distribution, draws = torch.Generator().manual_seed(0), ContextualNoise(model), []
    for _ in range(4000):
        with distribution.draw(generator):
            draws.append(layer(x) - base)
    trained = layer.train()(x.expand(4000, -1, -1)) - base
    for found in (torch.cat(draws), trained):
        assert ((found.mean(0) - expected[0]) / (variance[0] / 4000).sqrt()).abs().max() < 5
        torch.testing.assert_close(found.var(0), variance[0], rtol=0.15, atol=0)


@torch.no_grad()
def test_all_tokens_of_an_example_share_one_noise(model):
    layer, x = layer_of(model).train(), torch.randn(2, 1, 32).expand(2, 5, 32)
    y = layer(x) - layer.get_base_layer()(x)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    both = layer(x[:1].expand(2, -1, -1))
    assert not torch.allclose(both[0], both[1])


@torch.no_grad()
def test_a_draw_reads_a_prefix_as_it_reads_it_alone(model, tokens):
    """What a key-value cache needs: later tokens change nothing of earlier ones."""
    with ContextualNoise(model).draw(torch.Generator().manual_seed(1)):
        whole = model(tokens).logits
        torch.testing.assert_close(model(tokens[:, :4]).logits, whole[:, :4])
        torch.testing.assert_close(model(tokens[1:3]).logits, whole[1:3])
    assert not torch.allclose(model(tokens).logits, whole, atol=1e-3)


def test_the_kl_is_a_mean_over_tokens_without_padding(model):
    layer, x = layer_of(model).train(), torch.randn(2, 5, 32)
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    (variant,) = layer.lora_variant.values()
    variant.kl = _Kl(0.3, valid)
    layer(x)
    _, mean, std = parts(layer, x)
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 0.3)).sum((-1, -2))[valid].mean()
    torch.testing.assert_close(variant.kl.total, expected)
    # of a head that sees the last token alone, every one counts
    variant.kl = _Kl(0.3, valid)
    layer(x[:, -1:])
    torch.testing.assert_close(
        variant.kl.total, kl_divergence(Normal(mean, std), Normal(0.0, 0.3)).sum((-1, -2))[:, -1].mean()
    )


def test_a_network_that_ignores_its_input_maximizes_the_evidence_lower_bound(tmp_path):
    """With r = 1 and fixed A and B, E is one number: Gauss-Hermite quadrature and scipy have the optimum."""
    task, method = Rows(), CLora(prior_std=0.7)
    torch.manual_seed(3)
    model = method.prepare(Net(), LoraConfig(r=1, lora_alpha=1, target_modules=["linear"]))
    layer = model.base_model.model.linear
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.copy_(torch.tensor([[1.0], [-0.5], [0.3]]))
        a.mul_(3)
        last = layer.c_lora_network["default"][2]
        last.weight.zero_()
    for parameter in (a, b, last.weight):
        parameter.requires_grad_(False)
    sampler = method.fit(model, training(task, tmp_path, max_steps=1500, num_weight_draws=4))
    found = parts_of_bias(last.bias.detach())

    x, y = task.x.double().numpy(), task.y.numpy()
    direction = x @ (b @ a).detach().double().numpy().T
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()

    def bound(mean, std):
        logits = (mean + std * nodes)[:, None, None] * direction
        nll = logsumexp(logits, -1).sum(-1) - logits[:, np.arange(40), y].sum(-1)
        kl = math.log(0.7 / std) + (std**2 + mean**2) / (2 * 0.7**2) - 0.5
        return weights @ nll + kl

    best = minimize(lambda p: bound(p[0], math.exp(p[1])), (0.0, -1.0), method="Nelder-Mead")
    assert found == pytest.approx((best.x[0], math.exp(best.x[1])), rel=0.05)
    assert bound(*found) < best.fun * 1.001
    # each draw is E = μ + Ωε of this one number
    generator, expected = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    with torch.no_grad(), sampler.weights.draw(generator):
        e = found[0] + found[1] * torch.randn(1, generator=expected).item()
        torch.testing.assert_close(model.eval()(task.x).double(), torch.from_numpy(e * direction), rtol=1e-4, atol=1e-5)


def parts_of_bias(bias):
    return bias[0].item(), torch.sigmoid(bias[1]).item() ** 2


def test_without_evidence_every_context_has_the_prior(tmp_path):
    task, method = Rows(), CLora(prior_std=0.4)
    torch.manual_seed(1)
    model = method.prepare(Net(), LORA)
    layer = model.base_model.model.linear
    for factor in (layer.lora_A, layer.lora_B):
        factor["default"].weight.requires_grad_(False)  # B is 0: the NLL knows nothing of E
    method.fit(model, training(task, tmp_path))
    (variant,) = _variants(model).values()
    with torch.no_grad():
        mean, root = variant.gaussian(layer, "default", layer.lora_A["default"](task.x))
    assert mean.abs().max() < 0.02
    torch.testing.assert_close(root**2, torch.full_like(root, 0.4), rtol=0.02, atol=0)


def test_the_training_log_has_the_nll_without_the_kl(tmp_path):
    task, method = Rows(), CLora()
    model = method.prepare(Net(), LORA)
    setup = training(task, tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0)
    method.fit(model, setup)
    assert setup.logs[0]["nll"] == pytest.approx(math.log(3), abs=1e-5)  # B is 0
    assert setup.logs[0]["loss"] > math.log(3) + 1e-3


def test_a_cached_trunk_changes_nothing(base, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", queries() * 2)
    given = {"data": str(data), "model": str(base), "method": "c-lora", "steps": 3, "batch_size": 3, "top_blocks": 1}
    plain = runs.train(runs.RunConfig.of(output=str(tmp_path / "plain"), **given), progress=False)
    options = {"output": str(tmp_path / "cached"), "trunk_cache": str(tmp_path / "cache")}
    cached = runs.train(runs.RunConfig.of(**options, **given), progress=False)
    for name in ("nll", "loss", "grad_norm"):
        assert cached.training["final"][name] == pytest.approx(plain.training["final"][name], rel=1e-4)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("prior_std", 0.0, "prior_std must be a finite number above 0, got 0.0"),
        ("kl_scale", -1.0, "kl_scale must be a finite number of at least 0, got -1.0"),
        ("network_width", 0, "network_width must be a whole number of at least 1, got 0"),
        ("gradient_checkpointing", True, "gradient_checkpointing isn't for method 'c-lora'"),
        ("start_from", "runs/lora", "start_from isn't for method 'c-lora'"),
    ],
)
def test_an_option_that_does_not_fit(option, value, message, base, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", queries())
    with pytest.raises(runs.RunError, match=message):
        runs.RunConfig.of(
            data=str(data), output=str(tmp_path / "run"), model=str(base), method="c-lora", **{option: value}
        )


def test_a_file_without_networks_is_refused(base, tmp_path):
    from bloblora.adapter import AdapterFileError, save
    from bloblora.models import load_model

    folder, lora = tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"])
    save(METHODS["lora"]().prepare(load_model(str(base)), lora), folder)
    with pytest.raises(AdapterFileError, match=r"8 weights of the method are missing, the first .*c_lora_network"):
        CLora().load(load_model(str(base)), folder)

"""The variational last layer against torch.distributions, scipy, the authors' package, and Monte Carlo."""

import math

import pytest
import torch
from peft import LoraConfig
from scipy.optimize import minimize
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from bloblora import runs
from bloblora.adapter import AdapterFileError, save
from bloblora.methods import METHODS
from bloblora.methods.vbll import LastLayer, LastLayerDraws, Vbll, head_of
from bloblora.models import load_model
from bloblora.prediction import predict
from tests.methods.test_known_answers import Rows, training
from tests.tiny_base import QUESTIONS, queries, write_jsonl


def last_layer(covariance="dense", classes=3, width=4):
    """A head with a random Gaussian."""
    torch.manual_seed(0)
    head = nn.Linear(width, classes)
    head.register_parameter("vbll_log_std", nn.Parameter(torch.randn(classes, width) / 2 - 1))
    if covariance == "dense":
        head.register_parameter("vbll_off_diagonal", nn.Parameter(torch.randn(classes, width, width) / 3))
    return LastLayer(head)


def gaussians(layer):
    """The distribution of each class's weights, as torch has it."""
    factor = torch.diag_embed(layer.head.vbll_log_std.exp())
    if hasattr(layer.head, "vbll_off_diagonal"):
        factor = factor + layer.head.vbll_off_diagonal.tril(-1)
    return MultivariateNormal(layer.head.weight, scale_tril=factor)


class Net(nn.Module):
    """A trunk with a LoRA, and a head."""

    def __init__(self):
        super().__init__()
        self.linear, self.score = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.linear.weight.data.copy_(torch.eye(6))
        self.config = type("Config", (), {"to_dict": lambda self: {}, "model_type": "net"})()

    def forward(self, x):
        return self.score(self.linear(x))


LORA = LoraConfig(r=2, target_modules=["linear"], modules_to_save=["score"])


@pytest.mark.parametrize("covariance", ["diagonal", "dense"])
def test_variance_and_kl_are_those_of_torch(covariance):
    layer, states = last_layer(covariance), torch.randn(7, 4)
    q = gaussians(layer)
    expected = torch.einsum("bi,cij,bj->bc", states, q.covariance_matrix, states)
    torch.testing.assert_close(layer.variance(states), expected)
    prior = MultivariateNormal(torch.zeros(4), 0.7 * torch.eye(4))
    torch.testing.assert_close(layer.kl(0.7), kl_divergence(q, prior).sum())


@pytest.mark.parametrize("covariance", ["diagonal", "dense"])
def test_the_bound_is_the_authors_packages(covariance):
    theirs = pytest.importorskip("vbll").DiscClassification(4, 3, 0.5, parameterization=covariance)
    layer, states, labels = last_layer(covariance), torch.randn(7, 4), torch.arange(7) % 3
    with torch.no_grad():
        layer.head.bias.zero_()
        theirs.W_mean.copy_(layer.head.weight)
        theirs.W_logdiag.copy_(layer.head.vbll_log_std)
        if covariance == "dense":
            theirs.W_offdiag.copy_(layer.head.vbll_off_diagonal)
        theirs.noise_logdiag.fill_(-30.0)  # their logits' own noise, which ours have not
    found = bound(layer, states, labels)
    torch.testing.assert_close(found, theirs.jensen_bound(states, labels).mean())


def bound(layer, states, labels):
    read = states.clone().requires_grad_()
    logits = layer.head(read)
    return -(nn.functional.cross_entropy(logits, labels) + layer.excess(logits, read))


def test_the_bound_lies_below_what_it_bounds_and_meets_it_without_variance():
    layer, states, labels = last_layer(), torch.randn(7, 4), torch.arange(7) % 3
    weights = gaussians(layer).sample((20_000,))
    log_probs = (torch.einsum("bi,sci->sbc", states, weights) + layer.head.bias).log_softmax(-1)
    values = log_probs.gather(-1, labels.expand(20_000, -1)[..., None])[..., 0].mean(-1)
    error = values.std().item() / math.sqrt(20_000)
    assert bound(layer, states, labels).item() < values.mean().item() + 5 * error
    with torch.no_grad():
        layer.head.vbll_log_std.fill_(-20.0)
        layer.head.vbll_off_diagonal.zero_()
    exact = -nn.functional.cross_entropy(layer.head(states), labels)
    torch.testing.assert_close(bound(layer, states, labels), exact)


def test_training_maximizes_the_bound_on_fixed_states(tmp_path):
    task, method = Rows(), Vbll(prior_scale=3.0)
    torch.manual_seed(1)
    model = method.prepare(Net(), LORA)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(False)
    layer = method.fit(model, training(task, tmp_path, max_steps=1500)).layer

    def objective(flat):
        mean, log_std = (torch.from_numpy(part).reshape(3, 6) for part in (flat[:18], flat[18:]))
        mean.requires_grad_(), log_std.requires_grad_()
        x = task.x.double()
        logits, variance = x @ mean.T, x.square() @ (2 * log_std).exp().T
        terms = (logits + variance / 2).logsumexp(-1) - logits.gather(1, task.y[:, None])[:, 0]
        q = torch.distributions.Normal(mean, log_std.exp())
        total = terms.sum() + kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()  # 3 · 2/6
        total.backward()
        return total.item(), torch.cat([mean.grad.flatten(), log_std.grad.flatten()]).numpy()

    start = torch.zeros(36, dtype=torch.float64).numpy()
    best = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    found = torch.cat([layer.head.weight.flatten(), layer.head.vbll_log_std.flatten()]).detach().double().numpy()
    assert objective(found)[0] == pytest.approx(best.fun, rel=1e-4)
    assert found == pytest.approx(best.x, abs=0.02)


@pytest.mark.parametrize("covariance", ["diagonal", "dense"])
def test_draws_have_the_gaussians_covariance(covariance):
    layer, generator = last_layer(covariance), torch.Generator().manual_seed(0)
    draws = torch.stack([LastLayerDraws(layer).change(generator) for _ in range(6000)])
    expected = gaussians(layer).covariance_matrix.detach()
    scale = torch.diagonal(expected, dim1=-2, dim2=-1).sqrt()
    error = math.sqrt(6000) / (scale[:, :, None] * scale[:, None, :])
    found = torch.einsum("sci,scj->cij", draws, draws) / 6000
    assert ((found - expected) * error).abs().max() < 6  # an entry's standard error is at most √2/√n of its scale
    assert (draws.mean(0) / scale * math.sqrt(6000)).abs().max() < 5


def tiny(kind):
    options = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    config, model = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
    }[kind]
    return model(config(num_labels=3, pad_token_id=0, max_position_embeddings=40, **options))


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_a_draw_is_the_model_with_that_head(kind, base):
    model = load_model(str(base), num_labels=3) if kind == "llama" else tiny(kind)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"] if kind == "llama" else ["query"])
    model = Vbll(covariance="dense").prepare(model, lora).eval()
    head = head_of(model)
    with torch.no_grad():
        head.vbll_log_std.fill_(-1.0)
        head.vbll_off_diagonal.normal_(std=0.1)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    inputs, sampler = {"input_ids": ids, "attention_mask": (ids != 0).long()}, LastLayerDraws(LastLayer(head))
    found = predict(model, inputs, 3, seed=4, sampler=sampler).log_probs
    generator, before = torch.Generator().manual_seed(4), head.weight.detach().clone()
    for row in found:
        with torch.no_grad():
            head.weight.copy_(before + sampler.change(generator))
            torch.testing.assert_close(model(**inputs).logits.log_softmax(-1), row, rtol=1e-4, atol=1e-5)
            head.weight.copy_(before)
    torch.testing.assert_close(
        predict(model, inputs, 0, sampler=sampler).log_probs[0], model(**inputs).logits.detach().log_softmax(-1)
    )


def test_draws_share_a_forward(base, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", queries())
    given = {"data": str(data), "output": str(tmp_path / "run"), "model": str(base), "method": "vbll", "steps": 2}
    run = runs.train(runs.RunConfig.of(**given), progress=False)
    calls = []
    run.model.register_forward_hook(lambda *_: calls.append(1))
    assert len(run.predict(queries(), 8).log_probs) == 8
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("covariance", "full", "covariance"),
        ("prior_scale", 0.0, "prior_scale must be a finite number above 0, got 0.0"),
        ("kl_scale", -1.0, "kl_scale must be a finite number of at least 0, got -1.0"),
        ("std_learning_rate", 0.0, "std_learning_rate must be a finite number above 0, got 0.0"),
    ],
)
def test_an_option_out_of_its_range(option, value, message):
    with pytest.raises(ValueError, match=message):
        Vbll(**{option: value})


def test_choices_are_refused_before_a_model_loads(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", QUESTIONS)
    config = runs.RunConfig.of(data=str(data), output=str(tmp_path / "run"), model="./no/model", method="vbll")
    with pytest.raises(
        runs.RunError, match=r"'vbll' is for texts with labels, .* train task 'choice_text' with another"
    ):
        runs.train(config, progress=False)


def test_a_folder_without_the_gaussian_is_refused(base, tmp_path):
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    save(METHODS["lora"]().prepare(load_model(str(base), num_labels=2), lora), tmp_path)
    with pytest.raises(AdapterFileError, match=r"1 weights of the method are missing, the first .*vbll_log_std"):
        Vbll().load(load_model(str(base), num_labels=2), tmp_path)


def test_it_starts_from_a_trained_lora_and_its_head(base, tmp_path):
    data = str(write_jsonl(tmp_path / "data.jsonl", queries()))
    given = {"data": data, "model": str(base), "steps": 3, "learning_rate": 0.05, "warmup_steps": 0}
    lora = runs.train(runs.RunConfig.of(method="lora", output=str(tmp_path / "lora"), **given), progress=False)
    options = {"start_from": str(tmp_path / "lora"), "learning_rate": 1e-9, "method": "vbll"}
    config = runs.RunConfig.of(output=str(tmp_path / "run"), **{**given, **options})
    found = runs.train(config, progress=False)
    torch.testing.assert_close(head_of(found.model).weight, head_of(lora.model).weight)
    expected = lora.predict(queries(), 0).log_probs
    torch.testing.assert_close(found.predict(queries(), 0).log_probs, expected, rtol=1e-4, atol=1e-5)

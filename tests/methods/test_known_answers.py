"""Each method against a case whose answer comes from elsewhere."""

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification, Trainer, TrainingArguments

from bloblora.adapter import BlobConfig, Posterior, bayesianize, find_posterior
from bloblora.methods import METHODS, Training
from bloblora.methods.ensemble import Ensemble
from bloblora.methods.ivon import Ivon
from bloblora.methods.map import Map, squared_norm
from bloblora.methods.mc_dropout import DroppedColumns, McDropout
from bloblora.methods.mixture import Components, Mixture
from bloblora.methods.scalabl import Scalabl, ScaledRows, _fold, _layers
from bloblora.methods.tfb import _NUM_SAMPLES, Tfb, last_layers, rotate, set_noise
from bloblora.prediction import WeightDraws, fit_temperature, predict, tempered_nll
from tests.conftest import tiny_llama, with_lora


class Rows:
    """A task whose model is a linear layer: 40 rows of 6 features, 3 classes."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 6, generator=generator)
        self.y = (self.x @ torch.randn(6, 3, generator=generator)).softmax(-1).multinomial(1, generator=generator)[:, 0]

    def examples(self):
        return [{"x": x, "label": int(y)} for x, y in zip(self.x, self.y, strict=True)]

    def length(self, example):
        return 1

    def collate(self, examples):
        batch = {"x": torch.stack([e["x"] for e in examples])}
        return batch | {"labels": torch.tensor([e["label"] for e in examples])}

    def logits(self, model, batch):
        return model(batch["x"])


class Net(nn.Module):
    """y = 0 x, to which LoRA is added."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.config = type("Config", (), {"to_dict": lambda self: {}, "model_type": "net"})()

    def forward(self, x):
        return self.linear(x)


def training(task, folder, **arguments):
    options = dict(
        output_dir=str(folder),
        max_steps=600,
        per_device_train_batch_size=40,
        learning_rate=0.05,
        lr_scheduler_type="linear",
        seed=0,
        logging_steps=5,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        max_grad_norm=0.0,
    )
    return Training(task, task.examples(), {**options, **arguments})


LORA = LoraConfig(r=3, lora_alpha=3, target_modules=["linear"])


def delta(model):
    layer = model.base_model.model.linear
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()


def test_map_is_the_minimum_of_the_negative_log_posterior(tmp_path):
    """The best A and B of a given product have ‖A‖² + ‖B‖² = 2‖BA‖₊, the nuclear norm: a convex problem of W = BA."""
    task, prior_std = Rows(), 0.7
    method = Map(prior_std=prior_std)
    torch.manual_seed(1)
    model = method.prepare(Net(), LORA)
    method.fit(model, fitted := training(task, tmp_path))
    x, y = task.x.double().numpy(), task.y.numpy()

    def nll(w):
        logits = x @ w.T
        return np.log(np.exp(logits).sum(1)).sum() - logits[np.arange(40), y].sum()

    def objective(flat):
        w = flat.reshape(3, 6)
        return nll(w) + np.linalg.norm(w, "nuc") / prior_std**2

    options = {"maxiter": 40000, "xtol": 1e-6, "ftol": 1e-10}
    starts = (delta(model).double().numpy().ravel(), np.zeros(18))
    expected = min(minimize(objective, start, method="Powell", options=options).fun for start in starts)
    found = objective(delta(model).double().numpy().ravel())
    assert found == pytest.approx(expected, rel=1e-3)
    assert fitted.logs[-1]["nll"] == pytest.approx(nll(delta(model).double().numpy()) / 40, rel=1e-2)  # no penalty
    # and the factors are balanced
    assert squared_norm(model).item() == pytest.approx(2 * np.linalg.norm(delta(model).numpy(), "nuc"), rel=2e-2)


def test_dropped_columns_have_the_mean_and_the_variance_of_dropout(tokens):
    model = with_lora(tiny_llama()).eval()
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("layers.1.self_attn.v_proj"))
    weight = layer.lora_A["default"].weight.detach().clone()
    dropped, generator, probability = DroppedColumns(model, 0.3), torch.Generator().manual_seed(0), 0.3
    draws = torch.stack([dropped.sample(generator)[name] for _ in range(4000)])
    variance = weight.square() * probability / (1 - probability)
    error = (draws.mean(0) - weight) / (variance / 4000).sqrt()
    assert error.abs().max() < 5
    torch.testing.assert_close(draws.var(0), variance, rtol=0.1, atol=1e-6)
    # columns go together
    kept = draws != 0
    assert torch.equal(kept.any(1), kept.all(1))
    x = torch.randn(5, 32)
    with dropped.draw(torch.Generator().manual_seed(1)):
        drawn = layer.lora_A["default"](x)
    torch.testing.assert_close(drawn, x @ dropped.sample(torch.Generator().manual_seed(1))[name].T)
    torch.testing.assert_close(layer.lora_A["default"](x), x @ weight.T)


def test_members_of_an_ensemble_are_plain_loras_of_their_seeds(tmp_path):
    task, method = Rows(), Ensemble(members=2)
    model = method.prepare(Net(), LORA)
    starts = [model.base_model.model.linear.lora_A[f"member_{i}"].weight.detach().clone() for i in range(2)]
    assert not torch.equal(*starts)
    method.fit(model, training(task, tmp_path, max_steps=5))
    for i in range(2):
        alone = METHODS["lora"]().prepare(Net(), LORA)
        alone.base_model.model.linear.lora_A["default"].weight.data.copy_(starts[i])
        training(task, tmp_path / f"alone{i}", max_steps=5, seed=i).run(alone)
        layer = model.base_model.model.linear
        member = layer.lora_B[f"member_{i}"].weight @ layer.lora_A[f"member_{i}"].weight
        torch.testing.assert_close(member.detach(), delta(alone), rtol=1e-4, atol=1e-6)


def test_components_of_a_mixture_are_blobs_of_their_seeds_and_take_turns(tmp_path):
    task, method = Rows(), Mixture(members=2, init_std=0.3)
    model = method.prepare(Net(), LORA)
    starts = [
        {
            n.replace(f"member_{i}", "default"): p.detach().clone()
            for n, p in model.named_parameters()
            if f"member_{i}" in n
        }
        for i in range(2)
    ]
    sampler = method.fit(model, training(task, tmp_path, max_steps=5))
    assert isinstance(sampler, Components)
    alone = []
    for i in range(2):
        blob = METHODS["blob"](init_std=0.3).prepare(Net(), LORA)
        with torch.no_grad():
            for name, start in starts[i].items():
                blob.get_parameter(name).copy_(start)
        METHODS["blob"]().fit(blob, training(task, tmp_path / f"alone{i}", max_steps=5, seed=i))
        alone.append(find_posterior(blob))
        component = Posterior(model, f"member_{i}")
        for name, mean in alone[i].named_means().items():
            torch.testing.assert_close(component.named_means()[name], mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(component.named_stds()[name], alone[i].named_stds()[name], rtol=1e-4, atol=1e-6)

    x = torch.randn(5, 6)
    found = [*sampler.logits(lambda: model(x), 5, seed=3)]
    assert len(found) == 5
    for logits, (posterior, weights) in zip(found, sampler.draws(3), strict=False):
        twin = alone[int(posterior.adapter_name[-1])]
        with twin.fixed(weights):
            torch.testing.assert_close(logits, twin.model(x), rtol=1e-4, atol=1e-5)
    assert [posterior.adapter_name[-1] for posterior, _ in islice(sampler.draws(3), 5)] == [*"01010"]
    (mean,) = sampler.logits(lambda: model(x), 0, seed=3)
    with alone[0].mean():
        torch.testing.assert_close(mean, alone[0].model(x), rtol=1e-4, atol=1e-5)


def test_temperature_brings_back_the_scale_of_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    for scale in (0.4, 1.0, 3.0):
        found = fit_temperature([(scale * logits).log_softmax(-1)[None]], [labels])
        # the Fisher information of log T is the mean variance of the logits under the model, times n
        p = logits.softmax(-1)
        information = ((p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2).sum()
        assert math.log(found / scale) == pytest.approx(0, abs=4 / math.sqrt(information))


def test_a_temperature_of_ten_records_costs_less_than_none_where_it_matters():
    """Nats of a fit, on average over sets of ten records: of a calibrated model, and of one 3 times too sure."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.5 * torch.randn(5000, 4, generator=generator)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]

    def excess(temperature):
        return (tempered_nll([logits[None]], [labels], temperature) - best).mean().item()

    best = tempered_nll([logits[None]], [labels], 1.0)
    costs = {}
    for sure in (1.0, 3.0):
        sets = [torch.randint(5000, (10,), generator=generator) for _ in range(100)]
        fits = [fit_temperature([(sure * logits[rows])[None]], [labels[rows]]) / sure for rows in sets]
        costs[sure] = sum(map(excess, fits)) / len(fits)
    assert costs[1.0] < 0.09
    assert costs[3.0] < 0.13
    assert excess(1 / 3.0) > 0.35


def test_few_records_that_are_all_right_do_not_make_the_temperature_tiny():
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(10, 1)
    found = fit_temperature([logits[None]], [torch.zeros(10, dtype=torch.long)])
    assert 0.4 < found < 0.8


def test_tfb_rewrites_the_adapter_without_changing_it_and_its_noise_is_isotropic(tokens):
    model = with_lora(tiny_llama()).eval()
    before = model(tokens).logits
    posterior, singular_values = rotate(model)
    with posterior.mean():
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
    set_noise(posterior, singular_values, 0.1, posterior.layer_names())
    name, layer = next(iter(posterior.named_layers().items()))
    b, std = layer.lora_B["default"].weight, posterior.named_stds()[f"{name}.lora_A"]
    # in the space of ΔW = B A a column's covariance is B diag(Ω²) Bᵀ = σ² U Uᵀ: a projection
    covariance = b @ torch.diag(std[:, 0] ** 2) @ b.T
    eigenvalues = torch.linalg.eigvalsh(covariance)[-4:]
    torch.testing.assert_close(eigenvalues, torch.full((4,), 0.01), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, 1.003),
        ({"tolerance": 0.02}, 1.02),
        ({"tolerance": 0.0004, "divide_by_anchors": True}, 1.016),
        ({"tolerance": 0.001, "divide_by_anchors": True, "num_anchors": 20}, 1.02),
    ],
)
def test_tfb_finds_the_largest_noise_within_the_tolerance(options, allowed, tmp_path):
    task, method = Rows(), Tfb(**options)
    torch.manual_seed(1)
    model = method.prepare(Net(), LORA)
    sampler = method.fit(model, training(task, tmp_path, max_steps=60))
    size, d, posterior = noise_of(model, sampler)
    examples = task.examples()[:: 2 if "num_anchors" in options else 1]
    answers = predict(model, examples, 0, task=task).labels

    def nll(noise):
        set_noise(posterior, d, noise, posterior.layer_names())
        search = WeightDraws(posterior, mirrored=True)
        prediction = predict(model, examples, _NUM_SAMPLES if noise else 0, task=task, sampler=search)
        return -prediction.log_probabilities[torch.arange(len(examples)), answers].mean().item()

    step = (0.2 / 1e-4) ** (1 / 64)  # of six bisections
    assert 1e-4 < size < 0.2 / step
    assert nll(size) <= nll(0) * allowed < nll(size * step * 1.001)


def noise_of(model, sampler):
    """σq, d and the posterior of a fitted `Net`."""
    b = model.base_model.model.linear.lora_B["default"].weight
    posterior = sampler.weights
    size = (next(iter(posterior.named_stds().values()))[:, 0] * b.norm(dim=0)).mean().item()
    return size, {name: b.norm(dim=0).detach() for name in posterior.layer_names()}, posterior


def test_tfb_ends_at_its_ceiling_and_says_where_its_floor_fails(tmp_path):
    torch.manual_seed(1)
    task, lax, strict = (
        Rows(),
        Tfb(max_std=0.015, divide_by_anchors=True, tolerance=0.1),
        Tfb(min_std=0.1, tolerance=1e-5),
    )
    model = lax.prepare(Net(), LORA)
    setup = training(task, tmp_path, max_steps=60)
    assert noise_of(model, lax.fit(model, setup))[0] == pytest.approx(0.015)
    model = strict.prepare(Net(), LORA)
    with pytest.warns(UserWarning, match="min_std 0.1 already changes the NLL"):
        sampler = strict.fit(model, training(task, tmp_path / "strict", max_steps=60))
    assert noise_of(model, sampler)[0] == pytest.approx(0.1)


def test_tfb_in_the_last_block_leaves_the_others_as_they_are(tokens):
    model = with_lora(tiny_llama()).eval()
    posterior, singular_values = rotate(model)
    layers = last_layers(posterior)
    assert layers == [name for name in posterior.layer_names() if ".layers.1." in name]
    set_noise(posterior, singular_values, 0.1, layers)
    means, weights = posterior.named_means(), posterior.sample(torch.Generator().manual_seed(0))
    for layer, of_layer in weights.items():
        moved = (of_layer["A"] - means[f"{layer}.lora_A"]).abs().max()
        assert moved > 1e-3 if layer in layers else moved < 1e-10
    head = with_lora(tiny_llama(), ("q_proj", "lm_head"))
    assert [name.rpartition(".")[2] for name in last_layers(bayesianize(head))] == ["lm_head"]


def test_ivon_finds_the_gaussian_of_a_quadratic():
    """Of the loss ½ a w² a row, n rows: q = N(0, 1/(λ(a + δ))), whose mean is the minimum and h the curvature."""
    from ivon import IVON

    torch.manual_seed(0)
    curvature = torch.tensor([0.5, 2.0, 8.0])
    w = nn.Parameter(torch.ones(3))
    optimizer = IVON([w], lr=0.05, ess=100.0, hess_init=1.0, weight_decay=0.1, beta2=0.999, rescale_lr=False)
    for _ in range(6000):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (curvature * w.square() / 2).sum().backward()
        optimizer.step()
    (group,) = optimizer.param_groups
    torch.testing.assert_close(group["hess"], curvature, rtol=0.15, atol=0)
    assert w.abs().max() < 0.05


def test_ivon_keeps_the_optimizers_gaussian(tmp_path):
    task = Rows()
    method = Ivon(effective_sample_size=400.0, hess_init=0.1, clip_radius=1.0)
    torch.manual_seed(1)
    model = method.prepare(Net(), LORA)
    sampler = method.fit(model, training(task, tmp_path, learning_rate=0.01, max_steps=100))
    stds = torch.cat([std.flatten() for std in sampler.weights.named_stds().values()])
    # h has hardly left its start in 100 steps of β₂ = 0.99999
    torch.testing.assert_close(stds, torch.full_like(stds, 1 / math.sqrt(400 * 0.1)), rtol=0.02, atol=0)
    accuracy = (task.logits(model, {"x": task.x}).argmax(-1) == task.y).float().mean()
    assert accuracy > 0.6


def test_ivon_goes_as_far_in_a_training_of_any_length(tmp_path):
    """Each step of an entry is at most 10 / steps times the learning rate, by the default radius."""
    moved = []
    for steps in (20, 100):
        torch.manual_seed(1)
        method = Ivon(effective_sample_size=4e8, hess_init=1e-6)
        model = method.prepare(Net(), LORA)
        layer = model.base_model.model.linear
        nn.init.normal_(layer.lora_B["default"].weight)
        start = layer.lora_A["default"].weight.detach().clone()
        method.fit(model, training(Rows(), tmp_path / f"{steps}", learning_rate=0.01, max_steps=steps))
        moved.append((layer.lora_A["default"].weight - start).abs().max().item())
    # The rate falls linearly to 0, so that the steps sum to half of 10 × 0.01 at most; h so small clips them all.
    assert moved == [pytest.approx(0.05, rel=0.2)] * 2


def test_ivon_sees_one_mean_gradient_however_the_batch_is_split(tmp_path):
    """Means and Ω after three steps of one batch of 8, and of four of 2 that are accumulated, under the same noise."""
    task, method = Rows(), Ivon(effective_sample_size=50.0, hess_init=1.0, clip_radius=10.0)

    def trained(size, steps):
        torch.manual_seed(1)
        model = method.prepare(Net(), LORA)
        nn.init.normal_(model.base_model.model.linear.lora_B["default"].weight)
        split = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        options = dict(learning_rate=0.1, max_steps=3, lr_scheduler_type="constant", **split)
        sampler = method.fit(model, training(task, tmp_path / f"{size}", **options))
        return delta(model), torch.cat([std.detach().flatten() for std in sampler.weights.named_stds().values()])

    (whole, whole_std), (split, split_std) = trained(8, 1), trained(2, 4)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
    # h moves by 1 − β₂ = 1e-5 of its estimate: compare how far Ω has gone
    start = torch.tensor(50.0).rsqrt()
    torch.testing.assert_close(split_std - start, whole_std - start, rtol=0.02, atol=2e-7)
    assert (whole_std - start).abs().max() > 1e-6


def test_scalabl_folds_its_means_and_draws_its_variance(tokens):
    torch.manual_seed(0)
    method = Scalabl(init_std=0.49)
    model = method.prepare(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn.v_proj"))
    mean, std = layer.scalabl_mean["default"].detach(), layer.scalabl_std_parameter["default"].detach() ** 2
    rows = layer.lora_A["default"].weight.detach().clone()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-5)  # singular vectors
    model.eval()
    before = model(tokens).logits
    # noise of a training forward: (b, T, r), one draw an example for all its tokens
    x = torch.randn(2000, 3, 32)
    h = layer.lora_variant["default"].project(layer.train(), "default", x) / (x @ rows.T)
    torch.testing.assert_close(h[:, 0], h[:, 1], rtol=1e-2, atol=1e-2)
    assert ((h[:, 0].mean(0) - mean) / (std / math.sqrt(2000))).abs().max() < 5
    torch.testing.assert_close(h[:, 0].std(0), std, rtol=0.1, atol=0)

    distribution = ScaledRows(model, _fold(model.eval()))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    name = next(name for name, module in model.named_modules() if module is layer)
    drawn = [distribution.sample(generator)[name] for _ in range(2000)]
    draws = torch.stack([(weight * rows).sum(1) for weight in drawn])  # the scales, as rows are orthonormal
    assert ((draws.mean(0) - mean) / (std / math.sqrt(2000))).abs().max() < 5
    torch.testing.assert_close(draws.std(0), std, rtol=0.1, atol=0)
    assert not any("scalabl" in name for name, _ in model.named_parameters())
    assert len(_layers(model)) == 4


@pytest.mark.parametrize(
    ("weighting", "size", "accumulated", "steps", "weight"),
    # M = ⌊100·40^(π/8)/b⌋ = ⌊425.7/b⌋
    [
        ("reweighted", 40, 1, 20, 2.0),  # M = 10
        ("reweighted", 40, 1, 19, 1 + (2**10 - 2) / (2**11 - 1)),  # the published 2^i/(2^(M+1) - 1), i = 1..9
        ("uniform", 40, 1, 13, 1.3),
        ("uniform", 10, 2, 13, 13 / 21),  # b = 20
    ],
)
def test_scalabl_without_evidence_goes_to_its_prior(weighting, size, accumulated, steps, weight, tmp_path):
    """With B at 0 the NLL knows nothing of the scales: q follows the KL's flow, whose solution `kl_flow_` has."""
    task = Rows()
    method = Scalabl(init_std=0.49, prior_std=1.3, kl_learning_rate=0.2, kl_weighting=weighting)
    torch.manual_seed(1)
    model = method.prepare(Net(), LORA)
    layer = model.base_model.model.linear
    for factor in (layer.lora_A, layer.lora_B):
        factor["default"].weight.requires_grad_(False)
    start, std = layer.scalabl_mean["default"].detach().clone(), layer.scalabl_std_parameter["default"].detach() ** 2
    constant = dict(lr_scheduler_type="constant", warmup_steps=0, max_steps=steps)
    constant |= dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    sampler = method.fit(model, training(task, tmp_path, **constant))
    time = 0.2 * weight
    slope = math.tanh(4 * time / 1.3)
    mean = start * math.exp(-time / 1.3**2)
    torch.testing.assert_close(layer.lora_A["default"].weight.detach().norm(dim=1), mean, rtol=1e-3, atol=0)
    (ratio,) = sampler.weights.ratios.values()
    torch.testing.assert_close(
        ratio.detach() * mean, 1.3 * (std + 1.3 * slope) / (1.3 + std * slope), rtol=1e-3, atol=0
    )
    assert (mean / start < 0.95).all()


def test_full_trains_every_weight_as_the_trainer_does(tmp_path):
    task = Rows()
    ours, theirs = METHODS["full"]().prepare(Net(), LORA), Net()
    setup = training(task, tmp_path, max_steps=8, per_device_train_batch_size=8)
    METHODS["full"]().fit(ours, setup)

    class Plain(Trainer):
        def compute_loss(self, model, inputs, *_, **__):
            return nn.functional.cross_entropy(model(inputs["x"]), inputs["labels"])

    Plain(
        theirs, TrainingArguments(**setup.arguments), train_dataset=task.examples(), data_collator=task.collate
    ).train()
    torch.testing.assert_close(ours.linear.weight, theirs.linear.weight, rtol=1e-5, atol=1e-6)
    assert ours.linear.weight.abs().max() > 0.1


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_which_factors_are_gaussian(factors, tokens):
    """Mean and variance of ΔW = s B A over draws against the closed form of a product of independent Gaussians."""
    model = with_lora(tiny_llama(), ("v_proj",)).eval()
    posterior = bayesianize(model, BlobConfig(init_std=0.25, factors=factors))
    layer = next(iter(posterior.named_layers().values()))
    a, b = (getattr(layer, f"lora_{f}")["default"].weight.detach() for f in "AB")
    of_layer = next(name for name, module in model.named_modules() if module is layer)
    stds = {name.rpartition("_")[2]: std.detach() for name, std in posterior.named_stds().items() if "layers.0" in name}
    va, vb = (stds[f].square() if f in stds else torch.zeros_like(w) for f, w in (("A", a), ("B", b)))
    expected = layer.scaling["default"] ** 2 * (b.square() @ va + vb @ a.square() + vb @ va)
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(3000):
        weights = {"A": a, "B": b} | posterior.sample(generator)[of_layer]
        draws.append((layer.scaling["default"] * weights["B"] @ weights["A"]).detach())
    draws = torch.stack(draws)
    error = (draws.mean(0) - layer.scaling["default"] * b @ a) / (expected / 3000).sqrt()
    assert error.abs().max() < 5.5
    ratio = draws.var(0) / expected
    assert ratio.mean() == pytest.approx(1, abs=0.02)


def test_what_a_training_forward_adds_where_b_is_gaussian(tokens):
    """The output's variance over draws against the closed form, for one example of several tokens."""
    model = with_lora(tiny_llama(), ("v_proj",))
    posterior = bayesianize(model, BlobConfig(init_std=0.25, factors="B"))
    layer = next(iter(posterior.named_layers().values())).train()
    x = torch.randn(1, 3, 32)
    h = x @ layer.lora_A["default"].weight.T
    std = next(iter(posterior.named_stds().values())).detach()
    expected = layer.scaling["default"] ** 2 * h.square() @ std.square().T
    with torch.no_grad():
        outputs = layer(x.expand(4000, -1, -1)) - layer.get_base_layer()(x)
    mean = layer.scaling["default"] * h @ layer.lora_B["default"].weight.T
    assert ((outputs.mean(0) - mean[0]) / (expected[0] / 4000).sqrt()).abs().max() < 5
    torch.testing.assert_close(outputs.var(0), expected[0], rtol=0.15, atol=0)


def test_a_dropout_of_its_own(tmp_path):
    model = McDropout().prepare(Net(), replace(LORA, lora_dropout=0.25))
    assert model.peft_config["default"].lora_dropout == 0.25


def test_a_distilled_point_is_the_best_fit_to_the_average_of_draws(tmp_path):
    """Of a linear model: a convex problem in W, which scipy solves."""
    task = Rows()
    options = dict(init_std=0.49, kl_scale=1.0)
    torch.manual_seed(1)
    blob = METHODS["blob"](**options)
    teacher = blob.prepare(Net(), LORA)
    sampler = blob.fit(teacher, training(task, tmp_path / "teacher"))
    targets = predict(teacher, task.examples(), 10, 0, task=task, sampler=sampler).probabilities.double().numpy()
    torch.manual_seed(1)
    distilled = METHODS["distilled"](**options, distill_steps=600)
    student = distilled.prepare(Net(), LORA)
    distilled.fit(student, training(task, tmp_path / "student"))
    x = task.x.double().numpy()

    def cross_entropy(w):
        logits = x @ w.reshape(3, 6).T
        return (np.log(np.exp(logits).sum(1)) - (targets * logits).sum(1)).mean()

    best = minimize(cross_entropy, np.zeros(18)).fun
    assert cross_entropy(delta(student).double().numpy()) == pytest.approx(best, abs=1e-4)
    assert cross_entropy(delta(teacher).double().numpy()) > best + 1e-3
    assert find_posterior(student) is None


def test_tfb_of_a_layer_with_fewer_outputs_than_ranks():
    """Its rotation leaves B A as it is, and what B doesn't read has a noise that does nothing."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=5, target_modules=["linear"], init_lora_weights=False))
    layer = model.base_model.model.linear
    before = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    posterior, singular_values = rotate(model)
    torch.testing.assert_close(layer.lora_B["default"].weight @ layer.lora_A["default"].weight, before)
    (values,) = singular_values.values()
    assert values[3:].tolist() == [0, 0]
    set_noise(posterior, singular_values, 0.1, [*singular_values])
    assert all(std.isfinite().all() for std in posterior.named_stds().values())


def test_members_have_heads_of_their_own_and_the_pretrained_rest():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    base = RobertaForSequenceClassification(RobertaConfig(num_labels=3, **sizes))
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier", "word_embeddings"])
    model = Ensemble(members=2).prepare(base, lora)
    own = {n: p for n, p in model.named_parameters() if ".modules_to_save.member_0." in n and "bias" not in n}
    others = {n: model.get_parameter(n.replace("member_0", "member_1")) for n in own}
    same = {n.split(".modules_to_save")[0].rsplit(".")[-1]: torch.equal(p, others[n]) for n, p in own.items()}
    assert same == {"classifier": False, "word_embeddings": True}
    assert len(own) == 3  # dense, out_proj and the embedding
    assert not any(torch.equal(p, others[n]) for n, p in own.items() if "classifier" in n)


def test_scalabl_trains_loras_bias():
    model = Scalabl().prepare(tiny_llama(), LoraConfig(target_modules=["q_proj"], lora_bias=True))
    model.train()(torch.tensor([[5, 6, 7]])).logits.square().mean().backward()
    biases = [p for n, p in model.named_parameters() if "lora_B" in n and n.endswith("bias")]
    assert biases
    assert all(bias.grad.abs().max() > 0 for bias in biases)

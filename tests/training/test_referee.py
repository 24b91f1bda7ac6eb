"""Training against the exact optimum of the bound: logistic regression through a LoRA whose B is fixed.

With A (1, n), a mean-field q and B = 1 the logit of an input x is N(M x, Ω² x²). So the bound per example is a function
of M and Ω with one integral an example, which quadrature gives, and L-BFGS finds its optimum.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize
from torch import nn

from bloblora import BlobConfig, BlobTrainer, bayesianize
from bloblora.tasks.likelihood import Bernoulli
from bloblora.training import BlobTrainingArguments

from .conftest import logs

FEATURES, WIDE, PRIOR_STD = 40, 4000, 0.2
_NODES, _WEIGHTS = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(32))


class Logistic(nn.Module):
    """The logit W x: W starts at 0, and LoRA is all there is of it."""

    def __init__(self, features):
        super().__init__()
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        return self.linear(x)


class Task:
    """p(y | x) = σ(W x), one label or none."""

    likelihood = Bernoulli()

    def length(self, example):
        return 1

    def logits(self, model, batch):
        return model(batch["x"])


def problem(size, features=FEATURES):
    """Inputs (D, n), of which the first features say much and the last ones little, and labels (D,)."""
    generator = torch.Generator().manual_seed(0)
    scale = 4 * math.sqrt(FEATURES / features)
    x = torch.randn(size, features, generator=generator) * scale * torch.logspace(0, -1.5, features)
    weight = PRIOR_STD * torch.randn(features, generator=generator)
    return x, (torch.rand(size, generator=generator) < torch.sigmoid(x @ weight)).float()


def bound(x, y, mean, std, kl_scale):
    """E[NLL] + kl_scale · KL / D, in nats an example."""
    x, y = x.double(), y.double()
    logits = (x @ mean)[:, None] + (x.square() @ std.square()).sqrt()[:, None] * _NODES
    nll = (F.softplus(logits) - y[:, None] * logits) @ (_WEIGHTS / _WEIGHTS.sum())
    kl = ((PRIOR_STD / std).log() + (std.square() + mean.square()) / (2 * PRIOR_STD**2) - 0.5).sum()
    return nll.mean() + kl_scale * kl / len(x)


def optimum(x, y, kl_scale):
    """Ω* and the least bound."""

    features = x.shape[1]

    def value(parameters):
        leaf = torch.tensor(parameters, requires_grad=True)
        result = bound(x, y, leaf[:features], leaf[features:].exp(), kl_scale)
        result.backward()
        return result.item(), leaf.grad.numpy()

    start = np.r_[np.zeros(features), np.full(features, math.log(PRIOR_STD / 2))]
    found = minimize(value, start, jac=True, method="L-BFGS-B", options=dict(maxiter=2000, ftol=1e-13, gtol=1e-9))
    return torch.tensor(found.x[features:]).exp(), found.fun


def trained(folder, x, y, std_gradient="auto", **options):
    """The posterior and its trainer, by the defaults where nothing else is said."""
    torch.manual_seed(0)
    model = get_peft_model(Logistic(x.shape[1]), LoraConfig(r=1, lora_alpha=1, target_modules=["linear"]))
    posterior = bayesianize(model, BlobConfig(prior_std=PRIOR_STD, std_gradient=std_gradient))
    with torch.no_grad():
        model.base_model.model.linear.lora_B["default"].weight.requires_grad_(False).fill_(1)
    options = {"kl_scale": 1.0, **options, "logging_steps": 20, "save_strategy": "no", "report_to": []}
    options |= dict(disable_tqdm=True, use_cpu=True)
    data = [{"x": row, "labels": target[None]} for row, target in zip(x, y, strict=True)]
    arguments = BlobTrainingArguments(output_dir=str(folder), **options)
    trainer = BlobTrainer(model, arguments, task=Task(), train_dataset=data)
    trainer.train()
    return posterior, trainer


def stds(posterior):
    """Ω of the one adapted layer (n,)."""
    (std,) = posterior.named_stds().values()
    return std.detach()[0].double()


CORNERS = [(100, 8, 4e-3, 1.0, 2000), (500, 32, 2e-3, 1.0, 2000), (500, 32, 2e-3, 0.3, 3000)]
OTHERS = {(size, batch, rate, 1.0, 2000) for size in (100, 500) for batch in (8, 32) for rate in (2e-3, 4e-3)}
OTHERS = sorted(OTHERS.difference(CORNERS))


@pytest.mark.parametrize(
    ("size", "batch", "learning_rate", "kl_scale", "steps"),
    [*CORNERS, *(pytest.param(*other, marks=pytest.mark.long) for other in OTHERS)],
)
def test_default_training_reaches_the_bounds_optimum(tmp_path, size, batch, learning_rate, kl_scale, steps):
    """At any learning rate and batch size; kl_scale is the temperature of the bound that is minimized."""
    x, y = problem(size)
    options = dict(learning_rate=learning_rate, kl_scale=kl_scale, max_steps=steps, per_device_train_batch_size=batch)
    posterior, trainer = trained(tmp_path, x, y, **options)

    best_std, best = optimum(x, y, kl_scale)
    (mean,), std = posterior.named_means().values(), stds(posterior)
    mean = mean.detach()[0].double()
    assert bound(x, y, mean, std, kl_scale) <= 1.02 * best
    assert (std / best_std).log().square().mean().sqrt() <= 0.1
    assert logs(trainer, "drift_std")[0] > 1.4
    for name in ("drift_mean", "drift_std"):  # below 1 where Adam still remembers larger gradients
        assert 0.2 < np.mean(logs(trainer, name)[-20:]) < 1.1, name
    assert best_std.max() / best_std.min() > 2.5  # the data do say different things about different weights


@pytest.mark.parametrize("steps", [100, 200, 500])
def test_the_width_arrives_in_a_training_of_any_length(tmp_path, steps):
    """Where 100 steps leave M short of its optimum, Ω is there all the same, from a start at a fortieth of σp."""
    x, y = problem(100)
    posterior, _ = trained(tmp_path, x, y, learning_rate=2e-3, max_steps=steps, per_device_train_batch_size=8)
    best_std, _ = optimum(x, y, 1.0)
    assert (stds(posterior) / best_std).log().square().mean().sqrt() <= 0.2


@pytest.mark.parametrize(("kl_scale", "steps"), [(1.0, 200), (0.1, 1000)])
def test_the_width_of_many_weights_of_which_the_data_say_little(tmp_path, kl_scale, steps):
    """As in a language model: 4,000 weights and 300 records. The default arrives; products with the noise are noise."""
    x, y = problem(300, WIDE)
    best_std, best = optimum(x, y, kl_scale)
    far, bounds = {}, {}
    for std_gradient in ("auto", "reparameterization"):
        options = dict(learning_rate=2e-3, kl_scale=kl_scale, max_steps=steps, per_device_train_batch_size=8)
        posterior, _ = trained(tmp_path, x, y, std_gradient, **options)
        (mean,), std = posterior.named_means().values(), stds(posterior)
        far[std_gradient] = (std / best_std).log().square().mean().sqrt()
        bounds[std_gradient] = bound(x, y, mean.detach()[0].double(), std, kl_scale) - best
    assert far["auto"] <= 0.06
    assert far["reparameterization"] > 3 * far["auto"]
    assert bounds["auto"] < 0.8 * bounds["reparameterization"]


@pytest.mark.parametrize(("features", "weight"), [(WIDE, 0.4 / WIDE), (FEATURES, 0.1 / 100)])
def test_the_automatic_scale_without_a_head(tmp_path, features, weight):
    x, y = problem(100, features)
    _, trainer = trained(tmp_path, x, y, kl_scale="auto", max_steps=1, logging_strategy="no")
    assert trainer.current_kl_weight() == pytest.approx(weight)

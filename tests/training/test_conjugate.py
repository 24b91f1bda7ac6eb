"""What training converges to where the answer is known in closed form: linear-Gaussian models."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize
from torch import nn

from bloblora import BlobConfig, BlobTrainer, bayesianize

from .conftest import arguments

NOISE, PRIOR_STD = 0.5, 0.7


class Regression(nn.Module):
    """y ~ N(W x, σ²): W starts at 0, and LoRA is all there is of it; the loss is the mean NLL up to a constant."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x, y):
        predicted = self.linear(x)
        return {"loss": (y - predicted).square().sum(-1).mean() / (2 * NOISE**2), "logits": predicted}


def train(folder, x, y, rank, fixed=None, **config):
    """The posterior after joint training on the ELBO; a factor that is ``fixed`` is the identity and stays it."""
    posterior = start(x, y, rank, fixed, **config)
    go_on(folder, posterior, x, y)
    return posterior


def start(x, y, rank, fixed, **config):
    """The posterior before training."""
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
    model = get_peft_model(Regression(x.shape[1], y.shape[1]), lora)
    posterior = bayesianize(model, BlobConfig(prior_std=PRIOR_STD, init_std=0.25, **config))
    if fixed is not None:
        weight = getattr(model.base_model.model.linear, f"lora_{fixed}")["default"].weight
        weight.requires_grad_(False).copy_(torch.eye(*weight.shape))
    return posterior


def go_on(folder, posterior, x, y):
    """Train a posterior where it is."""
    options = dict(optimizer_style="joint", num_weight_draws=8, learning_rate=0.05, max_grad_norm=0.0)
    options |= dict(max_steps=600, per_device_train_batch_size=len(x), lr_scheduler_type="linear", logging_steps=600)
    data = [{"x": row, "y": target} for row, target in zip(x, y, strict=True)]
    BlobTrainer(posterior.model, arguments(folder, **options), train_dataset=data).train()


@pytest.mark.parametrize(
    ("factor", "fixed", "parameterization"),
    [
        ("A", "B", "square"),
        ("B", "A", "softplus"),
        ("A", "B", "log"),
        *(
            pytest.param(*combination, marks=pytest.mark.long)
            for combination in (("B", "A", "square"), ("A", "B", "softplus"), ("B", "A", "log"))
        ),
    ],
)
def test_the_exact_mean_field_posterior(tmp_path, factor, fixed, parameterization):
    """Its mean is the exact posterior's, and its variances are one over the exact precision's diagonal."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 3, generator=generator) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.9, 0.4], [0.0, 0.0, 0.8]])
    y = x @ torch.randn(3, 3, generator=generator) + NOISE * torch.randn(30, 3, generator=generator)
    posterior = train(tmp_path, x, y, 3, fixed, factors=factor, std_parameterization=parameterization)
    precision = x.T @ x / NOISE**2 + torch.eye(3) / PRIOR_STD**2
    (mean,), (std,) = posterior.named_means().values(), posterior.named_stds().values()
    expected = torch.linalg.solve(precision, x.T @ y / NOISE**2).T
    torch.testing.assert_close(mean.detach(), expected, rtol=0.03, atol=0.02)
    torch.testing.assert_close(std.detach(), precision.diag().rsqrt().expand(3, 3), rtol=0.08, atol=0)


@pytest.mark.parametrize("parameterization", ["log", pytest.param("softplus", marks=pytest.mark.long)])
def test_yesterdays_posterior_as_todays_prior(tmp_path, parameterization):
    """Two halves of the data, one after the other, give the exact posterior of all of them.

    The first half's inputs are orthogonal, so that its exact posterior is a mean-field one and nothing of it is lost.
    """
    generator = torch.Generator().manual_seed(3)
    orthogonal = torch.linalg.qr(torch.randn(24, 3, generator=generator))[0] * torch.tensor([6.0, 4.0, 2.0])
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.9, 0.4], [0.0, 0.0, 0.8]])
    halves = [orthogonal, torch.randn(24, 3, generator=generator) @ mixing]
    weight = torch.randn(3, 3, generator=generator)
    targets = [x @ weight + NOISE * torch.randn(24, 3, generator=generator) for x in halves]
    posterior = train(tmp_path / "first", halves[0], targets[0], 3, "B", std_parameterization=parameterization)
    posterior.update_prior()
    go_on(tmp_path / "second", posterior, halves[1], targets[1])
    x, y = torch.cat(halves), torch.cat(targets)
    precision = x.T @ x / NOISE**2 + torch.eye(3) / PRIOR_STD**2
    (mean,), (std,) = posterior.named_means().values(), posterior.named_stds().values()
    torch.testing.assert_close(mean.detach(), torch.linalg.solve(precision, x.T @ y / NOISE**2).T, rtol=0.03, atol=0.02)
    torch.testing.assert_close(std.detach(), precision.diag().rsqrt().expand(3, 3), rtol=0.08, atol=0)


def test_gaussians_over_both_factors(tmp_path):
    """y = b a x: the bound is a function of two means and two variances, whose minimum scipy finds."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 1, generator=generator)
    y = 1.5 * x + NOISE * torch.randn(20, 1, generator=generator)
    posterior = train(tmp_path, x, y, 1, factors="AB")
    xx, xy, yy = (float((u * v).sum()) for u, v in ((x, x), (x, y), (y, y)))

    def bound(parameters):
        (a, b), (s, t) = parameters[:2], np.exp(parameters[2:])
        nll = (yy - 2 * a * b * xy + (a**2 + s**2) * (b**2 + t**2) * xx) / (2 * NOISE**2)
        return nll + sum(
            np.log(PRIOR_STD / std) + (std**2 + mean**2) / (2 * PRIOR_STD**2) - 0.5 for mean, std in ((a, s), (b, t))
        )

    best = minimize(bound, [1.0, 1.0, -1.0, -1.0], options={"gtol": 1e-8})
    means = torch.cat([mean.detach().flatten() for mean in posterior.named_means().values()])
    stds = torch.cat([std.detach().flatten() for std in posterior.named_stds().values()])
    assert bound([*means, *stds.log()]) == pytest.approx(best.fun, rel=5e-3)
    assert means.prod() == pytest.approx(best.x[0] * best.x[1], rel=0.03)

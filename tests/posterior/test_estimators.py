"""Every estimator's output against the closed-form mean and variance, and what its noise is shared with."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bloblora.posterior import ESTIMATORS, project

PER_EXAMPLE = ["independent", "flipout"]


def layer(r=3, n=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(r, n, generator=generator, dtype=dtype)
    std = torch.rand(r, n, generator=generator, dtype=dtype) * 0.5 + 0.1
    x = torch.randn(4, 2, n, generator=generator, dtype=dtype)
    return mean, std, x


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_and_variance_of_the_output(estimator):
    mean, std, x = layer()
    count, together = 20_000, 1000 if estimator in ("independent", "local") else 1  # the others share their noise
    many = x.repeat(together, 1, 1)
    outputs = torch.cat(
        [project(many, mean, std, estimator).unflatten(0, (together, len(x))) for _ in range(count // together)]
    )
    variance = x.square() @ std.square().T
    assert ((outputs.mean(0) - x @ mean.T).abs() < 5 * (variance / count).sqrt()).all()
    # flipout's output is a scale mixture only over signs, which leave a Gaussian; so the error of a Gaussian's variance
    assert ((outputs.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / count)).all()


@pytest.mark.parametrize("estimator", PER_EXAMPLE)
def test_noise_is_uncorrelated_across_examples(estimator):
    _, std, x = layer()
    same = x[:1].expand(2, -1, -1)
    count = 20_000
    noise = torch.stack([project(same, torch.zeros_like(std), std, estimator)[:, 0] for _ in range(count)])
    product = (noise[:, 0] * noise[:, 1]) / (x[0, 0].square() @ std.square().T)
    assert (product.mean(0).abs() < 5 * product.std(0) / math.sqrt(count)).all()


@pytest.mark.parametrize("estimator", [*PER_EXAMPLE, "shared"])
def test_noise_is_one_function_along_the_tokens_of_an_example(estimator):
    mean, std, x = layer(dtype=torch.float64)
    tokens = torch.cat([x, x[:, :1] + x[:, 1:]], dim=1)  # the third token is the sum of the first two
    h = project(tokens, mean, std, estimator)
    torch.testing.assert_close(h[:, 2], h[:, 0] + h[:, 1])
    assert (h[:, 0] - x[:, 0] @ mean.T).abs().max() > 1e-3


def test_shared_noise_is_the_same_for_all_examples_and_local_differs_by_token():
    mean, std, x = layer()
    same = x[:1, :1].expand(4, 2, -1)
    shared = project(same, mean, std, "shared")
    torch.testing.assert_close(shared, shared[:1, :1].expand_as(shared))
    local = project(same, mean, std, "local")
    assert (local[:, 0] - local[:, 1]).abs().min() > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 6), (4, 3, 2, 6)])
def test_shapes(estimator, shape):
    mean, std, _ = layer()
    assert project(torch.randn(shape), mean, std, estimator).shape == (*shape[:-1], 3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_an_elbo_against_finite_differences(estimator):
    """-E[log N(y; B A x, 1)] + KL with fixed noise, in (x, M, Ω)."""
    from bloblora.posterior import kl_divergence

    mean, std, x = layer(dtype=torch.float64)
    b = torch.randn(2, 3, dtype=torch.float64)

    def elbo(x, mean, g):
        torch.manual_seed(0)
        y = project(x, mean, g.square(), estimator) @ b.T
        return 0.5 * (y - 1).square().sum() + 0.01 * kl_divergence([mean], [g], 0.2)

    inputs = tuple(t.clone().requires_grad_() for t in (x, mean, std.sqrt()))
    assert torch.autograd.gradcheck(elbo, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", PER_EXAMPLE)
@pytest.mark.parametrize("parts", [None, 4, [3, 1, 2, 2]])
def test_fisher_is_the_mean_of_the_squares_of_each_examples_gradient(estimator, parts):
    """∂/∂Ω = Ω∘Σ_k (b·∂loss/∂A_k)²/b, of a loss that is the mean of b NLLs; M's gradient doesn't change."""
    mean, std, x = layer(dtype=torch.float64)
    flat = x if parts is None else x.flatten(0, 1)
    lengths = parts if isinstance(parts, list) else [2] * 4
    weight = torch.randn(8, 3, dtype=torch.float64)

    def gradients(terms):
        leaves = [tensor.clone().requires_grad_() for tensor in (mean, std)]
        torch.manual_seed(0)
        h = project(flat, *leaves, estimator, parts, terms).reshape(8, 3)
        losses = [piece.square().sum() for piece in (h * weight).split(lengths)]
        return h.detach(), torch.autograd.grad(sum(losses) / 4, leaves)

    h, (of_mean, of_std) = gradients(4)
    same, (expected_of_mean, reparameterized) = gradients(None)
    torch.testing.assert_close(h, same)
    torch.testing.assert_close(of_mean, expected_of_mean)
    pieces = zip((2 * h * weight**2).split(lengths), x.flatten(0, 1).split(lengths), strict=True)
    rows = [of_tokens.T @ tokens for of_tokens, tokens in pieces]
    torch.testing.assert_close(of_std, std * torch.stack(rows).square().mean(0))
    assert not torch.allclose(of_std, reparameterized)


def test_fisher_has_the_expectation_of_the_other_estimate_and_less_noise():
    """Logistic regression: with labels from the model the Fisher is the Hessian, on which no label has an influence."""
    mean, std, x = layer(r=1, dtype=torch.float64)
    count, generator, found = 4000, torch.Generator().manual_seed(1), {}
    for terms in (None, count):
        gradients = []
        for _ in range(40):
            leaf = std.clone().requires_grad_()
            logits = project(x[:1, :1].expand(count, 1, -1), mean, leaf, "independent", squares=terms).flatten()
            uniform = torch.rand(count, generator=generator, dtype=torch.float64)
            labels = torch.zeros_like(uniform) if terms is None else (uniform < logits.sigmoid()).double()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            gradients.append(torch.autograd.grad(loss, leaf)[0])
        found[terms] = torch.stack(gradients)
    squares, products = found[count], found[None]
    error = ((squares.var(0) + products.var(0)) / len(squares)).sqrt()
    assert ((squares.mean(0) - products.mean(0)).abs() < 4 * error).all()
    assert (products.var(0) > 10 * squares.var(0)).all()


class LargeTensors(TorchDispatchMode):
    """Counts the results with at least ``numel`` elements that don't share the input's memory."""

    def __init__(self, x):
        super().__init__()
        self.storage, self.numel, self.found = x.untyped_storage().data_ptr(), x.numel(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            large = isinstance(tensor, torch.Tensor) and tensor.numel() >= self.numel
            if large and tensor.untyped_storage().data_ptr() != self.storage:
                self.found.append(str(func))
        return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_tensor_of_batch_by_tokens_by_features_is_made(estimator):
    r, n, b, t = 4, 32, 6, 50
    mean, std = (torch.randn(r, n).abs().requires_grad_() for _ in range(2))
    x = torch.randn(b, t, n)
    with LargeTensors(x) as mode:
        project(x, mean, std, estimator).sum().backward()
    assert mode.found == []

"""The Gaussian against torch.distributions, Monte Carlo, and the paper's two theorems."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as reference_kl

from bloblora import posterior as q

PARAMETERIZATIONS = ["square", "softplus", "log"]


def make(shape=(3, 5), dtype=torch.float64, parameterization="square"):
    mean = torch.randn(shape, dtype=dtype) * 0.3
    parameter = torch.rand(shape, dtype=dtype) * 0.4 + 0.1
    return mean, parameter if parameterization == "square" else parameter - 1.5


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_kl_equals_torch_distributions(parameterization):
    layers = [
        make((3, 5), parameterization=parameterization),
        make((2, 7), parameterization=parameterization),
    ]
    ours = q.kl_divergence([m for m, _ in layers], [p for _, p in layers], 0.2, parameterization)
    expected = sum(
        reference_kl(Normal(m, q.std(p, parameterization)), Normal(0 * m, 0 * m + 0.2)).sum() for m, p in layers
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_kl_equals_monte_carlo_within_four_standard_errors():
    mean, parameter = make((2, 3))
    posterior, prior = Normal(mean, q.std(parameter)), Normal(0.0, 0.2)
    draws = posterior.sample((200_000,))
    terms = (posterior.log_prob(draws) - prior.log_prob(draws)).sum((1, 2))
    error = terms.std() / math.sqrt(len(terms))
    assert abs(q.kl_divergence([mean], [parameter], 0.2) - terms.mean()) < 4 * error


def test_kl_is_zero_at_the_prior_and_float32_for_bfloat16():
    parameter = torch.full((4, 4), math.sqrt(0.2))
    kl = q.kl_divergence([torch.zeros(4, 4, dtype=torch.bfloat16)], [parameter], 0.2)
    assert kl.dtype == torch.float32
    assert abs(kl.item()) < 1e-5


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_kl_gradient_against_finite_differences(parameterization):
    mean, parameter = (t.requires_grad_() for t in make((2, 3), parameterization=parameterization))
    assert torch.autograd.gradcheck(
        lambda m, p: q.kl_divergence([m], [p], 0.2, parameterization), (mean, parameter), eps=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_closed_form_gradients_are_autograds(parameterization):
    layers = [make((3, 5), parameterization=parameterization), make((2, 7), parameterization=parameterization)]
    means, parameters = ([*side] for side in zip(*layers, strict=True))
    parameters[0][0, 0] *= -1  # G may have either sign
    found = q.kl_gradients(means, parameters, 0.2, parameterization)
    leaves = [tensor.clone().requires_grad_() for tensor in (*means, *parameters)]
    expected = torch.autograd.grad(q.kl_divergence(leaves[:2], leaves[2:], 0.2, parameterization), leaves)
    torch.testing.assert_close(found, [*expected], rtol=1e-10, atol=0)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_std_starts_between_half_of_init_std_and_all_of_it(parameterization):
    std = q.std(q.init_std_parameter(torch.zeros(200, 200), 0.05**2, parameterization), parameterization)
    assert std.min() >= 0.05**2 / 2 * 0.999
    assert std.max() <= 0.05**2 * 1.001
    # G = √Ω is uniform with ε = 0.05: its mean is ε (1 + 1/√2) / 2, its standard error ε (1 - 1/√2) / √12 / 200
    roots = std.sqrt()
    assert abs(roots.mean() - 0.05 * (1 + math.sqrt(0.5)) / 2) < 4 * 0.05 * (1 - math.sqrt(0.5)) / math.sqrt(12) / 200


def test_log_std_survives_where_std_underflows():
    assert q.log_std(torch.tensor(1e-30)).item() == pytest.approx(2 * math.log(1e-30), rel=1e-6)
    assert q.log_std(torch.tensor(-120.0), "softplus").item() == pytest.approx(-120.0)


def test_sample_has_the_posteriors_moments_and_is_repeatable():
    mean, parameter = make((2, 3), torch.float32)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([q.sample(mean, parameter, "square", generator) for _ in range(20_000)])
    std = q.std(parameter)
    assert ((draws.mean(0) - mean).abs() < 5 * std / math.sqrt(len(draws))).all()
    assert ((draws.std(0) / std - 1).abs() < 5 / math.sqrt(2 * len(draws))).all()
    torch.testing.assert_close(q.sample(mean, parameter, "square", torch.Generator().manual_seed(0)), draws[0])


def full_weight_moments(w0, b, mean, std, scale):
    """Mean and covariance of vec(W), column-major as in the paper: vec(B A) = (I_n ⊗ B) vec(A)."""
    n = mean.shape[1]
    lift = scale * torch.kron(torch.eye(n, dtype=b.dtype), b)
    vec = lambda matrix: matrix.T.reshape(-1)  # noqa: E731
    return vec(w0) + lift @ vec(mean), lift @ torch.diag(vec(std) ** 2) @ lift.T, lift


def test_theorem_1_covariance_of_the_full_weight():
    r, n, m, scale = 2, 3, 4, 2.0
    mean, parameter = make((r, n))
    std, w0, b = q.std(parameter), torch.randn(m, n).double(), torch.randn(m, r).double()
    expected_mean, expected_cov, _ = full_weight_moments(w0, b, mean, std, scale)
    generator = torch.Generator().manual_seed(0)
    a = torch.stack([q.sample(mean, parameter, "square", generator) for _ in range(100_000)])
    draws = (w0 + scale * b @ a).mT.reshape(len(a), -1)
    variances = expected_cov.diagonal()
    assert ((draws.mean(0) - expected_mean).abs() < 5 * (variances / len(a)).sqrt()).all()
    # standard error of a Gaussian's sample covariance: sqrt((C_ii C_jj + C_ij²) / N)
    error = ((torch.outer(variances, variances) + expected_cov**2) / len(a)).sqrt()
    assert ((torch.cov(draws.T) - expected_cov).abs() < 5 * error + 1e-12).all()


def test_theorem_2_kl_in_full_weight_space_equals_kl_of_a():
    """With the matching low-rank prior; the degenerate Gaussians are compared in the column space of (I ⊗ B)."""
    r, n, m, scale, prior_std = 2, 3, 4, 2.0, 0.2
    mean, parameter = make((r, n))
    std, w0, b = q.std(parameter), torch.randn(m, n).double(), torch.randn(m, r).double()
    q_mean, q_cov, lift = full_weight_moments(w0, b, mean, std, scale)
    p_mean, p_cov, _ = full_weight_moments(w0, b, torch.zeros_like(mean), torch.full_like(std, prior_std), scale)
    basis = torch.linalg.svd(lift, full_matrices=False).U
    project = lambda mu, cov: MultivariateNormal(basis.T @ mu, basis.T @ cov @ basis)  # noqa: E731
    full = reference_kl(project(q_mean - p_mean, q_cov), project(p_mean - p_mean, p_cov))
    torch.testing.assert_close(full, q.kl_divergence([mean], [parameter], prior_std), rtol=1e-8, atol=0)


def test_kl_flow_is_gradient_descent_in_many_small_steps():
    """Against 20,000 steps of autograd's gradient of torch's own KL, from below, near and above the prior."""
    mean = torch.tensor([0.3, -0.1] * 3, dtype=torch.float64)
    g = torch.tensor([0.05, -0.05, 0.447, -0.447, 0.8, -0.8], dtype=torch.float64)
    time, steps = 0.02, 20_000
    m, p = mean.clone().requires_grad_(), g.clone().requires_grad_()
    for _ in range(steps):
        kl = reference_kl(Normal(m, p.square()), Normal(0 * m, 0 * m + 0.2)).sum()
        gradients = torch.autograd.grad(kl, (m, p))
        with torch.no_grad():
            for parameter, gradient in zip((m, p), gradients, strict=True):
                parameter -= time / steps * gradient
    q.kl_flow_([mean], [g], 0.2, time)
    torch.testing.assert_close(mean, m.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(g, p.detach(), rtol=1e-4, atol=0)


def test_kl_flow_for_ever_is_the_prior():
    mean, g = make()
    q.kl_flow_([mean], [g], 0.2, 1e6)
    assert q.kl_divergence([mean], [g], 0.2).item() == pytest.approx(0, abs=1e-12)

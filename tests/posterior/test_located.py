"""A prior with a mean and a width of its own for each entry."""

import math

import pytest
import torch
from torch.distributions import Laplace, Normal, StudentT, kl_divergence

from bloblora import posterior as q
from bloblora.posterior import STD_PARAMETERIZATIONS, LocatedPrior, build_prior

SHAPES = [(2, 3), (4, 2)]


def case(parameterization, stds=(0.02, 0.6)):
    """Means, Ω parameters, and a prior's means and widths, float64."""
    generator = torch.Generator().manual_seed(5)
    normal = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES] for _ in range(2)]
    uniform = [[torch.rand(s, generator=generator, dtype=torch.float64) for s in SHAPES] for _ in range(2)]
    low, high = map(math.log, stds)
    of_posterior, of_prior = ([(low + (high - low) * u).exp() for u in layers] for layers in uniform)
    return normal[0], [q.std_parameter(s, parameterization) for s in of_posterior], normal[1], of_prior


@pytest.mark.parametrize("parameterization", STD_PARAMETERIZATIONS)
def test_the_parameter_of_a_width_is_the_inverse(parameterization):
    stds = torch.tensor([1e-9, 1e-3, 0.2, 5.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(q.std(q.std_parameter(stds, parameterization), parameterization), stds)


@pytest.mark.parametrize("prior_std", [0.2, 3.0])
@pytest.mark.parametrize("parameterization", STD_PARAMETERIZATIONS)
def test_the_kl_is_that_of_torch(parameterization, prior_std):
    means, parameters, prior_means, prior_stds = case(parameterization)
    prior = LocatedPrior(build_prior("normal", prior_std), prior_means, prior_stds)
    expected = sum(
        kl_divergence(Normal(m, q.std(p, parameterization)), Normal(mu, s)).sum()
        for m, p, mu, s in zip(means, parameters, prior_means, prior_stds, strict=True)
    )
    torch.testing.assert_close(prior.kl(means, parameters, parameterization), expected)


@pytest.mark.parametrize("family", ["normal", "laplace", "student_t", "learned_normal"])
@pytest.mark.parametrize("parameterization", STD_PARAMETERIZATIONS)
def test_gradients_are_those_of_autograd(parameterization, family):
    means, parameters, prior_means, prior_stds = case(parameterization)
    prior = LocatedPrior(build_prior(family, 0.2), prior_means, prior_stds)
    leaves = [tensor.clone().requires_grad_() for tensor in (*means, *parameters)]
    torch.manual_seed(0)
    expected = torch.autograd.grad(prior.kl(leaves[:2], leaves[2:], parameterization), leaves)
    torch.manual_seed(0)
    for found, gradient in zip(prior.kl_gradients(means, parameters, parameterization), expected, strict=True):
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("parameterization", STD_PARAMETERIZATIONS)
def test_the_kl_passes_gradcheck(parameterization):
    means, parameters, prior_means, prior_stds = case(parameterization)
    prior = LocatedPrior(build_prior("normal", 0.2), prior_means, prior_stds)
    leaves = [tensor.requires_grad_() for tensor in (*means, *parameters)]
    assert torch.autograd.gradcheck(lambda *t: prior.kl([*t[:2]], [*t[2:]], parameterization), leaves)


@pytest.mark.parametrize(
    ("family", "density"),
    [
        ("laplace", lambda mu, s: Laplace(mu, s / math.sqrt(2))),
        ("student_t", lambda mu, s: StudentT(4.0, mu, s / math.sqrt(2))),
    ],
)
def test_other_families_are_moved_and_scaled(family, density):
    """Against the integral of q log q/p over a grid."""
    mean, std, mu, s = (torch.tensor([x], dtype=torch.float64) for x in (0.7, 0.3, -0.4, 0.9))
    grid = torch.linspace(-4, 5, 200_001, dtype=torch.float64)
    posterior = Normal(mean, std)
    integrand = posterior.log_prob(grid).exp() * (posterior.log_prob(grid) - density(mu, s).log_prob(grid))
    expected = torch.trapezoid(integrand, grid).item()
    prior = LocatedPrior(build_prior(family, 0.2, {"num_pairs": 100_000}), [mu], [s])
    assert prior.kl([mean], [std.log()], "log").item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("family", ["normal", "laplace"])
def test_a_long_flow_ends_near_the_prior(family):
    means, parameters, prior_means, prior_stds = case("square", (0.1, 0.4))
    prior = LocatedPrior(build_prior(family, 0.2), prior_means, prior_stds)
    before = prior.kl(means, parameters)
    for _ in range(1 if family == "normal" else 4000):
        prior.flow_(means, parameters, 10.0 if family == "normal" else 1e-3)
    if family == "laplace":
        assert prior.kl(means, parameters) < min(before / 20, 1.0)
        return
    for m, g, mu, s in zip(means, parameters, prior_means, prior_stds, strict=True):
        torch.testing.assert_close(m, mu)
        torch.testing.assert_close(g.square(), s)


def test_the_flow_of_a_prior_that_is_only_moved():
    means, parameters, prior_means, _ = case("square")
    expected = [[m - mu for m, mu in zip(means, prior_means, strict=True)], [p.clone() for p in parameters]]
    q.kl_flow_(*expected, 0.2, 3e-3)
    widths = [torch.full_like(mu, 0.2) for mu in prior_means]
    LocatedPrior(build_prior("normal", 0.2), prior_means, widths).flow_(means, parameters, 3e-3)
    for m, g, moved, flowed, mu in zip(means, parameters, *expected, prior_means, strict=True):
        torch.testing.assert_close(m, moved + mu)
        torch.testing.assert_close(g, flowed)

"""The priors against scipy's densities and quadrature, torch's KLs, and gradient descent in many small steps."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Laplace, Normal, StudentT
from torch.distributions import kl_divergence as reference_kl

from bloblora.posterior import (
    PRIORS,
    LaplacePrior,
    LearnedNormalPrior,
    NormalPrior,
    Prior,
    ScaleMixturePrior,
    StudentTPrior,
    kl_divergence,
)

SIGMA = 0.2
FIXED = sorted(set(PRIORS) - {"learned_normal"})
POSTERIORS = [(0.0, 0.02), (0.05, 0.05), (-0.3, 0.1), (0.1, 0.3)]


def mixture_pdf(x):
    # π = ¼, σ2 = ¼ σp; ¼ σ1² + ¾ (0.05)² = 0.04
    return 0.25 * stats.norm.pdf(x, scale=math.sqrt(0.1525)) + 0.75 * stats.norm.pdf(x, scale=0.05)


DENSITIES = {
    "normal": stats.norm(scale=0.2).pdf,
    "laplace": stats.laplace(scale=0.2 / math.sqrt(2)).pdf,
    "student_t": stats.t(4, scale=0.2 * math.sqrt(2 / 4)).pdf,
    "scale_mixture": mixture_pdf,
}


def quadrature_kl(name, m, omega):
    q = stats.norm(m, omega)
    integrand = lambda a: q.pdf(a) * (q.logpdf(a) - np.log(DENSITIES[name](a)))  # noqa: E731
    return integrate.quad(integrand, m - 12 * omega, m + 12 * omega, points=[0.0, m], epsabs=1e-11, limit=500)[0]


def entries(m, omega, count=1):
    """M and G of ``count`` like entries."""
    return torch.full((count,), m, dtype=torch.float64), torch.full((count,), math.sqrt(omega), dtype=torch.float64)


def layers():
    means = [0.3 * torch.randn(3, 5, dtype=torch.float64), 0.01 * torch.randn(2, 4, dtype=torch.float64)]
    return means, [0.1 + 0.4 * torch.rand_like(mean) for mean in means]


@pytest.mark.parametrize("name", FIXED)
def test_log_prob_equals_scipy(name):
    values = torch.linspace(-3, 3, 61, dtype=torch.float64)
    expected = torch.from_numpy(np.log(DENSITIES[name](values.numpy())))
    torch.testing.assert_close(PRIORS[name](SIGMA).log_prob(values), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FIXED)
def test_standard_deviation_is_prior_std(name):
    second_moment = integrate.quad(lambda a: a**2 * DENSITIES[name](a), -np.inf, np.inf, limit=500)[0]
    assert math.sqrt(second_moment) == pytest.approx(SIGMA, rel=1e-6)


@pytest.mark.parametrize("name", FIXED)
def test_samples_have_the_density(name):
    """Shares of draws below five values, within five binomial standard errors."""
    draws = PRIORS[name](SIGMA).sample((400, 500), torch.Generator().manual_seed(0))
    assert draws.shape == (400, 500)
    assert draws.dtype == torch.float32
    for x in (-0.5, -0.1, 0.0, 0.03, 0.3):
        share = integrate.quad(DENSITIES[name], -np.inf, x, limit=500)[0]
        error = math.sqrt(share * (1 - share) / draws.numel())
        assert abs((draws < x).double().mean().item() - share) < 5 * error


@pytest.mark.parametrize(("m", "omega"), POSTERIORS)
@pytest.mark.parametrize("name", ["normal", "laplace"])
def test_closed_form_kl_equals_quadrature(name, m, omega):
    m_, g = entries(m, omega)
    assert PRIORS[name](SIGMA).kl([m_], [g]).item() == pytest.approx(quadrature_kl(name, m, omega), rel=1e-8)


@pytest.mark.parametrize(("m", "omega"), POSTERIORS)
@pytest.mark.parametrize("num_pairs", [1, 3])
@pytest.mark.parametrize("name", ["student_t", "scale_mixture"])
def test_sampled_kl_equals_quadrature_within_five_standard_errors(name, num_pairs, m, omega):
    m_, g = entries(m, omega, 500)
    kls = torch.stack([PRIORS[name](SIGMA, num_pairs).kl([m_], [g]) for _ in range(200)]) / 500
    assert abs(kls.mean() - quadrature_kl(name, m, omega)) < 5 * kls.std() / math.sqrt(200)


@pytest.mark.parametrize("parameterization", ["square", "softplus", "log"])
def test_kl_of_several_layers_equals_torch_distributions(parameterization):
    means, parameters = layers()
    std = {"square": torch.square, "softplus": lambda p: p.exp().log1p(), "log": torch.exp}[parameterization]
    stds = [std(p) for p in parameters]
    for name, reference in (("normal", Normal), ("laplace", Laplace)):
        scale = SIGMA if name == "normal" else SIGMA / math.sqrt(2)
        expected = sum(
            reference_kl(Normal(m, s), reference(0 * m, 0 * m + scale)).sum() for m, s in zip(means, stds, strict=True)
        )
        ours = PRIORS[name](SIGMA).kl(means, parameters, parameterization)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def variance(draws):
    """The sample variance and its standard error."""
    squares = (draws - draws.mean()).square()
    return squares.mean(), squares.std() / math.sqrt(len(draws))


@pytest.mark.parametrize(("omega", "lower"), [(0.02, True), (0.1, True), (0.2, False)])
@pytest.mark.parametrize("name", ["student_t", "scale_mixture"])
def test_variance_against_the_naive_estimate(name, omega, lower):
    """log q(a) - log p(a) at the same pairs: worse for a posterior narrower than the prior, better for one as wide."""
    prior, count = PRIORS[name](SIGMA), 50_000
    mean, g = entries(0.1, omega, count)
    posterior = Normal(mean, g.square())
    noise = torch.randn_like(mean) * g.square()
    naive = sum(posterior.log_prob(a) - prior.log_prob(a) for a in (mean + noise, mean - noise)) / 2
    (ours, our_error), (theirs, their_error) = variance(prior.cross_entropy(mean, g.square())), variance(naive)
    assert ((theirs - ours) * (1 if lower else -1)) > 5 * math.hypot(our_error, their_error)


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_kl_gradient_against_finite_differences(name):
    means, parameters = layers()

    def kl(*tensors):
        torch.manual_seed(0)
        return PRIORS[name](SIGMA).kl(list(tensors[:2]), list(tensors[2:]))

    leaves = [tensor.requires_grad_() for tensor in (*means, *parameters)]
    assert torch.autograd.gradcheck(kl, leaves, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_kl_is_float32_for_bfloat16_means_and_finite_for_narrow_posteriors(name):
    mean = torch.tensor([0.0, 0.5], dtype=torch.bfloat16).requires_grad_()
    g = torch.tensor([1e-8, 1e-8]).requires_grad_()
    kl = PRIORS[name](SIGMA).kl([mean], [g])
    kl.backward()
    assert kl.dtype == torch.float32
    assert kl.isfinite()
    assert mean.grad.isfinite().all()
    assert g.grad.isfinite().all()


def descend(kl, tensors, time, steps):
    """Gradient descent on copies of the tensors."""
    copies = [tensor.clone().requires_grad_() for tensor in tensors]
    for _ in range(steps):
        gradients = torch.autograd.grad(kl(*copies), copies)
        with torch.no_grad():
            for tensor, gradient in zip(copies, gradients, strict=True):
                tensor -= time / steps * gradient
    return [copy.detach() for copy in copies]


NODES = torch.linspace(-8, 8, 401, dtype=torch.float64)[:, None]
WEIGHTS = Normal(0.0, 1.0).log_prob(NODES).exp() * 16 / 400


def torch_kl(name, mean, g):
    """Differentiable KL: torch's own for Laplace, else by the trapezoid rule on torch's densities."""
    posterior, values = Normal(mean, g.square()), mean + g.square() * NODES
    if name == "laplace":
        return reference_kl(posterior, Laplace(0 * mean, 0 * mean + SIGMA / math.sqrt(2))).sum()
    if name == "student_t":
        log_prior = StudentT(4.0, 0.0, SIGMA * math.sqrt(0.5)).log_prob(values)
    else:
        slab, spike = (Normal(0.0, s).log_prob(values).exp() for s in (math.sqrt(0.1525), 0.05))
        log_prior = (slab / 4 + 3 * spike / 4).log()
    return -(WEIGHTS * log_prior).sum() - posterior.entropy().sum()


@pytest.mark.parametrize("name", ["laplace", "student_t", "scale_mixture"])
def test_flow_is_gradient_descent_in_many_small_steps(name):
    mean = torch.tensor([0.3, -0.1, 0.02], dtype=torch.float64)
    g = torch.tensor([0.05, -0.3, 0.6], dtype=torch.float64)
    expected = descend(lambda m, p: torch_kl(name, m, p), [mean, g], 0.004, 1_000)
    prior = PRIORS[name](SIGMA, num_pairs=10_000)
    for _ in range(40):
        prior.flow_([mean], [g], 1e-4)
    torch.testing.assert_close([mean, g], expected, rtol=5e-3, atol=2e-4)


def test_learned_flow_is_gradient_descent_on_the_kl_at_the_best_std_of_each_layer():
    means, parameters = layers()

    def kl(*tensors):
        total = 0.0
        for m, g in zip(tensors[:2], tensors[2:], strict=True):
            best = (g.square().square() + m.square()).mean().sqrt()
            total = total + reference_kl(Normal(m, g.square()), Normal(0 * m, best.expand_as(m))).sum()
        return total

    expected = descend(kl, [*means, *parameters], 0.002, 1_000)
    for _ in range(100):
        LearnedNormalPrior().flow_(means, parameters, 2e-5)
    torch.testing.assert_close([*means, *parameters], expected, rtol=2e-3, atol=1e-5)


def test_learned_stds_minimize_the_kl():
    means, parameters = layers()
    best = LearnedNormalPrior().stds(means, parameters).tolist()
    at_best = sum(kl_divergence([m], [p], s) for m, p, s in zip(means, parameters, best, strict=True))
    torch.testing.assert_close(LearnedNormalPrior().kl(means, parameters), at_best, rtol=1e-12, atol=0)
    for factor in (0.99, 1.01):
        near = sum(kl_divergence([m], [p], factor * s) for m, p, s in zip(means, parameters, best, strict=True))
        # second derivative of a layer's KL by log σ is 2n: n = 15 + 8 entries together
        assert (near - at_best).item() == pytest.approx(23 * math.log(factor) ** 2, rel=0.02)


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_flow_from_the_papers_start_decreases_the_kl_and_stays(name):
    """1,000 steps of t = 1e-3 in float32 with the default noise."""
    mean, g = (torch.rand(8, 64) - 0.5) * 0.6, 0.05 * (1 - 0.29 * torch.rand(8, 64))
    prior, exact = PRIORS[name](SIGMA), PRIORS[name](SIGMA, num_pairs=500)
    kls = [exact.kl([mean], [g]).item()]
    for _ in range(2):
        for _ in range(500):
            prior.flow_([mean], [g], 1e-3)
        kls.append(exact.kl([mean], [g]).item())
    assert kls[1] < 0.1 * kls[0]
    assert mean.abs().max() < 1e-3
    assert kls[2] < 1.1 * kls[1] + 1
    assert g.square().max() < 4 * SIGMA


def test_flow_keeps_the_sign_of_g_and_leaves_no_gradient():
    mean, g = torch.zeros(2, requires_grad=True), torch.tensor([0.1, -0.1], requires_grad=True)
    LaplacePrior(SIGMA).flow_([mean], [g], 1e-3)
    assert g[0] > 0.1
    assert g[1] < -0.1
    assert mean.grad is None
    assert g.grad is None
    assert g.is_leaf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalPrior(0.0), r"prior_std is 0\.0; it must be positive"),
        (lambda: StudentTPrior(num_pairs=0), "num_pairs is 0; it must be at least 1"),
        (lambda: StudentTPrior(degrees_of_freedom=2), "degrees_of_freedom is 2; it must be above 2"),
        (lambda: ScaleMixturePrior(slab_weight=1.0), r"slab_weight is 1\.0; it must be between 0 and 1"),
        (lambda: ScaleMixturePrior(spike_ratio=1.5), r"spike_ratio is 1\.5; it must be between 0 and 1"),
    ],
)
def test_errors_name_field_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_density_that_is_summed_already_is_refused():
    """One number for all entries would be counted once for each."""

    class Summed(LaplacePrior):
        cross_entropy = Prior.cross_entropy

        def log_prob(self, values):
            return super().log_prob(values).sum()

    with pytest.raises(ValueError, match=r"Summed\.log_prob.* gives values of shape \(\) for 2 entries"):
        Summed(SIGMA).kl([torch.zeros(2)], [torch.ones(2)])


def test_learned_normal_has_no_density_of_its_own():
    with pytest.raises(NotImplementedError, match="without a posterior"):
        LearnedNormalPrior().log_prob(torch.zeros(2))

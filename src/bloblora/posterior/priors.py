r"""Priors over the entries of LoRA's A, all of one shape: ``PRIORS[name](prior_std)``.

``prior_std`` σp is the standard deviation of every prior, so that they differ in shape and not in size. With
:math:`q = \mathcal N(M, \Omega^2)` the entropy is always exact, and the cross-entropy where it has a closed form:

.. math:: \mathrm{KL}(q\|p) = \mathbb E_q[-\log p(A)] - \sum_{ij}\big[\log\Omega_{ij} + \tfrac12\log 2\pi e\big]

- ``normal``: BLoB's (arXiv 2406.11675);
- ``laplace``, ``student_t``: heavier tails, as trained weights have (Fortuin et al., arXiv 2102.06571);
- ``scale_mixture``: a spike and a slab (Blundell et al., arXiv 1505.05424, eq. 7);
- ``learned_normal``: a Gaussian a layer, whose variance maximizes the ELBO (Graves, NeurIPS 2011, section 4.2).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..registry import Registry
from .gaussian import kl_divergence, kl_flow_, kl_gradients, log_std, stack, std


@dataclass(frozen=True)
class Prior(ABC):
    """A symmetric density, the same for every entry of A.

    Attributes:
        prior_std: σp > 0, its standard deviation; default BLoB's.
        num_pairs: pairs of noise E, -E a KL is averaged over, where it has no closed form.

    Raises:
        ValueError: a field is out of its range.
    """

    prior_std: float = 0.4
    num_pairs: int = 1

    def __post_init__(self) -> None:
        _require(0 < self.prior_std < math.inf, "prior_std", self.prior_std, "positive and finite")
        _require(self.num_pairs >= 1, "num_pairs", self.num_pairs, "at least 1")

    @abstractmethod
    def log_prob(self, values: Tensor) -> Tensor:
        """Log density of each value, in nats; shape of ``values``."""

    @abstractmethod
    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent draws, float32, on the generator's device."""

    def cross_entropy(self, mean: Tensor, std: Tensor) -> Tensor:
        r"""E[-log p(M + E∘Ω)] of each entry, in nats; shape of ``mean``, differentiable.

        By Monte Carlo over ``num_pairs`` pairs E, -E from torch's global generator, unless a prior overrides it.
        Beside the exact entropy this has less variance than log q - log p while Ω is well below σp (for a normal
        prior Ω < σp/√2), where LoRA's posteriors are; at q = p the other would have none (Roeder et al.,
        arXiv 1703.09194).
        """
        noise = torch.randn(self.num_pairs, *mean.shape, dtype=mean.dtype, device=mean.device) * std
        return -(self.log_prob(mean + noise) + self.log_prob(mean - noise)).mean(0) / 2

    def kl(self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str = "square") -> Tensor:
        """KL(q‖p) of all layers together; as `kl_divergence`: a scalar in nats, differentiable, in a few kernels.

        Args:
            means: M of each layer, any shapes.
            std_parameters: unconstrained parameter of each layer, shapes as ``means``.
            parameterization: one of ``STD_PARAMETERIZATIONS``.
        """
        mean, parameter = stack(means), stack(std_parameters)
        cross_entropy = self.cross_entropy(mean, std(parameter, parameterization))
        if cross_entropy.shape != mean.shape:  # one number for all would be counted once for each
            raise ValueError(
                f"{type(self).__name__}.log_prob, or its cross_entropy, gives values of shape "
                f"{tuple(cross_entropy.shape)} for {mean.numel()} entries; it must give one value an entry"
            )
        per_entry = cross_entropy - log_std(parameter, parameterization)
        return per_entry.sum() - mean.numel() * 0.5 * math.log(2 * math.pi * math.e)

    def kl_gradients(
        self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str = "square"
    ) -> list[Tensor]:
        """Gradients of `kl` with respect to each mean and then each unconstrained parameter, of their shapes."""
        leaves = [tensor.detach().requires_grad_() for tensor in (*means, *std_parameters)]
        with torch.enable_grad():
            kl = self.kl(leaves[: len(means)], leaves[len(means) :], parameterization)
        return [*torch.autograd.grad(kl, leaves)]

    def flow_(self, means: list[Tensor], std_parameters: list[Tensor], time: float) -> None:
        r"""Move a ``square`` posterior down the gradient of its KL for a while, in place.

        Lie splitting: the entropy's part exactly (:math:`\dot\Omega = 4`, which keeps Ω from 0), then one gradient
        step of size ``time`` on the cross-entropy, stable for ``time`` well below the square of the prior's width.

        Args:
            means: M of each layer, any shapes.
            std_parameters: G of each layer, shapes as ``means``.
            time: t ≥ 0, learning rate times weight of the KL.
        """
        with torch.no_grad():
            for g in std_parameters:
                g.copy_((g.square() + 4 * time).sqrt().copysign(g))
        leaves = [tensor.detach().requires_grad_() for tensor in (*means, *std_parameters)]
        with torch.enable_grad():
            mean, g = stack(leaves[: len(means)]), stack(leaves[len(means) :])
            gradients = torch.autograd.grad(self.cross_entropy(mean, std(g)).sum(), leaves)
        with torch.no_grad():
            torch._foreach_add_(leaves, gradients, alpha=-time)


@dataclass(frozen=True)
class NormalPrior(Prior):
    """N(0, σp²)."""

    def log_prob(self, values: Tensor) -> Tensor:
        """-a²/(2σp²) - log σp - ½ log 2π."""
        return _normal_log_prob(values, self.prior_std)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """σp E."""
        return self.prior_std * torch.randn(shape, generator=generator, device=generator.device)

    def kl(self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str = "square") -> Tensor:
        """Closed form: `kl_divergence`."""
        return kl_divergence(means, std_parameters, self.prior_std, parameterization)

    def kl_gradients(
        self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str = "square"
    ) -> list[Tensor]:
        """Closed form: `kl_gradients`."""
        return kl_gradients(means, std_parameters, self.prior_std, parameterization)

    def flow_(self, means: list[Tensor], std_parameters: list[Tensor], time: float) -> None:
        """Exact: `kl_flow_`."""
        kl_flow_(means, std_parameters, self.prior_std, time)


@dataclass(frozen=True)
class LearnedNormalPrior(Prior):
    """N(0, σp²) with the σp of each layer that minimizes its KL; ``prior_std`` isn't used."""

    def log_prob(self, values: Tensor) -> Tensor:
        """Raises NotImplementedError: without Ω the best σp follows the values to 0, and the density to infinity."""
        raise NotImplementedError(_NO_DENSITY)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Raises NotImplementedError: without a posterior there is no σp."""
        raise NotImplementedError(_NO_DENSITY)

    @torch.no_grad()
    def stds(self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str = "square") -> Tensor:
        """σp of each layer, √mean(Ω² + M²), where the derivative of the KL by σp is 0; shape (layers,)."""
        sizes = [mean.numel() for mean in means]
        roots = torch.hypot(stack(means), std(stack(std_parameters), parameterization))
        norms = torch.stack(list(torch._foreach_norm(roots.split(sizes))))
        return norms / norms.new_tensor(sizes).sqrt()

    def kl(self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str = "square") -> Tensor:
        """Σ log(σp/Ω)."""
        mean, parameter = stack(means), stack(std_parameters)
        sizes = torch.tensor([mean.numel() for mean in means], device=mean.device)
        prior = self.stds(means, std_parameters, parameterization).repeat_interleave(sizes)
        # The squares sum to σp² n and add only their gradient, which by the envelope theorem is that at a fixed σp.
        squares = std(parameter, parameterization).square() + mean.square()
        return (squares / (2 * prior.square()) - 0.5 + prior.log() - log_std(parameter, parameterization)).sum()

    def flow_(self, means: list[Tensor], std_parameters: list[Tensor], time: float) -> None:
        """`kl_flow_` with each layer's σp of the moment."""
        kl_flow_(means, std_parameters, self.stds(means, std_parameters).tolist(), time)


@dataclass(frozen=True)
class LaplacePrior(Prior):
    """Laplace(0, b), b = σp/√2."""

    @property
    def scale(self) -> float:
        """The scale b."""
        return self.prior_std / math.sqrt(2)

    def log_prob(self, values: Tensor) -> Tensor:
        """-|a|/b - log 2b."""
        return -values.abs() / self.scale - math.log(2 * self.scale)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """b times the difference of two exponentials."""
        first, second = torch.empty(2, *shape, device=generator.device).exponential_(generator=generator)
        return self.scale * (first - second)

    def cross_entropy(self, mean: Tensor, std: Tensor) -> Tensor:
        """Closed form: E|a| is the mean of the folded normal (Leone et al., Technometrics 1961)."""
        z = mean / (std * math.sqrt(2))
        folded = std * math.sqrt(2 / math.pi) * torch.exp(-z.square()) + mean * torch.erf(z)
        return folded / self.scale + math.log(2 * self.scale)


@dataclass(frozen=True)
class StudentTPrior(Prior):
    """Student's t with scale s = σp √((ν-2)/ν).

    Attributes:
        degrees_of_freedom: ν > 2, below which there is no σp; lower for heavier tails. Default 4, as in the robust
            models of Gelman et al. (Bayesian Data Analysis, 3rd edition, section 17.4).
    """

    degrees_of_freedom: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        nu = self.degrees_of_freedom
        _require(2 < nu < math.inf, "degrees_of_freedom", nu, "above 2, where the standard deviation is finite")

    @property
    def scale(self) -> float:
        """The scale s."""
        return self.prior_std * math.sqrt(1 - 2 / self.degrees_of_freedom)

    def log_prob(self, values: Tensor) -> Tensor:
        """-½(ν+1) log(1 + a²/(ν s²)) + log[Γ(½(ν+1)) / (Γ(½ν) √(νπ) s)]."""
        nu = self.degrees_of_freedom
        constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - math.log(math.sqrt(nu * math.pi) * self.scale)
        return constant - (nu + 1) / 2 * torch.log1p((values / self.scale).square() / nu)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """s √(ν (U^(-2/ν) - 1)) cos 2πV, with uniform U and V (Bailey, Mathematics of Computation 1994)."""
        nu = self.degrees_of_freedom
        u, v = 1 - torch.rand(2, *shape, generator=generator, device=generator.device)
        return self.scale * (nu * (u.pow(-2 / nu) - 1)).sqrt() * torch.cos(2 * math.pi * v)


@dataclass(frozen=True)
class ScaleMixturePrior(Prior):
    """π N(0, σ1²) + (1-π) N(0, σ2²): a wide slab and a narrow spike around 0, together of standard deviation σp.

    Blundell et al. search π in {¼, ½, ¾} and σ2 in e^-6 … e^-8. So narrow a spike would need KL steps below σ2² ≈ 1e-6.

    Attributes:
        slab_weight: π in (0, 1); default the least of theirs.
        spike_ratio: σ2/σp in (0, 1). By default σ2 = 0.1 at σp = 0.4: a step of 1e-3 is 0.1 σ2².
    """

    slab_weight: float = 0.25
    spike_ratio: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 < self.slab_weight < 1, "slab_weight", self.slab_weight, "between 0 and 1")
        _require(0 < self.spike_ratio < 1, "spike_ratio", self.spike_ratio, "between 0 and 1")

    @property
    def slab_std(self) -> float:
        """σ1, from π σ1² + (1-π) σ2² = σp²."""
        pi = self.slab_weight
        return self.prior_std * math.sqrt((1 - (1 - pi) * self.spike_ratio**2) / pi)

    @property
    def spike_std(self) -> float:
        """σ2."""
        return self.prior_std * self.spike_ratio

    def log_prob(self, values: Tensor) -> Tensor:
        """log[π N(a; 0, σ1²) + (1-π) N(a; 0, σ2²)]."""
        slab = _normal_log_prob(values, self.slab_std) + math.log(self.slab_weight)
        return torch.logaddexp(slab, _normal_log_prob(values, self.spike_std) + math.log1p(-self.slab_weight))

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """σ1 E with probability π, σ2 E otherwise."""
        in_slab = torch.rand(shape, generator=generator, device=generator.device) < self.slab_weight
        stds = torch.where(in_slab, self.slab_std, self.spike_std)
        return stds * torch.randn(shape, generator=generator, device=generator.device)


PRIORS: Registry[type[Prior]] = Registry(
    "bloblora.priors",
    {
        "normal": NormalPrior,
        "laplace": LaplacePrior,
        "student_t": StudentTPrior,
        "scale_mixture": ScaleMixturePrior,
        "learned_normal": LearnedNormalPrior,
    },
    lambda _, prior: None if isinstance(prior, type) and issubclass(prior, Prior) else "it isn't a class of Prior",
)
"""The priors by name."""


def build_prior(name: str, prior_std: float, shape: Mapping[str, Any] | None = None) -> Prior:
    """The prior of a name.

    Args:
        name: one of ``PRIORS``.
        prior_std: σp.
        shape: its shape parameters: the fields of its class beside ``prior_std``.

    Raises:
        ValueError: there is no such prior or shape parameter, or one is out of its range.
    """
    kind = PRIORS.find(name, "prior")
    known = [f.name for f in fields(kind) if f.name != "prior_std"]
    if unknown := sorted(set(shape or {}).difference(known)):
        raise ValueError(f"prior_kwargs: prior {name!r} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return kind(prior_std, **dict[str, Any](shape or {}))


_NO_DENSITY = "learned_normal has no density without a posterior; use NormalPrior with one of LearnedNormalPrior().stds"


def _normal_log_prob(values: Tensor, std: float) -> Tensor:
    return -(values / std).square() / 2 - math.log(std * math.sqrt(2 * math.pi))


def _require(holds: bool, field: str, value: float, right: str) -> None:
    if not holds:
        raise ValueError(f"{field} is {value}; it must be {right}")

r"""A prior with a mean μ and a standard deviation s of its own for each entry.

.. math:: p(A_{ij}) = \frac{\sigma_p}{s_{ij}}\, f\Big((A_{ij} - \mu_{ij})\,\frac{\sigma_p}{s_{ij}}\Big)

with f one of `bloblora.posterior.priors` and σp its standard deviation. The KL doesn't change under an affine map of
the weights, so that of :math:`\mathcal N(M, \Omega^2)` against p is that of
:math:`\mathcal N\big((M - \mu)\sigma_p/s,\ (\Omega\sigma_p/s)^2\big)` against f.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .gaussian import log_std
from .priors import Prior


@dataclass(frozen=True)
class LocatedPrior:
    """A prior that is moved and scaled entry by entry; its functions are those of `Prior`.

    Attributes:
        prior: f.
        means: μ of each layer, of the shapes of M.
        stds: s > 0 of each layer, of the same shapes.
    """

    prior: Prior
    means: list[Tensor]
    stds: list[Tensor]

    def kl(self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str = "square") -> Tensor:
        """KL(q‖p) of all layers together, in nats."""
        return self.prior.kl(*self._standardized(means, std_parameters, parameterization), "log")

    @torch.no_grad()
    def kl_gradients(
        self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str = "square"
    ) -> list[Tensor]:
        """Gradients of `kl` with respect to each mean and then each unconstrained parameter, by the chain rule."""
        gradients = self.prior.kl_gradients(*self._standardized(means, std_parameters, parameterization), "log")
        of_means = torch._foreach_mul(gradients[: len(means)], self._scales)
        of_log_stds = gradients[len(means) :]
        if parameterization == "square":  # ∂log Ω/∂G = 2/G
            torch._foreach_mul_(of_log_stds, 2)
            torch._foreach_div_(of_log_stds, std_parameters)
        elif parameterization == "softplus":
            of_log_stds = [
                g * p.sigmoid() / log_std(p, parameterization).exp()
                for g, p in zip(of_log_stds, std_parameters, strict=True)
            ]
        return [
            gradient.to(tensor.dtype)
            for gradient, tensor in zip((*of_means, *of_log_stds), (*means, *std_parameters), strict=True)
        ]

    @torch.no_grad()
    def flow_(self, means: list[Tensor], std_parameters: list[Tensor], time: float) -> None:
        """Move a ``square`` posterior down its KL for a while, in place; see `Prior.flow_`.

        Time is that of the standardized weights: entries with equal (M - μ)/s and Ω/s come equally far, whatever s.
        """
        scales = self._scales
        roots = torch._foreach_sqrt(scales)
        torch._foreach_sub_(means, self.means)
        torch._foreach_mul_(means, scales)
        torch._foreach_mul_(std_parameters, roots)
        self.prior.flow_(means, std_parameters, time)
        torch._foreach_div_(means, scales)
        torch._foreach_add_(means, self.means)
        torch._foreach_div_(std_parameters, roots)

    def _standardized(
        self, means: list[Tensor], std_parameters: list[Tensor], parameterization: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(M - μ)σp/s and log(Ω σp/s) of each layer, differentiable."""
        scales = self._scales
        log_stds = [log_std(parameter, parameterization) for parameter in std_parameters]
        centred = torch._foreach_mul(torch._foreach_sub(means, self.means), scales)
        return [*centred], [*torch._foreach_add(log_stds, torch._foreach_log(scales))]

    @cached_property
    def _scales(self) -> list[Tensor]:
        """σp/s of each layer."""
        return [*torch._foreach_mul(torch._foreach_reciprocal(self.stds), self.prior.prior_std)]

r"""The mean-field Gaussian over LoRA's A.

.. math:: q(A_{ij}) = \mathcal N(M_{ij}, \Omega_{ij}^2), \qquad p(A_{ij}) = \mathcal N(0, \sigma_p^2)

BLoB, arXiv 2406.11675, sections 3.1 and 3.2. M is LoRA's own ``lora_A``; the standard deviation Ω is a
function of an unconstrained tensor of the same shape (ρ, or G in the paper).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STD_PARAMETERIZATIONS = ("log", "softplus", "square")
"""``log``: Ω = exp ρ. ``softplus``: Ω = log(1 + exp ρ). ``square``: Ω = G∘G (the paper's)."""

_LOT = 32  # layers


def std(parameter: Tensor, parameterization: str = "square") -> Tensor:
    """Standard deviation Ω of the posterior.

    Args:
        parameter: unconstrained G or ρ, any shape.
        parameterization: one of ``STD_PARAMETERIZATIONS``.

    Returns:
        Ω > 0, the shape of ``parameter``.
    """
    if parameterization == "log":
        return parameter.exp()
    return parameter.square() if parameterization == "square" else F.softplus(parameter)


def log_std(parameter: Tensor, parameterization: str = "square") -> Tensor:
    """Logarithm of Ω without forming Ω where that would underflow; shape of ``parameter``."""
    if parameterization == "log":
        return parameter
    if parameterization == "square":
        return 2 * parameter.abs().log()
    return torch.where(parameter < -15, parameter, F.softplus(parameter).log())


def scaled(parameter: Tensor, factor: float, parameterization: str = "square") -> Tensor:
    """The unconstrained parameter of ``factor``·Ω, for a factor above 0; shape of ``parameter``."""
    if parameterization == "log":
        return parameter + math.log(factor)
    if parameterization == "square":
        return parameter * math.sqrt(factor)
    wide = factor * F.softplus(parameter)
    return wide + (-torch.expm1(-wide)).log()


@torch.no_grad()
def init_std_parameter(mean: Tensor, init_std: float, parameterization: str = "square") -> Tensor:
    """Fresh unconstrained parameter for a posterior around ``mean``.

    Ω starts in [``init_std``/2, ``init_std``], where √Ω is uniform: G in [ε/√2, ε] with ε² = ``init_std`` is the
    paper's start.

    Returns:
        A float32 (or wider) tensor of the shape and on the device of ``mean``.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    g = torch.empty_like(mean, dtype=dtype).uniform_(math.sqrt(init_std / 2), math.sqrt(init_std))
    if parameterization == "log":
        return 2 * g.log()
    return g if parameterization == "square" else torch.log(torch.expm1(g.square()))


def sample(mean: Tensor, std_parameter: Tensor, parameterization: str, generator: torch.Generator) -> Tensor:
    """One reparameterized draw A = M + E∘Ω, E ~ N(0, 1); shape and device of ``mean``.

    The noise is made on the generator's device and then moved, so that one seed is one draw everywhere.
    """
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return mean + noise.to(mean.device) * std(std_parameter, parameterization)


def kl_divergence(
    means: list[Tensor], std_parameters: list[Tensor], prior_std: float, parameterization: str = "square"
) -> Tensor:
    r"""Closed-form KL(q‖p) of all layers together.

    .. math:: \sum_{ij} \Big[\log\frac{\sigma_p}{\Omega_{ij}}
              + \frac{\Omega_{ij}^2 + M_{ij}^2}{2\sigma_p^2} - \tfrac12\Big]

    The layers are stacked in lots that fit a processor's cache: its cost is a few kernels a lot.

    Args:
        means: M of each layer, any shapes.
        std_parameters: unconstrained parameter of each layer, shapes as ``means``.
        prior_std: σp > 0.
        parameterization: one of ``STD_PARAMETERIZATIONS``.

    Returns:
        A scalar in nats, float32 or wider, differentiable.
    """
    count = sum(mean.numel() for mean in means)
    lots = [slice(start, start + _LOT) for start in range(0, len(means), _LOT)]
    parts = [_kl_of_stack(stack(means[lot]), stack(std_parameters[lot]), prior_std, parameterization) for lot in lots]
    return stack(parts).sum() + count * (math.log(prior_std) - 0.5)


@torch.no_grad()
def kl_gradients(
    means: list[Tensor], std_parameters: list[Tensor], prior_std: float, parameterization: str = "square"
) -> list[Tensor]:
    r"""Gradients of `kl_divergence`, in a third of the time that autograd takes.

    .. math:: \frac{\partial\mathrm{KL}}{\partial M} = \frac{M}{\sigma_p^2}, \qquad
              \frac{\partial\mathrm{KL}}{\partial\Omega} = \frac{\Omega}{\sigma_p^2} - \frac1\Omega

    Returns:
        With respect to each mean and then each unconstrained parameter, of their shapes.
    """
    precision = prior_std**-2
    if parameterization == "square":  # ∂KL/∂G = 2G³/σp² - 2/G
        slopes = [*torch._foreach_mul(std_parameters, std_parameters)]
        torch._foreach_mul_(slopes, std_parameters)
        torch._foreach_mul_(slopes, 2 * precision)
        torch._foreach_add_(slopes, torch._foreach_reciprocal(std_parameters), alpha=-2)
    elif parameterization == "log":  # ∂KL/∂ρ = Ω²/σp² - 1
        slopes = [*torch._foreach_exp(torch._foreach_mul(std_parameters, 2))]
        torch._foreach_mul_(slopes, precision)
        torch._foreach_sub_(slopes, 1)
    else:
        stds = [F.softplus(parameter) for parameter in std_parameters]
        slopes = [(s * precision - 1 / s) * p.sigmoid() for s, p in zip(stds, std_parameters, strict=True)]
    return [*torch._foreach_mul(means, precision), *slopes]


@torch.no_grad()
def kl_flow_(
    means: list[Tensor], std_parameters: list[Tensor], prior_std: float | Sequence[float], time: float
) -> None:
    r"""Move a ``square`` posterior down the gradient of its KL for a while, in place and exactly.

    Gradient descent with infinitely many, infinitely small steps, which never overshoots:
    :math:`\dot M = -M/\sigma_p^2` and, with :math:`\Omega = G^2`, :math:`\dot G = 2/G - 2G^3/\sigma_p^2`, so
    :math:`\dot\Omega = 4 - 4\Omega^2/\sigma_p^2`. Their solution at time t is

    .. math:: M e^{-t/\sigma_p^2}, \qquad \sigma_p\,\frac{\Omega + \sigma_p T}{\sigma_p + \Omega T},
              \quad T = \tanh(4t/\sigma_p)

    Args:
        means: M of each layer, any shapes.
        std_parameters: G of each layer, shapes as ``means``.
        prior_std: σp > 0, one for all layers or one a layer.
        time: t ≥ 0, learning rate times weight of the KL.
    """
    priors = list(prior_std) if isinstance(prior_std, Sequence) else [prior_std] * len(means)
    torch._foreach_mul_(means, [math.exp(-time / prior**2) for prior in priors])
    slopes = [math.tanh(4 * time / prior) for prior in priors]
    stds = torch._foreach_mul(std_parameters, std_parameters)
    below = torch._foreach_mul(stds, slopes)
    torch._foreach_add_(below, priors)
    torch._foreach_add_(stds, [prior * slope for prior, slope in zip(priors, slopes, strict=True)])
    torch._foreach_mul_(stds, priors)
    torch._foreach_div_(stds, below)
    torch._foreach_sqrt_(stds)
    for parameter, root in zip(std_parameters, stds, strict=True):
        torch.copysign(root, parameter, out=parameter)


def stack(tensors: list[Tensor]) -> Tensor:
    """All entries of all layers, one dimension, float32 or wider, on the first layer's device."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.cat([tensor.reshape(-1).to(dtype=dtype, device=tensors[0].device) for tensor in tensors])


def _kl_of_stack(mean: Tensor, parameter: Tensor, prior_std: float, parameterization: str) -> Tensor:
    """KL(q‖p) less its constant."""
    stds = std(parameter, parameterization)
    return (stds.dot(stds) + mean.dot(mean)) / (2 * prior_std**2) - log_std(parameter, parameterization).sum()

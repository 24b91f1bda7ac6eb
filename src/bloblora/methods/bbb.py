r"""Bayes by Backprop (Blundell et al., arXiv 1505.05424) on LoRA: full Bayesianization.

.. math:: A \sim \mathcal N(M_A, \Omega_A^2),\quad B \sim \mathcal N(M_B, \Omega_B^2),\qquad \Omega = \log(1 + e^\rho)

Their recipe: softplus, one draw of the weights a mini-batch, and one optimizer on the whole bound.
"""

from dataclasses import dataclass

from .blob import Blob


@dataclass(frozen=True, kw_only=True)
class Bbb(Blob):
    """Gaussians over A and B, trained jointly."""

    std_parameterization: str = "softplus"
    estimator: str = "shared"
    optimizer_style: str = "joint"

    name = "bbb"
    paper = "1505.05424"
    factors = "AB"

r"""Distance of what a head reads from what it read of the training data, a score of inputs out of scope.

With z an input's last hidden state, and means :math:`\mu_c` and one covariance Σ of the classes in training,

.. math:: \mathrm{mahalanobis}(z) = \min_c\ (z - \mu_c)^\top \Sigma^{-1} (z - \mu_c)

(Lee et al., arXiv 1807.03888, for the last layer), and with the mean :math:`\mu_0` and covariance
:math:`\Sigma_0` of all training data, whatever their class,

.. math:: \mathrm{relative\_mahalanobis}(z) = \mathrm{mahalanobis}(z) - (z - \mu_0)^\top \Sigma_0^{-1} (z - \mu_0)

(Ren et al., arXiv 2106.09022). Data without classes are one class, and have no relative distance: that of
language models (Ren et al., arXiv 2209.15558) is relative to a corpus of other text. The papers take the empirical
covariance; ours is shrunk towards a multiple of the identity (Ledoit & Wolf, J. Multivariate Analysis 2004), since few
records span few of the dimensions, and what is out of scope leaves the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DISTANCES = {"mahalanobis": "dist.", "relative_mahalanobis": "relative dist."}
"""The scores, and what tables call them."""

_LEAST_SHRINKAGE = 1e-6  # a handful of records may ask for none, and span no more than a few dimensions


@dataclass(frozen=True)
class Distance:
    """Gaussians of hidden states, of each class and of all together.

    Attributes:
        means: of the classes, (C, d).
        whitening: W (d, d) with WᵀW the inverse of the classes' common covariance.
        background_mean: of all, (d,).
        background_whitening: the same of the covariance of all, (d, d).
    """

    means: Tensor
    whitening: Tensor
    background_mean: Tensor
    background_whitening: Tensor

    @classmethod
    def fit(cls, states: Tensor, classes: Tensor | None = None) -> "Distance":
        """The Gaussians of training data.

        Args:
            states: (n, d), finite.
            classes: (n,), integers; None for data without.

        Raises:
            ValueError: fewer than two states, one that isn't finite, or no variance within the classes.
        """
        if states.ndim != 2 or len(states) < 2 or not states.isfinite().all():
            raise ValueError(f"states must be (n, d), n > 1, and finite, got {tuple(states.shape)}")
        z = states.double()
        groups = torch.zeros(len(z), dtype=torch.long) if classes is None else classes.unique(return_inverse=True)[1]
        counts = groups.bincount().unsqueeze(-1)
        means = torch.zeros(len(counts), z.shape[1], dtype=z.dtype).index_add(0, groups, z) / counts
        center = z.mean(0)
        whitenings = [_whitening(residuals) for residuals in (z - means[groups], z - center)]
        return cls(means.float(), whitenings[0].float(), center.float(), whitenings[1].float())

    def scores(self, states: Tensor) -> dict[str, Tensor]:
        """Squared distances of states (n, d) by name, (n,) float64 each; larger is farther from the training data."""
        z, white = states.double(), self.whitening.double()
        nearest = torch.cdist(z @ white.T, self.means.double() @ white.T).square().amin(-1)
        if len(self.means) == 1:
            return {"mahalanobis": nearest}
        background = ((z - self.background_mean) @ self.background_whitening.double().T).square().sum(-1)
        return {"mahalanobis": nearest, "relative_mahalanobis": nearest - background}


def _whitening(residuals: Tensor) -> Tensor:
    """W with WᵀW the inverse of the covariance of residuals (n, d) of mean 0, shrunk as Ledoit & Wolf do."""
    n, d = residuals.shape
    covariance = residuals.T @ residuals / n
    size = covariance.trace() / d
    if size == 0:
        raise ValueError("states: those of a class are all equal, so there is no distance; give more records")
    identity = torch.eye(d, dtype=residuals.dtype)
    spread = (covariance - size * identity).square().sum()
    # the sampling variance of the covariance's entries: the mean of ‖xxᵀ - S‖² over n
    error = (residuals.square().sum(-1).square().mean() - covariance.square().sum()) / n
    shrinkage = 1.0 if spread == 0 else min(1.0, max(_LEAST_SHRINKAGE, (error / spread).item()))
    factor = torch.linalg.cholesky((1 - shrinkage) * covariance + shrinkage * size * identity)
    return torch.linalg.solve_triangular(factor, identity, upper=False)

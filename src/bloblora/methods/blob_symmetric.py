r"""BLoB with Gaussians over both factors: the ablation of the asymmetric choice (arXiv 2406.11675, section 3.1).

.. math:: A \sim \mathcal N(M_A, \Omega_A^2), \qquad B \sim \mathcal N(M_B, \Omega_B^2)

The recipe is BLoB's; `bbb` is the same posterior with the recipe of Bayes by Backprop.
"""

from .blob import Blob


class BlobSymmetric(Blob):
    """Gaussians over A and B."""

    name = "blob-symmetric"
    factors = "AB"

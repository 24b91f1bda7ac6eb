r"""BLoB with the Gaussian over B instead of A: the ablation of which factor is Bayesian (arXiv 2406.11675).

.. math:: B \sim \mathcal N(M_B, \Omega_B^2), \qquad A \text{ a point}

B starts at 0 but its noise does not: at the first step an output has the variance s² Ω_B² (A x)², where BLoB's is 0.
"""

from .blob import Blob


class BlobB(Blob):
    """A Gaussian over B."""

    name = "blob-b"
    factors = "B"

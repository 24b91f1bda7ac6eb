r"""How the KL of one pass over the data is spread over its mini-batches.

The negative ELBO of a pass is :math:`\sum_i \mathrm{NLL}_i + \mathrm{KL}(q\|p)`; mini-batch i takes the share
:math:`\lambda_i` of the KL, :math:`\sum_{i=1}^K \lambda_i = 1`.
"""

import math

KL_WEIGHTINGS = ("uniform", "reweighted")


def kl_weight(position: int, num_batches: int, weighting: str) -> float:
    r"""Share λ_i of the KL that mini-batch ``position`` (1..K) of a pass of K takes.

    ``uniform``: 1/K. ``reweighted``: :math:`2^{i-1} / (2^K - 1)`, computed in log space (2^K overflows a float from
    K = 1024 on). The paper (arXiv 2406.11675, section 3.3) prints 2^i, with which a pass would count the KL twice.
    """
    if weighting == "uniform":
        return 1 / num_batches
    return math.exp((position - 1 - num_batches) * math.log(2) - math.log1p(-(2.0**-num_batches)))


def rescaled_dataset_size(size: float, gamma: float = 8.0) -> float:
    r"""The paper's pseudo data size :math:`\hat D = 100\, D^{\pi/\gamma}` (arXiv 2406.11675, appendix)."""
    return 100 * size ** (math.pi / gamma)

"""Accuracy, calibration and proper scores of predicted probabilities."""

from torch import Tensor
from torch.nn.functional import one_hot

from .checks import checked
from .reliability import confidence_bins


def metrics(log_probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> dict[str, float | int]:
    r"""Accuracy, calibration and proper scores of n predictions.

    - ``ece``: :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|` over equal-width bins of
      the top probability (Guo et al., arXiv 1706.04599); of one example, how far that is from 1 (right) or 0;
    - ``nll``: mean of -log p(target), nats; infinite where a target has probability 0;
    - ``brier``: mean over examples of :math:`\sum_c (p_c - 1[c = y])^2`, in [0, 2].

    Args:
        log_probabilities: (n, C), normalized; -inf for a class that an example lacks.
        targets: (n,), class indices.
        num_bins: bins of the ECE.

    Returns:
        ``accuracy``, ``ece``, ``nll``, ``brier``, ``num_examples``.

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    scores = example_scores(log_probabilities, targets)
    mean = {name: values.mean().item() for name, values in scores.items()}
    return {
        "accuracy": mean["accuracy"],
        "ece": confidence_bins(scores["confidence"], scores["accuracy"], num_bins).ece,
        "nll": mean["nll"],
        "brier": mean["brier"],
        "num_examples": len(targets),
    }


def example_scores(log_probabilities: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What metrics average: ``accuracy`` (1 or 0), ``nll``, ``brier`` and ``confidence`` of each example, (n,) float64.

    Args and errors as in `metrics`.
    """
    log_probabilities, targets = checked(log_probabilities, targets)
    probabilities = log_probabilities.exp()
    truth = one_hot(targets, probabilities.shape[1])
    return {
        "accuracy": (probabilities.argmax(-1) == targets).double(),
        "nll": 0 - log_probabilities.gather(1, targets[:, None])[:, 0],  # 0 - x, because -x would give -0.0
        "brier": (probabilities - truth).square().sum(-1),
        "confidence": probabilities.amax(-1),
    }

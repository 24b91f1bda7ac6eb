"""Groups of examples: by value, by rank, by tie."""

from torch import Tensor


def equal_width(values: Tensor, num_bins: int) -> Tensor:
    """Index of each value's bin, from 0: bin b is (b/bins, (b+1)/bins], and 0 lies in the first.

    Raises:
        ValueError: num_bins is below 1.
    """
    _check(num_bins)
    return (values * num_bins).ceil().long().clamp(1, num_bins) - 1


def equal_mass(values: Tensor, num_bins: int) -> Tensor:
    """Index of each value's bin, from 0, by rank: sizes differ by 1 at most; equal values may be parted.

    Raises:
        ValueError: num_bins is below 1.
    """
    _check(num_bins)
    return values.argsort().argsort() * num_bins // len(values)


def group_means(values: Tensor, group: Tensor) -> Tensor:
    """Each value replaced by the mean of its group, (n,)."""
    return (group.bincount(values) / group.bincount())[group]


def tie_means(values: Tensor, scores: Tensor) -> Tensor:
    """Each value replaced by the mean over the examples of the same score, (n,).

    It is what an example among equals has on average over their orders; so whatever is then sorted by score no
    longer depends on the order of the examples.
    """
    return group_means(values, scores.unique(return_inverse=True)[1])


def _check(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be 1 or more, got {num_bins}")

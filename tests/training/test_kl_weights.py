from fractions import Fraction

import pytest

from bloblora.training.arguments import kl_weight, rescaled_dataset_size


@pytest.mark.parametrize("num_batches", [1, 2, 7, 60])
def test_reweighted_against_exact_fractions(num_batches):
    for i in range(1, num_batches + 1):
        exact = Fraction(2 ** (i - 1), 2**num_batches - 1)
        assert kl_weight(i, num_batches, "reweighted") == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("weighting", ["uniform", "reweighted"])
@pytest.mark.parametrize("num_batches", [1, 3, 100, 5000])
def test_weights_of_a_pass_sum_to_one(weighting, num_batches):
    weights = [kl_weight(i, num_batches, weighting) for i in range(1, num_batches + 1)]
    assert sum(weights) == pytest.approx(1, rel=1e-12)


def test_a_pass_too_long_for_two_to_the_k():
    # 2^4999 / (2^5000 - 1) is a half but for 1 in 2^5000; 2^5000 overflows a float.
    assert kl_weight(5000, 5000, "reweighted") == pytest.approx(0.5, rel=1e-12)
    assert kl_weight(1, 5000, "reweighted") == 0  # 2^-5000 is below the smallest float
    assert kl_weight(17, 5000, "uniform") == 0.0002


@pytest.mark.parametrize(
    ("size", "gamma", "expected"),
    # By hand: 256^(π/8) = 2^π, and 2^π = 8.824977827; 100^(π/4) = 10^(π/2) = 37.221715.
    [(256, 8.0, 882.4977827), (100, 4.0, 3722.17104), (1, 8.0, 100.0)],
)
def test_rescaled_dataset_size(size, gamma, expected):
    assert rescaled_dataset_size(size, gamma) == pytest.approx(expected, rel=1e-6)

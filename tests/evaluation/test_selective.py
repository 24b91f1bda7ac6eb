"""Risk-coverage curves by hand, by every order of ties, and by scikit-learn's accuracy of the most confident."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from bloblora.evaluation import risk_coverage

RIGHT, WRONG = True, False


def curve(confidence, right):
    return risk_coverage(torch.tensor(confidence), torch.tensor(right))


def test_hand_computed_case():
    result = curve([0.6, 0.9, 0.7, 0.8], [WRONG, RIGHT, RIGHT, WRONG])
    assert result.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert result.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert result.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    # at least the stated share is answered: of 4 one at 25 %, two at 26 %
    assert [result.accuracy(share) for share in (0.01, 0.25, 0.26, 1)] == pytest.approx([1, 1, 0.5, 0.5])


def test_ties_are_the_mean_over_their_orders():
    right = [RIGHT, WRONG, WRONG, RIGHT]
    orders = list(permutations(right[:3]))
    expected = torch.tensor([[*order, right[3]] for order in orders]).logical_not().double().cumsum(1).mean(0)
    result = curve([0.8, 0.8, 0.8, 0.5], right)
    assert result.risk.tolist() == pytest.approx((expected / torch.arange(1, 5)).tolist())


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.booleans()), min_size=1), st.randoms())
def test_the_order_of_examples_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    one, other = (curve(*map(list, zip(*order, strict=True))) for order in (rows, shuffled))
    assert one.risk.tolist() == pytest.approx(other.risk.tolist())
    assert one.accuracy(1) == pytest.approx(sum(right for _, right in rows) / len(rows))


@pytest.mark.parametrize(("share", "k"), [(0.5, 10), (0.55, 11), (0.8, 16), (0.9, 18), (0.95, 19), (0.96, 20)])
def test_selective_accuracy_equals_scikit_learn_on_the_most_confident(share, k):
    generator = torch.Generator().manual_seed(0)
    confidence, answers, targets = torch.rand(20, generator=generator), torch.arange(20) % 3, torch.arange(20) % 2
    kept = confidence.topk(k).indices
    result = risk_coverage(confidence, answers == targets).accuracy(share)
    assert result == pytest.approx(accuracy_score(targets[kept], answers[kept]))


def test_no_wrong_answer_no_right_one_and_all_equally_sure():
    assert curve([0.9, 0.5], [RIGHT, RIGHT]).aurc == 0
    assert curve([0.9], [WRONG]).aurc == 1
    assert curve([0.9], [RIGHT]).accuracy(0.5) == 1
    equal = curve([0.7] * 4, [RIGHT, WRONG, RIGHT, RIGHT])
    assert equal.risk.tolist() == [0.25] * 4


def test_errors_name_what_is_wrong():
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"right must be bool, \(1,\) as confidence is, got torch\.int64, \(1,\)"):
        risk_coverage(one, torch.tensor([1]))
    with pytest.raises(ValueError, match="confidence: score 0 is NaN"):
        risk_coverage(one * torch.nan, one.bool())
    with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\], got 80"):
        risk_coverage(one, one.bool()).accuracy(80)

"""Label sets: by hand, against MAPIE where it is installed, and by the exact law of their coverage."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom

from bloblora.decision import LabelSets, fit_label_sets
from tests.decision.conftest import standard_error, truths

KINDS = ("lac", "aps", "raps")
ROWS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])


def sets(kind, threshold, probabilities=ROWS, **options):
    rule = LabelSets(0.9, threshold, 1, kind, **{"penalty": 0.1, "free_ranks": 1, **options})
    return rule.sets(probabilities).int().tolist()


def test_hand_computed_sets():
    assert sets("lac", 0.71) == [[1, 1, 0], [0, 1, 1]]  # 1 - p at most 0.71
    assert sets("lac", 0.45) == [[1, 0, 0], [0, 0, 1]]  # the first would be empty
    assert sets("aps", 0.81) == [[1, 1, 0], [0, 0, 1]]  # 0.5, 0.8, 1; 0.6, 0.9, 1
    assert sets("raps", 0.95) == [[1, 1, 0], [0, 0, 1]]  # 0.5, 0.9, 1.2; 0.6, 1.0, 1.2
    assert sets("raps", 1.01) == [[1, 1, 0], [0, 1, 1]]
    assert sets("raps", 1.01, free_ranks=3) == [[1, 1, 1], [1, 1, 1]]


def test_hand_computed_threshold():
    # scores of the right labels 0.1, …, 0.9; of 9 the ⌈10 · 0.8⌉ = 8th smallest, although 10 · 0.8 is rounded
    p = torch.arange(1, 10) / 10
    rule = fit_label_sets(torch.stack([1 - p, p], -1), torch.zeros(9, dtype=torch.long), 0.8, "lac")
    assert (rule.threshold, rule.num_examples) == (pytest.approx(0.8), 9)
    # Beta(8, 2) is below its 5 % quantile q: 9 q^8 - 8 q^9 = 0.05
    q = float(rule.promise.partition("and at least ")[2].split()[0])
    assert 9 * q**8 - 8 * q**9 == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_follows_its_law(kind):
    """Of m new labels the covered ones are beta-binomial (Angelopoulos & Bates, arXiv 2107.07511, section 3.2)."""
    n, m, level, splits = 50, 100, 0.9, 1500
    probabilities, labels = truths(n + m, 6, splits)
    covered = []
    for p, y in zip(probabilities, labels, strict=True):
        inside = fit_label_sets(p[:n], y[:n], level, kind).sets(p[n:])
        covered.append(inside.gather(1, y[n:, None]).sum().item())
    covered = np.array(covered)
    k = 46  # ⌈51 · 0.9⌉
    law, uncorrected = betabinom(m, k, n + 1 - k), betabinom(m, k - 1, n + 2 - k)
    error = law.std() / splits**0.5
    assert abs(covered.mean() - law.mean()) < 3 * error < abs(law.mean() - uncorrected.mean())
    for x in law.ppf([0.05, 0.25, 0.5, 0.75, 0.95]):
        expected = law.cdf(x)
        assert abs((covered <= x).mean() - expected) < 4 * standard_error(expected, splits)


@given(st.sampled_from(KINDS), st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_a_label_that_is_missing_never_enters_and_no_set_is_empty(kind, seed, level):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(60, 5, generator=generator)
    missing = torch.rand(60, 5, generator=generator) < 0.4
    missing[:, 0] = False
    probabilities = logits.masked_fill(missing, -torch.inf).softmax(-1)
    targets = probabilities.multinomial(1, generator=generator)[:, 0]
    rule = fit_label_sets(probabilities, targets, level, kind)
    inside = rule.sets(probabilities)
    assert not (inside & missing).any()
    assert inside.any(-1).all()
    assert inside.gather(1, probabilities.argmax(-1, keepdim=True)).all()
    # on its own calibration records a rule covers at least what it promises
    assert inside.gather(1, targets[:, None]).double().mean() >= level


def test_lac_equals_mapie_and_aps_its_sums():
    mapie = pytest.importorskip("mapie.classification")
    from mapie.conformity_scores.sets.aps import APSConformityScore
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """A classifier whose inputs are its probabilities."""

        def fit(self, x, y=None):
            self.classes_, self.n_features_in_ = np.arange(x.shape[1]), x.shape[1]
            return self

        def predict_proba(self, x):
            return x

        def predict(self, x):
            return x.argmax(-1)

    ((p, y),) = zip(*truths(400, 5, 1), strict=True)
    theirs = mapie.SplitConformalClassifier(Given().fit(p.numpy()), 0.9, "lac", prefit=True)
    expected = theirs.conformalize(p[:200].numpy(), y[:200].numpy()).predict_set(p[200:].numpy())[1][:, :, 0]
    rule = fit_label_sets(p[:200], y[:200], 0.9, "lac")
    confident = p[200:].amax(-1) >= 1 - rule.threshold  # MAPIE leaves sets empty
    assert torch.equal(rule.sets(p[200:])[confident], torch.tensor(expected)[confident])
    sums = APSConformityScore.get_true_label_cumsum_proba(y.numpy(), p.numpy(), np.arange(5))[0][:, 0]
    ours = fit_label_sets(p, y, 0.9, "aps").threshold
    assert ours == pytest.approx(np.sort(sums)[360])  # the ⌈401 · 0.9⌉ = 361st


def test_errors_say_what_would_be_right():
    zeros = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"coverage 0\.9 needs at least 9 records to calibrate on, got 2"):
        fit_label_sets(ROWS, zeros)
    with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\), got 90"):
        fit_label_sets(ROWS, zeros, 90)
    with pytest.raises(ValueError, match="must be one of lac, aps, raps, got 'top'"):
        fit_label_sets(ROWS, zeros, 0.5, "top")
    with pytest.raises(ValueError, match=r"coverage 0\.6 can't be promised: 0\.5 of right labels have probability 0"):
        fit_label_sets(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([1, 1]), 0.6)

"""The fast version of the benchmark of class means: that it runs, and that its loss and its head are what it says."""

import json
import sys

import class_means
import torch
from class_means import SCALE, LeaveOneOut, discriminant, means_of
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

LABELS = torch.tensor([0, 1, 2] * 4)


def test_a_record_is_compared_with_means_without_it():
    torch.manual_seed(0)
    states, rows = torch.randn(12, 5), torch.tensor([1, 6, 11])
    loss = LeaveOneOut(states, LABELS)
    now = torch.randn(3, 5)
    seen = states.clone()
    seen[rows] = now
    nlls = []
    for state, row in zip(now, rows, strict=True):
        others = torch.arange(12) != row
        means = means_of(seen[others], LABELS[others])
        logits = torch.stack([state @ loss.precision @ m - m @ loss.precision @ m / 2 for m in means])
        nlls.append(-(SCALE * logits).log_softmax(0)[LABELS[row]])
    torch.testing.assert_close(loss(now, rows), torch.stack(nlls).mean())


def test_the_head_is_the_linear_discriminant():
    """Of scikit-learn; where all states have the same size in one direction a head without a bias has all of it."""
    torch.manual_seed(0)
    centred = torch.randn(12, 4)
    states = torch.cat([centred - centred.mean(0), torch.full((12, 1), 3.0)], 1)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(states.double().numpy(), LABELS)
    expected = torch.tensor(other.decision_function(states.double().numpy()))
    found = states.double() @ discriminant(states, LABELS, 0.3).T.double() / SCALE * 12 / (12 - 3)
    torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-4)


def test_it_runs(base, tmp_path, monkeypatch):
    options = ["--records", "2", "--steps", "60", "--top-blocks", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["class_means.py", "--model", str(base), *options])
    monkeypatch.setattr(class_means, "SHRINKAGES", (0.5,))
    class_means.main()
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(found) == 4
    assert {len(row) for name, row in found.items() if "class means" in name} == {1}
    report = (tmp_path / "README.md").read_text()
    assert report.count("by class means") == 4
    assert report.count("[") == 2 * 8  # an interval of each row for NLL and accuracy
    (itself,) = (row for row in report.splitlines() if row.startswith("| a point; by its head"))
    assert "+0.000 [+0.000, +0.000]" in itself
    before = (tmp_path / "results.json").read_bytes()
    class_means.main()  # nothing is repeated
    assert (tmp_path / "results.json").read_bytes() == before

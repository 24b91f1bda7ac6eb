"""The fast version of the benchmark of a head's posteriors: that it runs, and that its draws are of the posterior."""

import json
import sys

import head_posterior
import torch
from head_posterior import Texts, chain, maximum


def test_draws_of_a_known_posterior(monkeypatch):
    """Two classes and one input: the difference u of their weights has the prior N(0, 2σ²), and is integrated."""
    torch.manual_seed(0)
    known, width = Texts(torch.randn(12, 1), torch.tensor([0, 1] * 6)), 1.5
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    logits = known.read.double() @ grid[None]
    signs = 1 - 2 * known.labels[:, None]
    log_density = torch.nn.functional.logsigmoid(signs * logits).sum(0) - grid.square() / 4 / width**2
    density = (log_density - log_density.max()).exp() / (log_density - log_density.max()).exp().sum()
    mean = (grid * density).sum()
    variance = ((grid - mean).square() * density).sum()
    best = maximum(known, width, classes=2)
    assert abs((best[0] - best[1]).item() - grid[log_density.argmax()]) < 2e-3
    monkeypatch.setattr(head_posterior, "KEPT", 600)
    differences = torch.cat([draw[0] - draw[1] for draw in chain(known, width, best, seed=1)]).double()
    error = (variance / 150).sqrt()  # of the mean, were a quarter of the draws independent
    assert abs(differences.mean() - mean) < 4 * error
    assert abs(differences.var() / variance - 1) < 4 * (2 / 150) ** 0.5


def test_it_runs(base, tmp_path, monkeypatch):
    options = ["--steps", "2", "--top-blocks", "1", "--dtype", "float32", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["head_posterior.py", "--model", str(base), "--runs", str(tmp_path), *options])
    for name, value in {"WIDTHS": (0.1, 0.2), "DRAWS": 4, "KEPT": 2, "BURN_IN": 1}.items():
        monkeypatch.setattr(head_posterior, name, value)
    head_posterior.main()
    found = json.loads((tmp_path / "results.json").read_text())["results"]["seed 0"]
    assert len(found) == 6
    report = (tmp_path / "README.md").read_text()
    assert sum(report.count(f"| {kind}, σ = ") for kind in ("maximum", "posterior")) == 2
    assert report.count("[") == 3  # intervals against the mean

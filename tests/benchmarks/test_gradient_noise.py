"""The fast version of the benchmark of gradient noise: that it runs, and that its estimate of the noise is right."""

import json
import sys

import gradient_noise
import torch


def test_the_noise_of_a_known_gradient():
    """tr Cov = 3 · 0.5², ‖E g‖² = 3."""
    torch.manual_seed(0)
    found, error = gradient_noise.noise(lambda: torch.ones(3) + 0.5 * torch.randn(3), 400)
    assert abs(found - 0.25) < 4 * error < 0.15


def test_it_runs(base, tmp_path, monkeypatch):
    options = ["--limit", "2", "--batch-size", "4", "--steps", "1", "--draws", "3", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["gradient_noise.py", "--model", str(base), "--results", str(tmp_path), *options])
    gradient_noise.main()
    before = (tmp_path / "results.json").read_text()
    gradient_noise.main()  # all is there
    assert (tmp_path / "results.json").read_text() == before
    assert json.loads((tmp_path / "results.json").read_text())
    assert all(f"| {name} |" in (tmp_path / "README.md").read_text() for name in gradient_noise.VARIANTS)

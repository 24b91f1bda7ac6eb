"""Predictions of which the truth is known: they are drawn from it."""

import numpy as np
import torch


def truths(n, c, splits, seed=0, concentration=0.5):
    """Probabilities (splits, n, C) and labels drawn from them (splits, n)."""
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet([concentration] * c, (splits, n))
    labels = (probabilities.cumsum(-1) < generator.random((splits, n, 1))).sum(-1).clip(max=c - 1)
    return torch.tensor(probabilities), torch.tensor(labels)


def standard_error(rate, trials):
    return (rate * (1 - rate) / trials) ** 0.5

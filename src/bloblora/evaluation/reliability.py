"""Reliability: how often answers of a given confidence are right."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReliabilityBins:
    """Equal-width bins of the top probability; an empty bin's means are NaN.

    Attributes:
        count: examples in each bin, (bins,).
        confidence: their mean top probability, (bins,).
        accuracy: share of them that are right, (bins,).
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error."""
        return ((self.accuracy - self.confidence).abs() * self.count / self.count.sum()).nansum().item()


def reliability(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """Bin n predictions by confidence; bin b is ((b-1)/bins, b/bins].

    Args:
        probabilities: (n, C).
        targets: (n,), class indices.
        num_bins: equal-width bins on [0, 1].
    """
    confidence, answer = probabilities.double().max(-1)
    right = (answer == targets).double()
    index = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    zeros = torch.zeros(num_bins, dtype=torch.float64)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    return ReliabilityBins(
        count, zeros.index_add(0, index, confidence) / count, zeros.index_add(0, index, right) / count
    )


def reliability_diagram(
    predictions: Mapping[str, tuple[Tensor, Tensor]], path: str | os.PathLike[str], num_bins: int = 15
) -> None:
    """Write a PNG with a panel for each method: accuracy against confidence, and how many answers have it.

    Args:
        predictions: probabilities (n, C) and targets (n,) by method.
        path: of the PNG.
        num_bins: equal-width bins.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(predictions) + 0.4, 4.6), layout="constrained")
    grid = figure.subplots(2, len(predictions), squeeze=False, sharex=True, height_ratios=[4, 1])
    width = 1 / num_bins
    centers = [(bin_ + 0.5) * width for bin_ in range(num_bins)]
    for column, (name, (probabilities, targets)) in enumerate(predictions.items()):
        bins = reliability(probabilities, targets, num_bins)
        top, bottom = grid[0][column], grid[1][column]
        accuracy = bins.accuracy.nan_to_num().tolist()
        gap = (bins.confidence - bins.accuracy).nan_to_num().tolist()
        top.bar(centers, accuracy, width, color="#3b6ea8", edgecolor="white", label="accuracy")
        top.bar(centers, gap, width, bottom=accuracy, color="#d1495b", alpha=0.45, edgecolor="white", label="gap")
        top.plot([0, 1], [0, 1], color="0.35", linestyle="--", linewidth=1)
        top.set(title=f"{name}\nECE {bins.ece:.3f}", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        bottom.bar(centers, (bins.count / bins.count.sum()).tolist(), width, color="0.6", edgecolor="white")
        bottom.set(xlabel="confidence", ylim=(0, 1))
    grid[0][0].set_ylabel("accuracy")
    grid[0][0].legend(loc="upper left", frameon=False)
    grid[1][0].set_ylabel("share")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, path)

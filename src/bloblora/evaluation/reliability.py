"""Reliability: how often answers of a given confidence are right."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _RED, _GREY = "#2f5d8c", "#d1495b", "#9aa3ad"


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
    def share(self) -> Tensor:
        """Share of all examples in each bin, (bins,)."""
        return self.count / self.count.sum()

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        return ((self.accuracy - self.confidence).abs() * self.share).nansum().item()


def reliability(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """Bin n predictions by confidence; bin b is ((b-1)/bins, b/bins].

    Args:
        probabilities: (n, C), rows sum to 1.
        targets: (n,), class indices.
        num_bins: equal-width bins on [0, 1].

    Raises:
        ValueError: there is no example, or shapes, ranges or normalization are wrong.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be 1 or more, got {num_bins}")
    check_targets("probabilities", probabilities, targets)
    probabilities, targets = probabilities.detach().cpu().double(), targets.cpu()
    _check_rows(probabilities)
    confidence, answer = probabilities.max(-1)
    confidence = confidence.clamp_max(1)
    right = (answer == targets).double()
    index = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    zeros = torch.zeros(num_bins, dtype=torch.float64)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    return ReliabilityBins(
        count, zeros.index_add(0, index, confidence) / count, zeros.index_add(0, index, right) / count
    )


def reliability_diagram(panels: Mapping[str, ReliabilityBins], path: str | os.PathLike[str]) -> None:
    """Write a PNG with a panel for each method: accuracy against confidence, and how many answers have it.

    Args:
        panels: the bins (see `reliability`) by method.
        path: of the PNG; its folder is made.

    Raises:
        ValueError: there is no method.
    """
    # here, because most commands draw nothing; without pyplot there is no display and no global state
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not panels:
        raise ValueError("panels: there is no method to draw")
    figure = Figure(figsize=(3.1 * len(panels) + 0.6, 4.9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=[4, 1])
    for (name, bins), top, bottom in zip(panels.items(), *grid, strict=True):
        top.set_title(f"{name}\nECE {bins.ece:.3f}", fontsize=11, linespacing=1.4, wrap=True)
        _draw_accuracy(top, bins)
        _draw_share(bottom, bins)
    grid[0][0].set_ylabel("accuracy")
    grid[1][0].set_ylabel("share")
    handles, labels = grid[0][0].get_legend_handles_labels()
    columns = 4 if len(panels) > 2 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, path)


def check_targets(name: str, values: Tensor, targets: Tensor) -> None:
    """Raise a ValueError unless ``values`` are (n, C), n > 0, no NaN, and ``targets`` n of their columns."""
    if values.ndim != 2 or targets.shape != values.shape[:1] or not len(targets):
        raise ValueError(
            f"{name} must be (n, C) and targets (n,) with n > 0, got {tuple(values.shape)} and {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    wrong = ((targets < 0) | (targets >= values.shape[1])).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"targets must be in 0..{values.shape[1] - 1}, got {targets[row].item()} in row {row}")
    if values.isnan().any():
        raise ValueError(f"{name}: row {values.isnan().any(-1).nonzero()[0].item()} has a NaN")


def _check_rows(probabilities: Tensor) -> None:
    if (probabilities < 0).any():
        raise ValueError(f"probabilities must not be negative, got {probabilities.min().item():.4g}")
    error = (probabilities.sum(-1) - 1).abs()
    if error.max() > 1e-3:
        row = int(error.argmax())
        raise ValueError(f"probabilities: row {row} sums to {probabilities[row].sum().item():.4g}, must be 1")


def _draw_accuracy(axes: "Axes", bins: ReliabilityBins) -> None:
    """Bars up to the accuracy; what lies between it and the mean confidence is hatched."""
    width = 1 / len(bins.count)
    centers = ((torch.arange(len(bins.count)) + 0.5) * width).tolist()
    accuracy, confidence = bins.accuracy.nan_to_num(), bins.confidence.nan_to_num()
    base = torch.minimum(accuracy, confidence).tolist()
    over, under = (confidence - accuracy).clamp_min(0).tolist(), (accuracy - confidence).clamp_min(0).tolist()
    axes.bar(centers, base, width, color=_BLUE, edgecolor="white", linewidth=0.6, label="accuracy")
    for gap, color, label in ((over, _RED, "overconfident"), (under, _BLUE, "underconfident")):
        bars = axes.bar(centers, gap, width, bottom=base, label=label, hatch="////", linewidth=0.6)
        for bar in bars:
            bar.set(facecolor=f"{color}38", edgecolor=f"{color}99")
    axes.plot([0, 1], [0, 1], color="0.25", linestyle=(0, (4, 3)), linewidth=1, label="perfect calibration")
    axes.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    _tidy(axes)


def _draw_share(axes: "Axes", bins: ReliabilityBins) -> None:
    """Histogram of the confidence."""
    width = 1 / len(bins.count)
    centers = ((torch.arange(len(bins.count)) + 0.5) * width).tolist()
    axes.bar(centers, bins.share.tolist(), width, color=_GREY, edgecolor="white", linewidth=0.6)
    axes.set(xlabel="confidence", xlim=(0, 1), box_aspect=0.25)
    axes.locator_params(axis="y", nbins=3)
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)

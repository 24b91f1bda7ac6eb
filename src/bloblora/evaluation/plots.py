"""Pictures: each function gives a matplotlib Figure, for `save_figure` (PNG, SVG) or `to_svg` (in a page).

Each raises a ValueError where there is no method to draw.
"""

import io
import os
from collections.abc import Iterator, Mapping
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import replacing, write_text
from .calibration import ReliabilityBins
from .comparison import Value, mean_and_spread
from .metrics import METRICS
from .ranking import RiskCoverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _RED, _GREY = "#2f5d8c", "#d1495b", "#9aa3ad"
_COLORS = (_BLUE, _RED, "#e0a030", "#3b8e7e", "#8d6ab8", "#5aaad0", "#7a5c45", _GREY)
_MARKERS = "osD^vPX*<>"
_PANELS_A_LINE = 6


def reliability_diagram(panels: Mapping[str, ReliabilityBins], path: str | os.PathLike[str]) -> None:
    """Write the `reliability_figure`, as SVG where the path ends so, else as PNG; the folder is made."""
    save_figure(reliability_figure(panels), path)


def reliability_figure(panels: Mapping[str, ReliabilityBins]) -> "Figure":
    """A panel for each method, of its bins (`reliability`): accuracy against confidence, how many answers have it."""
    columns = min(len(panels), _PANELS_A_LINE)
    lines = -(-len(panels) // max(1, columns))
    figure = _figure("panels", panels, 3.1 * columns + 0.6, 4.9 * lines)
    heights = [4, 1] * lines
    grid = figure.subplots(2 * lines, columns, squeeze=False, sharex=True, sharey="row", height_ratios=heights)
    places = zip(grid[::2].flat, grid[1::2].flat, strict=True)
    for (name, bins), (top, bottom) in zip(panels.items(), places, strict=False):
        top.set_title(f"{name}\nECE {bins.ece:.3f}", fontsize=11, linespacing=1.4, wrap=True)
        _draw_bins(top, bottom, bins)
    for top, bottom in places:
        top.set_axis_off()
        bottom.set_axis_off()
    for top, bottom in zip(grid[::2, 0], grid[1::2, 0], strict=True):
        top.set_ylabel("accuracy")
        bottom.set_ylabel("share")
    return _legend(figure, grid[0][0], columns=4 if len(panels) > 2 else 2)


def risk_coverage_figure(curves: Mapping[str, RiskCoverage]) -> "Figure":
    """Risk against coverage, a line a method, with its area in the legend.

    Of the first tenth, where a risk is that of a few answers, what lies above all the rest is cut off.
    """
    figure, axes = _axes("curves", curves, "coverage", "risk (share of wrong answers)")
    for (name, curve), style in zip(curves.items(), _styles(), strict=False):
        label = f"{name}, AURC {curve.aurc:.3f}"
        axes.plot(curve.coverage.tolist(), curve.risk.tolist(), label=label, markevery=0.1, **style)
    top = max(curve.risk[curve.coverage >= 0.1].max().item() for curve in curves.values())
    axes.set(xlim=(0, 1.02), ylim=(0, 1.05 * top or 1))
    return _legend(figure, axes)


def lines_figure(
    lines: Mapping[str, Mapping[float, Value]], xlabel: str, ylabel: str, xscale: str = "linear"
) -> "Figure":
    """A line a method of y against x, with an error bar (standard deviation, n - 1) where y has a value a seed.

    Args:
        lines: y by x by method.
        xlabel: name of x, such as "N".
        ylabel: name of y, such as "ECE".
        xscale: of matplotlib; "symlog" suits numbers of weight samples, of which 0 is one.
    """
    figure, axes = _axes("lines", lines, xlabel, ylabel)
    axes.set_xscale(xscale)
    for (name, line), style in zip(lines.items(), _styles(), strict=False):
        x = sorted(line)
        y = [mean_and_spread(line[at]) for at in x]
        means, spreads = [mean for mean, _ in y], [spread for _, spread in y]
        axes.errorbar(x, means, spreads, label=name, capsize=2, elinewidth=1, **style)
    ticks = sorted({x for line in lines.values() for x in line})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    return _legend(figure, axes)


def pareto_figure(points: Mapping[str, tuple[Value, Value]], x: str = "accuracy", y: str = "ece") -> "Figure":
    """A point a method, and the `pareto_front`; error bars as in `lines_figure`.

    Args:
        points: values of two metrics by method.
        x: name of the first metric, `METRICS`.
        y: name of the second.
    """
    titles = [METRICS.find(name, "metric").title for name in (x, y)]
    figure, axes = _axes("points", points, *titles)
    means = {}
    for (name, point), style in zip(points.items(), _styles(), strict=False):
        (across, across_spread), (up, up_spread) = map(mean_and_spread, point)
        axes.errorbar(across, up, up_spread, across_spread, label=name, capsize=2, linestyle="none", **style)
        means[name] = across, up
    front = [means[name] for name in pareto_front(means, x, y)]
    steps = "steps-pre" if METRICS[x].higher_is_better else "steps-post"
    axes.plot(*zip(*front, strict=True), color=_GREY, drawstyle=steps, zorder=0, label="Pareto front")
    return _legend(figure, axes)


def pareto_front(points: Mapping[str, tuple[float, float]], x: str = "accuracy", y: str = "ece") -> list[str]:
    """Names, by x, of the points that no other beats: as good in both of two metrics, and better in one.

    A point that isn't finite is left out; of equal points all stay. Arguments are those of `pareto_figure`.

    Raises:
        ValueError: there is no such metric, or neither of its directions is better.
    """
    directions = [METRICS.find(name, "metric").higher_is_better for name in (x, y)]
    if None in directions:
        raise ValueError(f"metrics {x!r} and {y!r}: of one of them neither direction is better, so there is no front")
    finite = {name: point for name, point in points.items() if all(map(isfinite, point))}
    gains = {n: [v if up else -v for v, up in zip(point, directions, strict=True)] for n, point in finite.items()}
    best = [
        name
        for name, own in gains.items()
        if not any(a >= own[0] and b >= own[1] and [a, b] != own for a, b in gains.values())
    ]
    return sorted(best, key=lambda name: finite[name])


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure whole or not at all, as SVG where the path ends so, else as PNG; the folder is made."""
    path = Path(path)
    if path.suffix.lower() == ".svg":
        write_text(path, to_svg(figure))
        return
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def to_svg(figure: "Figure") -> str:
    """An ``<svg>`` element for a file or a page: text stays text, and the same figure gives the same bytes."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bloblora"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _figure(name: str, methods: Mapping[str, Any], width: float, height: float) -> "Figure":
    # here, because most commands draw nothing; without pyplot there is no display and no global state
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not methods:
        raise ValueError(f"{name}: there is no method to draw")
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))


def _axes(name: str, methods: Mapping[str, Any], xlabel: str, ylabel: str) -> tuple["Figure", "Axes"]:
    figure = _figure(name, methods, 5.6, 4.2 + 0.12 * len(methods))  # the legend has two columns
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _tidy(axes)
    return figure, axes


def _legend(figure: "Figure", axes: "Axes", columns: int = 2) -> "Figure":
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _styles() -> Iterator[dict[str, Any]]:
    """Color and marker of each method: 8 and 10 of them make 40 pairs."""
    for color, marker in zip(cycle(_COLORS), cycle(_MARKERS), strict=False):
        yield {"color": color, "marker": marker, "markersize": 5}


def _draw_bins(top: "Axes", bottom: "Axes", bins: ReliabilityBins) -> None:
    """Bars up to the accuracy, with the gap to the mean confidence hatched; below, a histogram of the confidence."""
    width = 1 / len(bins.count)
    centers = ((torch.arange(len(bins.count)) + 0.5) * width).tolist()
    accuracy, confidence = bins.accuracy.nan_to_num(), bins.confidence.nan_to_num()
    base = torch.minimum(accuracy, confidence).tolist()
    over, under = (confidence - accuracy).clamp_min(0).tolist(), (accuracy - confidence).clamp_min(0).tolist()
    top.bar(centers, base, width, color=_BLUE, edgecolor="white", linewidth=0.6, label="accuracy")
    for gap, color, label in ((over, _RED, "overconfident"), (under, _BLUE, "underconfident")):
        bars = top.bar(centers, gap, width, bottom=base, label=label, hatch="////", linewidth=0.6)
        for bar in bars:
            bar.set(facecolor=f"{color}38", edgecolor=f"{color}99")
    top.plot([0, 1], [0, 1], color="0.25", linestyle=(0, (4, 3)), linewidth=1, label="perfect calibration")
    top.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    bottom.bar(centers, bins.share.tolist(), width, color=_GREY, edgecolor="white", linewidth=0.6)
    bottom.set(xlabel="confidence", xlim=(0, 1), box_aspect=0.25)
    bottom.locator_params(axis="y", nbins=3)
    _tidy(top)
    _tidy(bottom)


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)

"""Pictures: what is drawn, and files that are whole."""

import math
from xml.etree import ElementTree

import pytest
import torch

from bloblora.evaluation import (
    lines_figure,
    pareto_figure,
    pareto_front,
    reliability,
    reliability_diagram,
    risk_coverage,
    risk_coverage_figure,
    save_figure,
    to_svg,
)

LINES = {"LoRA & co": {0: 0.25}, "BLoB": {10: [0.05, 0.07], 0: [0.1, 0.3], 1: [0.1, 0.1]}, "none": {}}


def words(figure):
    """Text of the SVG, which must be well-formed."""
    return {text.strip() for text in ElementTree.fromstring(to_svg(figure)).itertext()}


def test_lines_show_mean_and_sample_deviation():
    figure = lines_figure(LINES, "N", "ECE", xscale="symlog")
    (axes,) = figure.axes
    line, _, (bars,) = axes.containers[1]
    assert line.get_xydata().tolist() == [[0, 0.2], [1, 0.1], [10, pytest.approx(0.06)]]
    spread = math.sqrt(2 * 0.1**2)
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([0.2 - spread, 0.2 + spread])
    assert words(figure) >= {"LoRA & co", "BLoB", "N", "ECE", "0", "1", "10"}


def test_risk_coverage_draws_the_curve():
    right = torch.arange(40) % 4 > 0
    curve = risk_coverage(torch.linspace(1, 0, 40), right)
    figure = risk_coverage_figure({"BLoB": curve})
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == torch.stack([curve.coverage, curve.risk], 1).tolist()
    # the first answer is wrong; beyond a tenth at most 2 of 5 are
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1.05 * 2 / 5)
    assert f"BLoB, AURC {curve.aurc:.3f}" in words(figure)
    perfect = risk_coverage_figure({"a": risk_coverage(torch.ones(3), torch.ones(3).bool())})
    assert perfect.axes[0].get_ylim() == (0, 1)


def test_pareto_front_by_hand():
    points = {"a": (0.8, 0.1), "b": (0.7, 0.1), "c": (0.6, 0.02), "d": (0.9, 0.3), "e": (math.nan, 0.0)}
    assert pareto_front(points) == ["c", "a", "d"]
    assert pareto_front({"a": (1, 1), "b": (1, 1)}) == ["a", "b"]
    assert pareto_front({}) == []


def test_pareto_figure_joins_the_front():
    figure = pareto_figure({"a": ([0.7, 0.9], 0.1), "b": (0.7, 0.2), "c": (0.6, [0.02, 0.02])}, "accuracy", "ece")
    front = figure.axes[0].lines[-1]
    assert front.get_xydata().tolist() == [[0.6, 0.02], [pytest.approx(0.8), 0.1]]
    assert words(figure) >= {"a", "b", "c", "Pareto front", "accuracy", "ECE"}
    pareto_figure({"a": (math.nan, 0.1)}, "accuracy", "ece")


def test_files_are_svg_where_the_name_says_so_else_png(tmp_path):
    figure = lines_figure(LINES, "N", "ECE")
    for name in ("a.svg", "a.png", "a"):
        save_figure(figure, tmp_path / "plots" / name)
    assert (tmp_path / "plots" / "a.svg").read_text(encoding="utf-8") == to_svg(figure)
    assert to_svg(figure).startswith("<svg")
    for name in ("a.png", "a"):
        assert (tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG"
    reliability_diagram({"a": reliability(torch.eye(2), torch.tensor([0, 1]))}, tmp_path / "plots" / "r.svg")
    assert "ECE 0.000" in (tmp_path / "plots" / "r.svg").read_text(encoding="utf-8")
    assert len(list((tmp_path / "plots").iterdir())) == 4


def test_nothing_to_draw():
    for draw in (risk_coverage_figure, lambda x: lines_figure(x, "", ""), lambda x: pareto_figure(x)):
        with pytest.raises(ValueError, match="there is no method to draw"):
            draw({})

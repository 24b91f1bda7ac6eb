"""What a metric declares holds; one of another installed package counts like ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap
from sklearn.metrics import f1_score

import bloblora
from bloblora.evaluation import METRICS, Metric, markdown_table, metric_names, pareto_front, summary
from bloblora.prediction import DISTANCES, Prediction

# the spherical score is a mean over examples that lies below 0; macro F1 is no mean over examples
PLUGIN = """
from sklearn.metrics import f1_score
from bloblora.evaluation import Metric

def spherical(prediction, targets):
    p = prediction.probabilities
    return -p.gather(1, targets[:, None])[:, 0] / p.norm(dim=-1)

def agreement(prediction, targets, outside):
    return (outside.labels == 0).double().mean()

SPHERICAL = Metric("spherical", "spherical", spherical, higher_is_better=False, range=(-1, 0), per_example=True)
F1 = Metric("macro_f1", "macro F1", lambda p, y: f1_score(y, p.labels, average="macro"), True, (0, 1))
FAR = Metric("far_zero", "far", agreement, None, (0, 1), takes=("outside",), table="asked")
WRONG = Metric("other_name", "", spherical, None)
"""
ENTRIES = "[bloblora.metrics]\n" + "".join(
    f"{name} = their_metrics:{attribute}\n"
    for name, attribute in {"spherical": "SPHERICAL", "macro_f1": "F1", "far_zero": "FAR", "wrong": "WRONG"}.items()
)
SCRIPT = """
import json, sys, torch
from dataclasses import astuple
from bloblora.evaluation import *
from bloblora.prediction import Prediction

a, b, targets = torch.load(sys.argv[1])
found = summary(Prediction(a, len(a)), targets, Prediction(b, len(b)))
scores = [example_scores(Prediction(x, len(x)), targets) for x in (a, b)]
print(json.dumps({
    "summary": found,
    "without": list(summary(Prediction(a, len(a)), targets)),
    "scores": scores[0]["spherical"].tolist(),
    "table": markdown_table({"a": found, "b": found | {"spherical": -0.1}}, ["spherical", "macro_f1"], mark_best=True),
    "columns": table_cells({"a": found})[0],
    "interval": astuple(paired_bootstrap([scores[0]], [scores[1]], "spherical")),
    "front": pareto_front({"a": (0.5, -0.5), "b": (0.4, -0.4), "c": (0.6, -0.3)}, "macro_f1", "spherical"),
}))
"""


def draws(n=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(3, n, 4, generator=generator)).log_softmax(-1)


def test_a_metric_of_another_package(tmp_path):
    (tmp_path / "their_metrics.py").write_text(PLUGIN)
    info = tmp_path / "their_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-metrics\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    first, second, targets = draws(), draws(seed=1), torch.arange(120) % 4
    torch.save((first, second, targets), tmp_path / "case.pt")
    path = os.pathsep.join([str(tmp_path), str(Path(bloblora.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "case.pt")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "'wrong' of package their-metrics" in done.stderr
    assert "it isn't a Metric of the name 'wrong'" in done.stderr
    result = json.loads(done.stdout)

    p, q = (x.exp().mean(0).double() for x in (first, second))
    rows = torch.arange(120)
    here, there = (-x[rows, targets] / x.square().sum(-1).sqrt() for x in (p, q))
    assert result["scores"] == pytest.approx(here.tolist(), abs=1e-6)
    values = result["summary"]
    assert list(values)[7:9] == ["spherical", "macro_f1"]  # beside our own of the main table
    assert values["spherical"] == pytest.approx(here.mean().item(), abs=1e-6)
    assert values["macro_f1"] == pytest.approx(f1_score(targets, p.argmax(-1), average="macro"))
    assert values["far_zero"] == pytest.approx((q.argmax(-1) == 0).double().mean().item())
    assert "far_zero" not in result["without"]
    assert result["columns"][-2:] == ["spherical ↓", "macro F1 ↑"]
    assert "far" not in result["columns"]
    header, _, best, _ = result["table"].splitlines()
    assert header == "|  | spherical ↓ | macro F1 ↑ |"
    assert best.startswith(f"| a | **{values['spherical']:.3f}** |")
    estimate, low, high = result["interval"]
    assert estimate == pytest.approx((here - there).mean().item(), abs=1e-6)
    expected = bootstrap(((here - there).numpy(),), np.mean, method="percentile", random_state=0)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.1 * width)
    assert result["front"] == ["a", "c"]


def test_a_name_stands_once_and_titles_differ():
    assert all(metric.name == name for name, metric in METRICS.items())
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)
    assert [name for name in metric_names("main", outside=False) if "categorical" in METRICS[name].of] == [
        *("accuracy", "ece", "ece_floor", "squared_calibration_error", "nll", "brier"),
    ]


@given(st.integers(1, 30), st.integers(1, 5), st.floats(0, 20), st.integers(0, 2**31))
def test_every_value_is_in_its_range(n, c, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(3, 2 * n, c, generator=generator)
    inside, outside = (
        Prediction(part, 3, distances={name: torch.randn(n, generator=generator) for name in DISTANCES})
        for part in logits.log_softmax(-1).split(n, 1)
    )
    found = summary(inside, torch.randint(c, (n,), generator=generator), outside)
    own = {name: metric.range for name, metric in METRICS.items() if inside.kind in metric.of}
    assert {*own} < {*found}
    for name, (low, high) in own.items():
        assert low - 1e-6 <= found[name] <= high + 1e-6, name


def test_a_mean_over_examples_that_gives_something_else_is_named():
    metric = Metric("sum", "sum", lambda p, y: p.labels.sum(), None, per_example=True)
    with pytest.raises(ValueError, match=r"'sum' is per_example: .* must give the shape \(120,\), got \(\)"):
        metric.examples(Prediction(draws(), 3), torch.arange(120))


def test_direction_decides_what_is_best():
    rows = {"a": {"accuracy": 0.9, "nll": 0.9, "brier_uncertainty": 0.9}, "b": dict.fromkeys(METRICS, 0.1)}
    table = markdown_table(rows, ["accuracy", "nll", "brier_uncertainty"], mark_best=True).splitlines()
    assert table[0] == "|  | accuracy ↑ | NLL ↓ | Brier uncertainty |"
    assert table[2:] == ["| a | **0.900** | 0.900 | 0.900 |", "| b | 0.100 | **0.100** | 0.100 |"]
    points = {"a": (0.3, 0.8), "b": (0.4, 0.9), "c": (0.5, 0.7)}
    assert pareto_front(points, "nll", "accuracy") == ["a", "b"]
    assert pareto_front(points, "accuracy", "nll") == ["c"]
    with pytest.raises(ValueError, match="metric 'f1' is not one of accuracy, ece"):
        pareto_front(points, "accuracy", "f1")
    with pytest.raises(ValueError, match="neither direction is better"):
        pareto_front(points, "brier_uncertainty", "ece")

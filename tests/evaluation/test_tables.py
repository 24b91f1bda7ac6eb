"""Tables: numbers by hand, names unharmed."""

import io
import math

import numpy as np
import pytest
import yaml
from rich.console import Console

from bloblora import studies
from bloblora.cli.study import trial_line
from bloblora.evaluation import METRICS, Interval, markdown_table, rich_table, short_number

ROWS = {
    "LoRA [r=8]": {"accuracy": [0.8, 0.9, 1.0], "ece": 0.25},
    "a|b": {"accuracy": [0.5], "num_examples": 3},
}


def test_markdown_shows_mean_and_sample_deviation():
    assert markdown_table(ROWS) == (
        "|  | accuracy ↑ | ECE ↓ |\n"
        "| --- | ---: | ---: |\n"
        "| LoRA [r=8] | 0.900 ± 0.100 | 0.250 |\n"
        "| a\\|b | 0.500 | – |\n"
    )


def test_rich_shows_the_same_and_keeps_square_brackets():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_table(ROWS, title="runs[1]"))
    text = console.export_text()
    for part in ("runs[1]", "LoRA [r=8]", "0.900 ± 0.100", "0.250", "–", "accuracy ↑"):
        assert part in text


def test_many_metrics_of_few_methods_fit_a_narrow_terminal():
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(rich_table({"blob": {name: 0.125 for name in METRICS}}))
    lines = console.export_text().splitlines()
    assert any("ECE floor" in line and "0.125" in line for line in lines)
    assert "…" not in "".join(lines)


def test_a_wide_table_wraps_its_names_and_no_number():
    options = {"learning_rate": 0.00038, "std_learning_rate": 0.0021, "prior_std": 0.25, "init_std": 0.005}
    names = ["accuracy", "ece", "nll", *options]
    rows = {f"trial {i} of a method with a long name": {n: 0.125 for n in names} | options for i in range(9)}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_table(rows, columns=names))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert all(text.count(number) >= 9 for number in ("0.125", "3.8e-4", "0.0021", "0.250", "0.005"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00038, "3.8e-4"), (4e-4, "4.0e-4"), (0.0021, "0.0021"), (0.25, "0.25"), (12345.0, "1.23e+4"), (0, "0")],
)
def test_a_short_number_is_one_in_yaml_too(value, text):
    assert short_number(value) == text
    assert yaml.safe_load(text) == pytest.approx(value, rel=5e-3)


def test_errors_in_small_or_large_units_of_the_data_keep_their_digits():
    rows = {"one": {"rmse": 1.234e-6, "nll": 1e-6}, "two": {"rmse": [2e9, 4e9]}, "three": {"rmse": 1234.5}}
    rows["gain"] = {"rmse": Interval(2e-5, -1e-5, 5e-5)}
    lines = markdown_table(rows, ["rmse", "nll"]).splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert cells == [
        ["one", "1.23e-6", "0.000"],
        ["two", "3.0e+9 ± 1.41e+9", "–"],
        ["three", "1234.500", "–"],
        ["gain", "+2.0e-5 [-1.0e-5, +5.0e-5]", "–"],
    ]


def test_columns_are_chosen_and_ordered():
    header = markdown_table(ROWS, columns=["num_examples", "ece", "seconds"]).splitlines()[0]
    assert header == "|  | num_examples | ECE ↓ | seconds |"
    assert markdown_table({"a": {"aurc": 0.1}}, columns=["aurc"]).startswith("|  | AURC ↓ |")
    assert markdown_table({"a": {"seconds": 2.0}}).splitlines()[2] == "| a | 2.000 |"


def test_odd_values():
    cells = {"accuracy": [], "ece": np.float32(0.5), "nll": [1.0, math.inf], "brier": np.array([0.1, 0.3])}
    assert markdown_table({"a": cells}).splitlines()[2] == "| a | – | 0.500 | inf | 0.200 ± 0.141 |"


def test_an_ece_at_its_floor_says_so_and_no_ece_is_marked_as_best():
    noise = {"ece_floor": 0.05, "ece_floor_std": 0.01}
    rows = {
        "poor": {"accuracy": 0.09, "ece": 0.01, "nll": 3.0} | noise,
        "good": {"accuracy": 0.8, "ece": [0.06, 0.078], "nll": 1.0} | noise,
        "sharp": {"accuracy": 0.7, "ece": 0.0701, "nll": 2.0} | noise,
    }
    assert markdown_table(rows, ["accuracy", "ece", "nll"], mark_best=True).splitlines()[2:] == [
        "| poor | 0.090 | 0.010, at floor | 3.000 |",
        "| good | **0.800** | 0.069 ± 0.013, at floor | **1.000** |",
        "| sharp | 0.700 | 0.070 | 2.000 |",
    ]


def test_a_trial_is_told_with_the_digits_of_the_table():
    trial = studies.Trial(0, {"prior_std": 4e-4}, {"rmse": 1.234e-6, "nll": 0.25}, True)
    assert trial_line(trial) == "trial 1: nll 0.250, rmse 1.23e-6 (prior_std 4.0e-4)"

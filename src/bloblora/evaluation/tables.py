"""Tables of metrics, for people."""

from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real
from statistics import mean, stdev

from rich.table import Table
from rich.text import Text

Values = Mapping[str, float | Sequence[float]]

_TITLES = {
    "accuracy": "accuracy ↑",
    "ece": "ECE ↓",
    "nll": "NLL ↓",
    "brier": "Brier ↓",
    "auroc_confidence": "AUROC conf. ↑",
    "auroc_predictive_entropy": "AUROC entropy ↑",
    "auroc_mutual_information": "AUROC MI ↑",
}


def rich_table(rows: Mapping[str, Values], title: str | None = None, columns: Sequence[str] | None = None) -> Table:
    """A terminal table, a row a method; a sequence of values, one a seed, is shown as mean ± sd (n - 1).

    Args:
        rows: metrics by method; a metric that a method lacks, or has no value of, is shown as –.
        title: above the table.
        columns: which metrics, in order; by default the known ones that occur, or all where none is known.
    """
    columns = columns or _columns(rows)
    # Text, because a plain string would lose what stands in square brackets
    table = Table(title=Text(title) if title else None)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(Text(_TITLES.get(column, column)), justify="right")
    for name, values in rows.items():
        table.add_row(Text(name), *(_cell(values.get(column)) for column in columns))
    return table


def markdown_table(rows: Mapping[str, Values], columns: Sequence[str] | None = None) -> str:
    """The same as Markdown."""
    columns = columns or _columns(rows)
    lines = [["", *(_TITLES.get(column, column) for column in columns)], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(_cell(values.get(column)) for column in columns)] for name, values in rows.items()]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def _columns(rows: Mapping[str, Values]) -> list[str]:
    found = {column: None for values in rows.values() for column in values}
    known = [column for column in _TITLES if column in found]
    return known or list(found)


def _cell(value: float | Sequence[float] | None) -> str:
    if value is None:
        return "–"
    # Real, because NumPy's float32 is no float
    values = [float(value)] if isinstance(value, Real) else [float(seed) for seed in value]  # type: ignore[union-attr]
    if not values:
        return "–"
    # the spread of an infinite NLL is undefined
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 and all(map(isfinite, values)) else ""
    return f"{mean(values):.3f}{spread}"

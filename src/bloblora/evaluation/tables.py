"""Tables of metrics, for people."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from rich.table import Table

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


def rich_table(rows: Mapping[str, Values], title: str | None = None) -> Table:
    """A terminal table, a row a method; a sequence of values is shown as mean ± standard deviation."""
    columns = _columns(rows)
    table = Table("", *(_TITLES.get(column, column) for column in columns), title=title)
    for name, values in rows.items():
        table.add_row(name, *(_cell(values.get(column)) for column in columns))
    return table


def markdown_table(rows: Mapping[str, Values]) -> str:
    """The same as Markdown."""
    columns = _columns(rows)
    lines = [["", *(_TITLES.get(column, column) for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_cell(values.get(column)) for column in columns)] for name, values in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _columns(rows: Mapping[str, Values]) -> list[str]:
    found = {column: None for values in rows.values() for column in values}
    known = [column for column in _TITLES if column in found]
    return known or list(found)


def _cell(value: float | Sequence[float] | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, (int, float)):
        return f"{value:.3f}"
    spread = f" ± {stdev(value):.3f}" if len(value) > 1 else ""
    return f"{mean(value):.3f}{spread}"

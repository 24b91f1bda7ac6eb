"""Tables of metrics, for people."""

from collections.abc import Mapping, Sequence
from math import isfinite, isnan, nan
from numbers import Real
from statistics import mean, stdev

from rich.table import Table
from rich.text import Text

from .bootstrap import Interval

Value = float | Sequence[float]
Values = Mapping[str, Value | Interval]

_TITLES = {
    "accuracy": "accuracy ↑",
    "ece": "ECE ↓",
    "nll": "NLL ↓",
    "brier": "Brier ↓",
    "auroc_confidence": "AUROC conf. ↑",
    "auroc_predictive_entropy": "AUROC entropy ↑",
    "auroc_mutual_information": "AUROC MI ↑",
}
# shown only where asked for
_MORE_TITLES = {
    "ece_equal_mass": "ECE, equal mass ↓",
    "ece_classwise": "ECE, classwise ↓",
    "brier_uncertainty": "Brier uncertainty",
    "brier_resolution": "Brier resolution ↑",
    "brier_reliability": "Brier reliability ↓",
    "aurc": "AURC ↓",
    "selective_accuracy_50": "accuracy at 50 % ↑",
    "selective_accuracy_80": "accuracy at 80 % ↑",
    "selective_accuracy_90": "accuracy at 90 % ↑",
    "selective_accuracy_95": "accuracy at 95 % ↑",
    "fpr95_confidence": "FPR95 conf. ↓",
    "fpr95_predictive_entropy": "FPR95 entropy ↓",
    "fpr95_mutual_information": "FPR95 MI ↓",
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
        table.add_column(Text(_title(column)), justify="right")
    for name, values in rows.items():
        table.add_row(Text(name), *(_cell(values.get(column)) for column in columns))
    return table


def markdown_table(rows: Mapping[str, Values], columns: Sequence[str] | None = None, *, mark_best: bool = False) -> str:
    """The same as Markdown, with ``mark_best`` as in `table_cells`."""
    header, *cells = table_cells(rows, columns, mark_best=mark_best)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def table_cells(
    rows: Mapping[str, Values], columns: Sequence[str] | None = None, *, mark_best: bool = False
) -> list[list[str]]:
    """Header and rows of a table, as text; an `Interval` is shown with its bounds.

    With ``mark_best`` the best of a column, by its title's arrow, is between ``**``, and what is no more than one
    standard deviation of the best from it has a ``*``.
    """
    columns = columns or _columns(rows)
    marks = {column: _marks(rows, column) if mark_best else {} for column in columns}
    return [
        ["", *(_title(column) for column in columns)],
        *(
            [name, *(marks[column].get(name, "{}").format(_cell(values.get(column))) for column in columns)]
            for name, values in rows.items()
        ),
    ]


def _marks(rows: Mapping[str, Values], column: str) -> dict[str, str]:
    """A format for the cells of a column that are the best or as good."""
    sign = {"↑": 1, "↓": -1}.get(_title(column)[-1])
    found = {name: values[column] for name, values in rows.items() if column in values}
    numbers = {name: mean_and_spread(value) for name, value in found.items() if not isinstance(value, Interval)}
    numbers = {name: pair for name, pair in numbers.items() if isfinite(pair[0])}
    if sign is None or len(numbers) < 2:
        return {}
    best, spread = max(numbers.values(), key=lambda pair: sign * pair[0])
    near = {name: "{}*" for name, (average, _) in numbers.items() if abs(average - best) <= spread}
    return near | {name: "**{}**" for name, (average, _) in numbers.items() if average == best}


def _columns(rows: Mapping[str, Values]) -> list[str]:
    found = {column: None for values in rows.values() for column in values}
    known = [column for column in _TITLES if column in found]
    return known or list(found)


def _title(column: str) -> str:
    return (_TITLES | _MORE_TITLES).get(column, column)


def mean_and_spread(value: Value) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of one value a seed; NaN where there is no such thing."""
    # Real, because NumPy's float32 is no float
    values = [float(value)] if isinstance(value, Real) else [float(seed) for seed in value]  # type: ignore[union-attr]
    # the spread of an infinite NLL is undefined
    spread = stdev(values) if len(values) > 1 and all(map(isfinite, values)) else nan
    return mean(values) if values else nan, spread


def _cell(value: Value | Interval | None) -> str:
    if isinstance(value, Interval):
        return f"{value.estimate:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
    average, spread = (nan, nan) if value is None else mean_and_spread(value)
    if isnan(average):
        return "–"
    return f"{average:.3f}" if isnan(spread) else f"{average:.3f} ± {spread:.3f}"

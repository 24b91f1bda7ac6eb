"""A study's results for people: Markdown, and one HTML page that opens without a network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import evaluation
from ..files import read_json, write_text
from ..runs import RunError
from .result import STUDY_FILE, Result, read_results
from .study import Study, file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COST = ("training minutes", "peak GiB", "predicting seconds")
_LEGEND = "Mean ± standard deviation; **best**, and * within one standard deviation."


@dataclass
class Row:
    """One method with one N: its results, a seed each.

    Attributes:
        label: of the table.
        method: label of the method.
        num_samples: N.
        results: of each seed.
    """

    label: str
    method: str
    num_samples: int
    results: list[Result] = field(default_factory=list)

    def values(self, key: str) -> dict[str, list[float]]:
        """Metrics of one set by name, a value a seed."""
        found: dict[str, list[float]] = {}
        for result in self.results:
            for name, value in result.metrics.get(key, {}).get(str(self.num_samples), {}).items():
                found.setdefault(name, []).append(value)
        return found

    def scores(self, key: str) -> list[dict[str, Tensor]]:
        """Scores an example of one set, a dict a seed."""
        return [scores for result in self.results if (scores := result.scores_of(key, self.num_samples))]


@dataclass(frozen=True)
class Table:
    """Rows of metrics, and what to say of them."""

    caption: str
    rows: Mapping[str, Mapping[str, Sequence[float]]]
    columns: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, its caption and the name of its file."""

    caption: str
    svg: str
    name: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Table | Picture | str]


def report(folder: Path, html: Path | None = None, baseline: str | None = None, title: str | None = None) -> Path:
    """Write ``report.md`` with its pictures into a study's folder, and an HTML page.

    Args:
        folder: of the results, as `bloblora compare` wrote them.
        html: the page; default ``report.html`` in the folder.
        baseline: label of the method that the others are compared to; default the study's, or ``lora``.
        title: default the study's name, or the folder's.

    Returns:
        The page.

    Raises:
        RunError: there is no result, or none of the baseline that is given.
    """
    results = list(read_results(folder))
    if not results:
        raise RunError(f"{folder}: no results in it; give a folder that `bloblora compare` wrote")
    labels = {result.label: None for result in results}
    if baseline is not None and baseline not in labels:
        raise RunError(f"baseline {baseline!r} is not one of the methods {', '.join(labels)}")
    given = {"--baseline": baseline, "--title": title}
    options = [part for pair in given.items() if pair[1] for part in pair]
    command = shlex.join(["bloblora", "report", str(folder), *map(str, options)])
    study = read_json(folder / STUDY_FILE, RunError) if (folder / STUDY_FILE).is_file() else {}
    baseline = baseline or study.get("baseline", Study.baseline)
    title, html = title or study.get("name", folder.name), html or folder / "report.html"
    order = list({baseline: None, **study.get("methods", {}), **labels})
    results.sort(key=lambda result: order.index(result.label))
    sections = [_setting(results)]
    for dataset in dict.fromkeys(result.dataset for result in results):
        sections += _sections(dataset, [result for result in results if result.dataset == dataset], baseline)
    write_text(folder / "report.md", _markdown(title, sections, command, folder))
    write_text(html, _page(title, sections, command))
    return html


def _sections(dataset: str, results: Sequence[Result], baseline: str) -> Iterator[Section]:
    rows = _rows(results)
    named = {row.label: row for row in rows}
    sets = list(dict.fromkeys(key for result in results for key in result.metrics))
    outside = [key for key in _keys(results) if key not in sets]
    test = {label: row.values("test") | _detection(row, outside) | _cost(row) for label, row in named.items()}
    most_draws = {row.method: row for row in sorted(rows, key=lambda row: row.num_samples)}
    yield Section(
        dataset,
        [
            Table(f"Test data, {_seeds(rows)}. {_LEGEND} {_TIMES}", test, [*_measured(test), *_COST]),
            Table(
                "More of calibration and selective prediction.", test, evaluation.metric_names("more", outside=False)
            ),
            *_differences(rows, baseline, "test"),
            *_learning(most_draws),
            *_pictures(dataset, rows, most_draws),
        ],
    )
    for key in sets:
        if key != "test":
            shifted = {label: row.values(key) | _detection(row, [key]) for label, row in named.items()}
            text = f"Trained on {dataset}, tested on {key}; AUROC and FPR95 of telling the two apart. {_LEGEND}"
            parts = [Table(text, shifted, _measured(shifted)), *_differences(rows, baseline, key)]
            yield Section(f"{dataset}: shift to {key}", parts)


def _measured(rows: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Columns of a first table: the main metrics, and those of detection that any row has."""
    found = {name for row in rows.values() for name in row}
    detection = [name for name in evaluation.metric_names(outside=True) if name in found]
    return [*evaluation.metric_names("main", outside=False), *detection]


def _rows(results: Sequence[Result]) -> list[Row]:
    """A row a method and number of draws; one row for a method whose draws are all the same."""
    rows: dict[tuple[str, int], Row] = {}
    for result in results:
        by_samples = {int(n): metrics["num_draws"] for n, metrics in result.metrics["test"].items()}
        points = all(drawn == 1 for drawn in by_samples.values())
        seen = set()
        for n in sorted(by_samples):
            count = round(by_samples[n]) if n and not points else 0  # an ensemble has no more draws than members
            if count not in seen:
                label = result.label if points else f"{result.label}, N = {count}"
                rows.setdefault((result.label, count), Row(label, result.label, n)).results.append(result)
            seen.add(count)
    return list(rows.values())


def _differences(rows: Sequence[Row], baseline: str, key: str) -> Iterator[Table]:
    """How far each method is from the baseline on the same examples of one set."""
    reference = next((row.scores(key) for row in reversed(rows) if row.method == baseline), None)
    stored = set(reference[0]) if reference else set()
    main = evaluation.metric_names("main", outside=False)
    compared = [name for name in main if name in stored or evaluation.METRICS[name].parts]
    found = {}
    for row in rows:
        scores = row.scores(key)
        if row.method != baseline and reference and scores:
            intervals = {name: evaluation.paired_bootstrap(scores, reference, name) for name in compared}
            found[row.label] = {f"Δ {name}": interval for name, interval in intervals.items()}
    if found:
        text = f"Difference from {baseline} with a 95 % interval: paired bootstrap over examples, mean over seeds."
        yield Table(text, found, [f"Δ {name}" for name in compared])  # type: ignore[arg-type]


def _learning(most_draws: Mapping[str, Row]) -> Iterator[Table]:
    """How fast each method learns: its training NLL after each quarter of the steps."""
    curves = {method: curve for method, row in most_draws.items() if (curve := _learning_curve(row))}
    if not curves:
        return
    steps = sorted(set().union(*curves.values()))
    shown = [steps[round(quarter * (len(steps) - 1) / 4)] for quarter in range(5)]
    rows = {method: {f"step {step:g}": values for step, values in curve.items()} for method, curve in curves.items()}
    text = "Training NLL, mean since the log before, under the noise of the method's training."
    yield Table(text, rows, [f"step {step:g}" for step in dict.fromkeys(shown)])


def _pictures(dataset: str, rows: Sequence[Row], most_draws: Mapping[str, Row]) -> Iterator[Picture]:
    def picture(what: str, figure: Figure, name: str) -> Picture:
        return Picture(f"{dataset}: {what}", evaluation.to_svg(figure), file_name(f"{dataset}-{name}"))

    panels = {row.label: evaluation.confidence_bins(*_pooled(row)) for row in most_draws.values()}
    yield picture("reliability, all seeds together", evaluation.reliability_figure(panels), "reliability")
    curves = {row.label: evaluation.risk_coverage(*_pooled(row)) for row in most_draws.values()}
    figure = evaluation.risk_coverage_figure(curves)
    yield picture("risk against coverage, all seeds together", figure, "risk-coverage")
    lines = {name: _against_samples(rows, name) for name in ("ece", "nll")}
    if any(len(line) > 2 for line in lines["ece"].values()):
        for name, line in lines.items():
            title = evaluation.METRICS[name].title
            figure = evaluation.lines_figure(line, "number of draws N", title, xscale="symlog")
            yield picture(f"{title} against N", figure, f"{name}-against-n")
    learning = {method: curve for method, row in most_draws.items() if (curve := _learning_curve(row))}
    if learning:
        figure = evaluation.lines_figure(learning, "step", "training NLL")
        yield picture("training NLL against step, under the noise of the method's training", figure, "learning")
    figure = _pareto_figure({row.label: row for row in most_draws.values()})
    yield picture("accuracy against ECE, to the lower right is better", figure, "pareto")
    for method, widths in _by_prior_std(rows).items():
        what = f"accuracy against ECE over prior_std ({method}), to the lower right is better"
        yield picture(what, _pareto_figure(widths), f"pareto-prior-std-{method}")


def _pareto_figure(rows: Mapping[str, Row]) -> Figure:
    values = {label: row.values("test") for label, row in rows.items()}
    points = {label: (of["accuracy"], of["ece"]) for label, of in values.items()}
    return evaluation.pareto_figure(points, "accuracy", "ece")


def _by_prior_std(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """By method what was run with three or more σp and otherwise equal options: its rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        options = {**row.results[0].config, **row.results[0].options, "prior_std": None, "seed": None}
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(row)
    found: dict[str, dict[str, Row]] = {}
    for group in groups.values():
        widths = {row.results[0].options.get("prior_std") for row in group}
        if len(widths) > 2:
            group.sort(key=lambda row: row.results[0].options["prior_std"])
            found[group[0].results[0].config["method"]] = {
                f"σp = {row.results[0].options['prior_std']:g}, N = {row.num_samples}": row for row in group
            }
    return found


def _learning_curve(row: Row) -> dict[float, list[float]]:
    """Training NLL by step, a value a seed; empty where a run didn't keep it."""
    line: dict[float, list[float]] = {}
    for result in row.results:
        for step, nll in result.training.get("curve", ()):
            line.setdefault(step, []).append(nll)
    return line


def _against_samples(rows: Sequence[Row], name: str) -> dict[str, dict[float, list[float]]]:
    lines: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        lines.setdefault(row.method, {})[row.num_samples] = row.values("test")[name]
    return {label: line for label, line in lines.items() if len(line) > 1}


def _pooled(row: Row) -> tuple[Tensor, Tensor]:
    """Confidence of all seeds' answers and whether they are right."""
    scores = row.scores("test")
    return torch.cat([s["confidence"] for s in scores]), torch.cat([s["accuracy"] for s in scores]) > 0.5


def _detection(row: Row, keys: Iterable[str]) -> dict[str, list[float]]:
    """How well uncertainty tells other sets from the test set, a value a seed; one draw has no mutual information."""
    drawn = max(row.values("test")["num_draws"]) > 1
    names = [name for name in evaluation.UNCERTAINTIES if drawn or name != "mutual_information"]
    found: dict[str, list[float]] = {}
    for key in keys:
        for result in row.results:
            inside, outside = (result.scores_of(of, row.num_samples) for of in ("test", key))
            if inside and outside:  # a run may have been stopped between them
                scores = ({name: of[name] for name in names} for of in (inside, outside))
                for name, value in evaluation.ood_metrics(*scores).items():
                    found.setdefault(name, []).append(value)
    return found


_TIMES = "Times are those of the fastest seed: other work ran beside."


def _cost(row: Row) -> dict[str, list[float]]:
    most = [max(map(int, result.metrics["test"])) for result in row.results]
    timed = [
        r.seconds["test"]
        for r, n in zip(row.results, most, strict=True)
        if row.num_samples == n or row.label == row.method
    ]
    return {
        "training minutes": [min(result.training["seconds"] for result in row.results) / 60],
        "peak GiB": [max(result.training["peak_memory_bytes"] for result in row.results) / 2**30],
        "predicting seconds": sorted(timed)[:1],
    }


def _setting(results: Sequence[Result]) -> Section:
    machines = dict.fromkeys(
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}, peft {m['peft']}"
        for m in (result.machine for result in results)
    )
    made = f"{len(results)} runs by `bloblora compare`, of the study in {STUDY_FILE}, on {'; '.join(machines)}."
    return Section("Setting", [made, *_configurations(results)])


def _configurations(results: Sequence[Result]) -> Iterator[str]:
    """What all trainings share, and what each method adds."""
    configs = [result.config for result in results]
    shared = {k: v for k, v in configs[0].items() if all(c.get(k) == v for c in configs)}
    yield "All: " + _listed(shared)
    for label in dict.fromkeys(result.label for result in results):
        own = next(r for r in results if r.label == label)
        yield f"{label}: " + _listed({"method": own.config["method"], **own.options})


def _listed(options: Mapping[str, object]) -> str:
    return ", ".join(f"`{name}: {value}`" for name, value in options.items()) or "no options"


def _seeds(rows: Sequence[Row]) -> str:
    counts = sorted({len(row.results) for row in rows})
    return f"{' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''}"


def _keys(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[0] for result in results for name in result.scores))


def _markdown(title: str, sections: Sequence[Section], command: str, folder: Path) -> str:
    lines = [f"# {title}\n", f"Made by `{command}`.\n"]
    for section in sections:
        lines.append(f"\n## {section.title}\n")
        for part in section.parts:
            if isinstance(part, str):
                lines.append(f"- {part}")
            elif isinstance(part, Table):
                lines += ["", part.caption + "\n", evaluation.markdown_table(part.rows, part.columns, mark_best=True)]
            else:
                write_text(folder / f"{part.name}.svg", part.svg)
                lines.append(f"![{part.caption}]({part.name}.svg)\n\n`{command}`\n")
    return "\n".join(lines) + "\n"


def _page(title: str, sections: Sequence[Section], command: str) -> str:
    body = ""
    for section in sections:
        parts = "".join(_element(part, command) for part in section.parts)
        body += f"<section><h2>{escape(section.title)}</h2>\n{parts}</section>\n"
    template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), command=escape(command), body=body)


def _element(part: Table | Picture | str, command: str) -> str:
    if isinstance(part, str):
        return f"<p>{_code(part)}</p>\n"
    if isinstance(part, Picture):
        caption = f"{escape(part.caption)}. <code>{escape(command)}</code>"
        return f"<figure>{part.svg}<figcaption>{caption}</figcaption></figure>\n"
    header, *cells = evaluation.table_cells(part.rows, part.columns, mark_best=True)
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{_strong(cell)}</td>' for cell in row)}</tr>\n"
        for name, *row in cells
    )
    caption = f"<caption>{_strong(part.caption)}</caption>"
    return f"<div class='table'><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"


def _strong(text: str) -> str:
    before, *marked = escape(text).split("**")
    return before + "".join(f"<b>{part}</b>" if i % 2 == 0 else part for i, part in enumerate(marked))


def _code(text: str) -> str:
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))

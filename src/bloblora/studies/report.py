"""A study's results for people: Markdown with figures, all metrics in one file, and one page that needs no network."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from html import escape
from pathlib import Path
from statistics import mean
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import evaluation
from ..files import read_json, write_text
from ..messages import quoted
from ..methods import METHODS
from ..runs import RunError, alone
from ..runs.config import flat_options
from .job import RUNS, STUDY_FILE, STUDY_METRICS_FILE, Result, read_results, read_study_metrics, write_study_metrics
from .study import Study, file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COST = ("training minutes", "peak GiB", "predicting seconds")
_LEGEND = "Rows by NLL, the lowest first. Mean ± standard deviation; **best**, and * within one standard deviation."
_CALIBRATION = (
    "ECE floor: the ECE that a perfectly calibrated model would have on the same records. At floor: an ECE no more "
    "than two standard deviations above it, which shows no miscalibration. CE²: squared calibration error without the "
    "bias of few records, around 0 for a calibrated model. No best of these is marked: a model that knows little may "
    "be calibrated."
)


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
        """Scores per example of one set, a dict a seed."""
        return [scores for result in self.results if (scores := result.scores_of(key, self.num_samples))]

    def paired(self, other: Row, key: str, *, scored: bool = False) -> tuple[Row, Row]:
        """Both with those seeds alone of which both have metrics of the same records of a set, or scores, in order.

        With ``scored`` these are also the records of the first of the seeds, for a bootstrap draws them once for all.
        """
        found = [
            {
                result.seed: result
                for result in row.results
                if (result.scores_of(key, n) if scored else str(n) in result.metrics.get(key, {}))
            }
            for row in (self, other)
            for n in [row.num_samples]
        ]
        one, two = found
        seeds = [seed for seed in one if seed in two and not one[seed].other_records(two[seed], key)]
        if scored:
            seeds = [seed for seed in seeds if not one[seed].other_records(one[seeds[0]], key)]
        first, second = ([of[seed] for seed in seeds] for of in found)
        return replace(self, results=first), replace(other, results=second)


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, its caption, the name of its file, and whether only the page shows it, as it is large."""

    caption: str
    svg: str
    name: str
    page_only: bool = False

    @classmethod
    def of(cls, dataset: str, what: str, figure: Figure, name: str, page_only: bool = False) -> Picture:
        """Of a figure about a data set."""
        return cls(f"{dataset}: {what}", evaluation.to_svg(figure), file_name(f"{dataset}-{name}"), page_only)


def report(folder: Path, html: Path | None = None, baseline: str | None = None, title: str | None = None) -> Path:
    """Write ``report.md`` with its pictures and ``metrics.json`` into a study's folder, and an HTML page.

    The runs' own files (``runs`` in the folder) go before what ``metrics.json`` has of them. Intervals and curves need
    the scores per example that those files hold; without them the tables alone are made.

    Args:
        folder: of the results, as `bloblora compare` wrote them.
        html: the page, with all pictures in it; default ``report.html`` in the folder.
        baseline: label of the method that the others are compared to; default the study's, or ``lora``.
        title: default the study's name, or the folder's.

    Returns:
        The page.

    Raises:
        RunError: there is no result, or none of the baseline that is given, or another process writes the same.
    """
    results = [result for result in read_results(folder) if "test" in result.metrics]  # a search's trials have none
    if not results:
        raise RunError(f"{folder}: no results in it of test data; give a folder that `bloblora compare` wrote")
    labels = {result.label: None for result in results}
    if baseline is not None and baseline not in labels:
        raise RunError(f"baseline {quoted(baseline)} is not one of the methods {', '.join(labels)}")
    given = [part for pair in {"--baseline": baseline, "--title": title}.items() if pair[1] for part in pair]
    file = folder / RUNS / STUDY_FILE
    study = read_json(file, RunError) if file.is_file() else read_study_metrics(folder).get("study", {})
    write_study_metrics(results, study, folder)
    baseline = baseline or study.get("baseline", Study.baseline)
    title, html = title or study.get("name", folder.name), html or folder / "report.html"
    order = list({baseline: None, **study.get("methods", {}), **labels})
    results.sort(key=lambda result: order.index(result.label))
    comparison = f"bloblora compare {study.get('file') or 'STUDY.yaml'} --data FOLDER --output {folder}"
    command = shlex.join(["bloblora", "report", str(folder), *map(str, given)])
    datasets: dict[str, list[Result]] = {}
    for result in results:
        datasets.setdefault(result.dataset, []).append(result)
    parts: list[str | Picture] = [f"# {title}\n"]
    parts += [f"{conclusion(dataset, _rows(of), baseline)}\n" for dataset, of in datasets.items()]
    parts += _missing(study, {result.name for result in results})
    parts += [f"Made by `{comparison}` and `{command}`.\n", *_setting(results)]
    for dataset, of in datasets.items():
        config = flat_options(of[0].config)
        several = {"model": study.get("models", ()), "max_steps": study.get("budgets", ())}
        place = {name: config.get(name, values[0]) for name, values in several.items() if len(values) > 1}
        parts += _sections(dataset, of, baseline, place)
    text = folder / "report.md"
    with alone(text), alone(html):
        for part in parts:
            if isinstance(part, Picture) and not part.page_only:
                write_text(folder / f"{part.name}.svg", part.svg)
        write_text(text, _markdown(part for part in parts if isinstance(part, str) or not part.page_only))
        write_text(html, _page(title, parts))
    return html


def conclusion(dataset: str, rows: Sequence[Row], baseline: str) -> str:
    """What the test NLL says, in one to three sentences, and no more than its intervals do."""
    reference = _reference(rows, baseline)
    pairs = {row.label: row.paired(reference or row, "test") for row in rows}
    nll = {
        label: (mean(one.values("test")["nll"]), mean(other.values("test")["nll"]))
        for label, (one, other) in pairs.items()
        if one.results
    }
    # the mean over the seeds of both, less the reference's, as seeds differ
    best = min(nll, key=lambda x: nll[x][0] - (nll[x][1] if reference and math.isfinite(nll[x][1]) else 0))
    said = f"**{dataset}**: “{best}” has the lowest NLL on test data, {nll[best][0]:.3f}"
    if reference is None:
        return f"{said}; there is no result of “{baseline}” to compare with."
    if best != reference.label:
        said += f", against {nll[best][1]:.3f} of “{reference.label}”"
        if len(pairs[best][1].results) < len(reference.results):
            said += f" with the same {_listed_seeds(pairs[best][1])}"
    if apart := [label for label in pairs if label not in nll]:
        said += f"; “{reference.label}” has no seed on the same records in common with {_names(apart)}"
    said += "."
    found = {
        row.label: evaluation.paired_bootstrap(one.scores("test"), other.scores("test"), "nll")
        for row in rows
        for one, other in [row.paired(reference, "test", scored=True)]
        if row.method != baseline and one.results
    }
    if not found:
        return f"{said} Without scores per example of both, nothing says whether a difference is more than chance."
    lower = [label for label, interval in found.items() if interval.high < 0]
    higher = [label for label, interval in found.items() if interval.low > 0]
    said += f" Against “{reference.label}”, " + (
        f"the 95 % interval of the difference is below 0 for {_names(lower)}"
        if lower
        else f"no method has a lower NLL by more than its 95 % interval, of {len(found)} compared"
    )
    said += f"; it is above 0 for {_names(higher)}." if higher else "."
    return (
        f"{said} Each interval is of one comparison over the seeds that both have, and of other test records, not of "
        f"other seeds ({_seeds(rows)})."
    )


def _names(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 5} more" if len(labels) > 5 else ""
    return ", ".join(f"“{label}”" for label in labels[:5]) + more


def _reference(rows: Sequence[Row], baseline: str) -> Row | None:
    """The baseline's row with the most draws."""
    return next((row for row in reversed(rows) if row.method == baseline), None)


def _sections(
    dataset: str, results: Sequence[Result], baseline: str, place: Mapping[str, Any]
) -> Iterator[str | Picture]:
    rows = _rows(results)
    sets = list(dict.fromkeys(key for result in results for key in result.metrics if key != "test"))
    labelled = [key for key in sets if any("nll" in row.values(key) for row in rows)]
    outside = ["test", *(key for key in sets if key not in labelled)]
    test = {row.label: {k: v for key in outside for k, v in row.values(key).items()} | _cost(row) for row in rows}
    most_draws = {row.method: row for row in sorted(rows, key=lambda row: row.num_samples)}
    yield f"\n## {dataset}\n"
    if place:
        yield f"With {_listed(place)}.\n"
    times = "Times are those of the fastest seed: other work ran beside."
    yield _table(f"Test data, {_seeds(rows)}. {_LEGEND} {times}", test, [*_measured(test), *_COST])
    more = evaluation.metric_names("more", outside=False)
    if any(name in row for name in more for row in test.values()):
        yield _table("More of calibration and selective prediction.", test, more)
    yield from _differences(rows, baseline, "test")
    yield from _learning(dataset, most_draws)
    yield from _validation(dataset, most_draws)
    yield from _chosen(list(most_draws.values()))
    yield from _pictures(dataset, rows, most_draws)
    for key in labelled:
        shifted = {row.label: row.values(key) for row in rows}
        text = f"Trained on {dataset}, tested on {key}; AUROC and FPR95 of telling the two apart. {_LEGEND}"
        yield f"\n## {dataset}: shift to {key}\n"
        yield _table(text, shifted, _measured(shifted))
        yield from _differences(rows, baseline, key)


def _measured(rows: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Columns of a first table: of the main metrics and those of detection those that any row has."""
    found = {name for row in rows.values() for name in row}
    names = [*evaluation.metric_names("main", outside=False), *evaluation.metric_names(outside=True)]
    return [name for name in names if name in found]


def _rows(results: Sequence[Result]) -> list[Row]:
    """A row a method and number of draws; one row for a method whose draws are all the same, whatever the seed."""
    by_method: dict[str, dict[int, list[Result]]] = {}
    for result in results:
        for key in result.metrics["test"]:
            by_method.setdefault(result.label, {}).setdefault(int(key), []).append(result)
    rows: dict[tuple[str, int], Row] = {}
    for method, by_samples in by_method.items():
        draws = {n: max(r.metrics["test"][str(n)]["num_draws"] for r in of) for n, of in sorted(by_samples.items())}
        points = {drawn for n, drawn in draws.items() if n > 1} == {1} or _is_deterministic(by_samples)
        for n, drawn in draws.items():
            count = round(drawn) if n and not points else 0  # an ensemble has no more draws than members
            label = method if points else f"{method}, N = {count}"
            rows.setdefault((method, count), Row(label, method, n, by_samples[n]))
    return list(rows.values())


def _is_deterministic(by_samples: Mapping[int, Sequence[Result]]) -> bool:
    """Whether the method of results is known to be one function."""
    (first, *_), *_ = by_samples.values()
    return (kind := METHODS.get(first.config["method"]["name"])) is not None and kind.deterministic


def _table(caption: str, rows: Mapping[str, Mapping[str, Sequence[float]]], columns: Sequence[str]) -> str:
    ranked = dict(sorted(rows.items(), key=lambda row: mean(row[1].get("nll", [math.inf]))))
    return f"\n{caption}\n\n{evaluation.markdown_table(ranked, columns, mark_best=True)}"


def _differences(rows: Sequence[Row], baseline: str, key: str) -> Iterator[str]:
    """How far each method is from the baseline on the same examples of one set."""
    if (reference := _reference(rows, baseline)) is None:
        return
    yield from _on_other_records(rows, reference, key)
    stored = {name for scores in reference.scores(key)[:1] for name in scores}
    if "confidence" in stored:
        stored.add("squared_calibration_error")
    compared = [name for name in evaluation.metric_names("main", outside=False) if name in stored]
    titles = {name: f"Δ {evaluation.METRICS[name].title}" for name in compared}
    pairs = [row.paired(reference, key, scored=True) for row in rows if row.method != baseline]
    found = {
        one.label: {
            title: evaluation.paired_bootstrap(one.scores(key), other.scores(key), name)
            for name, title in titles.items()
        }
        for one, other in pairs
        if one.results
    }
    if found:
        text = (
            f"Difference from {baseline} with a 95 % interval: bootstrap over the same examples, mean over the seeds "
            f"that both have ({_seeds([one for one, _ in pairs])})."
        )
        yield _table(text, found, list(titles.values()))  # type: ignore[arg-type]


def _on_other_records(rows: Sequence[Row], reference: Row, key: str) -> Iterator[str]:
    """Which methods can't be compared with the reference's, and what to do."""
    by_seed = {result.seed: result for result in reference.results if key in result.metrics}
    found = {
        (result.label, result.seed): ", ".join(names)
        for row in rows
        for result in row.results
        if key in result.metrics and result.seed in by_seed
        if (names := result.other_records(by_seed[result.seed], key))
    }
    for (label, seed), differing in found.items():
        yield (
            f"\n{reference.results[0].dataset}: “{label}” of seed {seed} was measured on other records of {key} than "
            f"“{reference.method}” ({differing} differ), and is not compared with it: run one of both again, or give "
            "other records as a data set of another name."
        )
    own = [*by_seed.values()]
    for result in own[1:]:
        if differing := ", ".join(result.other_records(own[0], key)):
            yield (
                f"\n{result.dataset}: seed {result.seed} of “{result.label}” was measured on other records of {key} "
                f"than seed {own[0].seed} ({differing} differ), and no interval is of both: run one of both again, or "
                "give other records as a data set of another name."
            )


def _learning(dataset: str, most_draws: Mapping[str, Row]) -> Iterator[str | Picture]:
    """How fast each method learns: its training NLL after each quarter of the steps, and drawn."""
    curves: dict[str, dict[float, list[float]]] = {}
    for method, row in most_draws.items():
        for step, nll in (point for result in row.results for point in result.training.get("curve", ())):
            curves.setdefault(method, {}).setdefault(step, []).append(nll)
    if not curves:
        return
    steps = sorted(set().union(*curves.values()))
    shown = [steps[round(quarter * (len(steps) - 1) / 4)] for quarter in range(5)]
    rows = {method: {f"step {step:g}": values for step, values in curve.items()} for method, curve in curves.items()}
    text = "Training NLL, mean since the log before, under the noise of the method's training."
    yield _table(text, rows, [f"step {step:g}" for step in dict.fromkeys(shown)])
    figure = evaluation.lines_figure(curves, "step", "training NLL")
    yield Picture.of(dataset, "training NLL against step, under the noise of training", figure, "learning", True)


def _validation(dataset: str, most_draws: Mapping[str, Row]) -> Iterator[str | Picture]:
    """Which checkpoint each method kept, and its validation NLL while it was trained."""
    curves: dict[str, dict[float, list[float]]] = {}
    rows: dict[str, dict[str, list[float]]] = {}
    for method, row in most_draws.items():
        found = [result.training["validation"] for result in row.results if "validation" in result.training]
        for one in (training for validation in found for training in validation["trainings"]):
            for key, name in (("best_step", "best step"), ("nll", "validation NLL"), ("accuracy", "accuracy")):
                if one[key] is not None:
                    rows.setdefault(method, {}).setdefault(name, []).append(one[key])
            for point in one["curve"]:
                curves.setdefault(method, {}).setdefault(point["step"], []).append(point["nll"])
        if found:
            rows[method]["share of the time"] = [validation["share_of_time"] for validation in found]
    if rows:
        columns = ["best step", "validation NLL", "accuracy", "share of the time"]
        yield _table("The checkpoint with the lowest validation NLL, which was kept.", rows, columns)
        figure = evaluation.lines_figure(curves, "step", "validation NLL")
        yield Picture.of(dataset, "validation NLL against step", figure, "validation", True)


def _chosen(rows: Sequence[Row]) -> Iterator[str]:
    """Test NLL of the step that validation chose, compared with the same training's last step."""
    pairs: dict[str, dict[bool, Row]] = {}
    for row in rows:
        found = [one for result in row.results for one in result.training.get("validation", {}).get("trainings", ())]
        if found:
            first = row.results[0]
            options = {**flat_options(first.config), **first.options, "eval_steps": None, "seed": None}
            at_end = all(len(one["curve"]) == 1 for one in found)
            pairs.setdefault(json.dumps(options, sort_keys=True), {})[at_end] = row
    table: dict[str, dict[str, list[float]]] = {}
    for pair in pairs.values():
        both = pair[False].paired(pair[True], "test") if len(pair) == 2 else ()
        if both and both[0].results:
            chosen, fixed = (row.values("test")["nll"] for row in both)
            differences = [a - b for a, b in zip(chosen, fixed, strict=True)]
            wrong = [float(difference > 0) for difference in differences]
            table[pair[False].label] = {"last step": fixed, "chosen step": chosen, "Δ": differences, "wrong": wrong}
    if table:
        text = (
            "Test NLL at the last step and at the step that validation chose; wrong: share of seeds with a higher one."
        )
        yield _table(text, table, ["last step", "chosen step", "Δ", "wrong"])


def _pictures(dataset: str, rows: Sequence[Row], most_draws: Mapping[str, Row]) -> Iterator[Picture]:
    classes = all("ece" in row.values("test") for row in rows)  # and not values, or several labels at once
    if pooled := {row.label: _pooled(row) for row in most_draws.values() if classes and row.scores("test")}:
        figure = evaluation.reliability_figure({label: evaluation.confidence_bins(*of) for label, of in pooled.items()})
        yield Picture.of(dataset, "reliability, all seeds together", figure, "reliability", True)
        figure = evaluation.risk_coverage_figure({label: evaluation.risk_coverage(*of) for label, of in pooled.items()})
        yield Picture.of(dataset, "risk against coverage, all seeds together", figure, "risk-coverage", True)
    lines = {name: _against_samples(rows, name) for name in (("ece", "nll") if classes else ("nll",))}
    if any(len(line) > 2 for line in lines["nll"].values()):
        for name, line in lines.items():
            title = evaluation.METRICS[name].title
            figure = evaluation.lines_figure(line, "number of draws N", title, xscale="symlog")
            yield Picture.of(dataset, f"{title} against N", figure, f"{name}-against-n")
    pareto = {"": {row.label: row for row in most_draws.values()}, **_by_prior_std(rows)}
    for method, of in pareto.items() if classes else ():
        values = {label: row.values("test") for label, row in of.items()}
        figure = evaluation.pareto_figure({label: (v["accuracy"], v["ece"]) for label, v in values.items()})
        what = f"accuracy against ECE{f' over prior_std ({method})' if method else ''}, to the lower right is better"
        yield Picture.of(dataset, what, figure, f"pareto-prior-std-{method}" if method else "pareto")


def _by_prior_std(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """By method what was run with three or more σp and otherwise equal options: its rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row.results[0].options.get("prior_std"), str):
            continue
        options = {**flat_options(row.results[0].config), **row.results[0].options, "prior_std": None, "seed": None}
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(row)
    found: dict[str, dict[str, Row]] = {}
    for group in groups.values():
        widths = {row.results[0].options.get("prior_std") for row in group}
        if len(widths) > 2:
            group.sort(key=lambda row: row.results[0].options["prior_std"])
            found[group[0].results[0].config["method"]["name"]] = {
                f"σp = {row.results[0].options['prior_std']:g}, N = {row.num_samples}": row for row in group
            }
    return found


def _against_samples(rows: Sequence[Row], name: str) -> dict[str, dict[float, list[float]]]:
    lines: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        lines.setdefault(row.method, {})[row.num_samples] = row.values("test")[name]
    return {label: line for label, line in lines.items() if len(line) > 1}


def _pooled(row: Row) -> tuple[Tensor, Tensor]:
    """Confidence of all seeds' answers and whether they are right."""
    scores = row.scores("test")
    return torch.cat([s["confidence"] for s in scores]), torch.cat([s["accuracy"] for s in scores]) > 0.5


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


def _versions(machine: Mapping[str, Any]) -> list[str]:
    return [f"{name} {machine[name]}" for name in ("torch", "transformers", "peft")]


def _setting(results: Sequence[Result]) -> Iterator[str]:
    """Machines, what all trainings share, and what each method adds."""
    machines = dict.fromkeys(
        ", ".join([m["cpu"], f"{m['threads']} threads", *([m["dtype"]] if "dtype" in m else []), *_versions(m)])
        for m in (result.machine for result in results)
    )
    yield f"\n## Setting\n\n- {len(results)} runs on {'; '.join(machines)}; all numbers are in {STUDY_METRICS_FILE}."
    if any("ece_floor" in found for result in results for found in result.metrics["test"].values()):
        yield f"- {_CALIBRATION}"
    if not all(result.scores for result in results):
        yield (
            f"- Of some runs only {STUDY_METRICS_FILE} is there. Intervals and reliability need their scores per "
            f"example, which `bloblora compare` leaves in {RUNS}."
        )
    first, *others = (flat_options(result.config).items() for result in results)
    yield "- All: " + _listed(dict(pair for pair in first if all(pair in other for other in others)))
    for label in dict.fromkeys(result.label for result in results):
        own = next(result for result in results if result.label == label)
        alike = [flat_options(result.config) for result in results if result.dataset == own.dataset]
        pairs = flat_options(own.config).items()
        given = {k: v for k, v in pairs if any(other.get(k) != v for other in alike) and k != "seed"}
        yield f"- {label}: " + _listed({"method": own.config["method"]["name"], **given, **own.options})


def _listed(options: Mapping[str, object]) -> str:
    return ", ".join(f"`{name}: {value}`" for name, value in options.items()) or "no options"


def _missing(study: Mapping[str, Any], there: Collection[str]) -> Iterator[str]:
    """Which runs of the study failed, and why, and which have no result."""
    planned = [*Study(**{option.name: study[option.name] for option in fields(Study)}).names()] if study else []
    errors = {name: error for name, error in study.get("errors", {}).items() if name in planned}
    left = [f"`{name}`" for name in planned if name not in there and name not in errors]
    if errors or left:
        lines = [f"- `{name}` failed: {error}" for name, error in errors.items()]
        lines += [f"- Not run: {', '.join(left)}"] if left else []
        yield f"Of {len(planned)} runs that the study has, {len(errors) + len(left)} lack results:\n"
        yield "\n".join(lines) + "\n"


def _seeds(rows: Sequence[Row]) -> str:
    """How many seeds there are, and of rows that lack some which they have."""
    every = {result.seed for row in rows for result in row.results}
    some: dict[str, list[str]] = {}
    for row in rows:
        if len(row.results) < len(every):
            some.setdefault(_listed_seeds(row), []).append(row.label)
    only = (f"but {seeds or 'none'} of {_names(labels)}" for seeds, labels in some.items())
    return ", ".join([f"{len(every)} seed{'s' if len(every) != 1 else ''}", *only])


def _listed_seeds(row: Row) -> str:
    seeds = sorted(result.seed for result in row.results)
    return f"seed{'s' if len(seeds) > 1 else ''} {' and '.join(map(str, seeds))}" if seeds else ""


def _markdown(parts: Iterable[str | Picture]) -> str:
    lines = (part if isinstance(part, str) else f"\n![{part.caption}]({part.name}.svg)" for part in parts)
    return "\n".join(lines).rstrip() + "\n"


def _page(title: str, parts: Sequence[str | Picture]) -> str:
    """The same as HTML, with the pictures in it; what looks like HTML in names stays text."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("js-default").render(_markdown(parts))
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    for part in parts:
        if isinstance(part, Picture):
            image = f'<p><img src="{part.name}.svg" alt="{escape(part.caption)}"></p>'
            body = body.replace(image, f"<figure>{part.svg}<figcaption>{escape(part.caption)}</figcaption></figure>")
    template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body=body)

"""What a study compares: one YAML file, and the runs that it asks for."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..files import parse_yaml, regular
from ..messages import quoted
from ..runs import RunConfig, RunError

_OWN_OPTIONS = {
    "model": "give `models`, a list, at the top of the file",
    "seed": "give `seeds`, a list, at the top of the file",
    "output": "`--output` of the command says where results go",
}


@dataclass(frozen=True)
class EvalSet:
    """Records to evaluate on.

    Args:
        data: as `RunConfig.data`.
        limit: use only this many, per label for classification: the same ones for every run.
        labelled: False for out-of-scope records, which serve the detection metrics alone.
        unused: of the training file, those records that training's ``limit`` leaves out.
    """

    data: str
    limit: int | None = None
    labelled: bool = True
    unused: bool = False


@dataclass(frozen=True)
class DataSet:
    """What is trained on, and what the result is evaluated on.

    Args:
        train: options of `RunConfig` for these data; ``data`` among them.
        test: in distribution.
        shifted: labelled sets of other distributions, by name.
        out_of_scope: records that are none of the labels'.
        validation: what `bloblora tune` looks at; ``{data: train.jsonl, unused: true}`` are the records of the training
            file that its ``limit`` leaves out.
    """

    train: Mapping[str, Any]
    test: EvalSet
    shifted: Mapping[str, EvalSet] = field(default_factory=dict)
    out_of_scope: EvalSet | None = None
    validation: EvalSet | None = None

    def sets(self) -> dict[str, EvalSet]:
        """All that a run is evaluated on, by name."""
        found = {"test": self.test, **self.shifted}
        return found if self.out_of_scope is None else {**found, "out_of_scope": self.out_of_scope}


@dataclass(frozen=True)
class Job:
    """One training and its evaluation.

    Attributes:
        name: of its files: data set, method and seed.
        dataset: name of the data set, and of the model and the steps where they aren't the study's first.
        label: the method's name in tables.
        config: the training.
        sets: what to evaluate on, by name.
        samples: numbers of draws N to report.
        batch_size: inputs a forward in evaluation.
        distances: whether sets are also told from ``test`` by the distance of hidden states.
    """

    name: str
    dataset: str
    label: str
    config: RunConfig
    sets: Mapping[str, EvalSet]
    samples: tuple[int, ...]
    batch_size: int
    distances: bool = False


@dataclass(frozen=True)
class Study:
    """A comparison: each method on each data set and model, with each seed.

    Args:
        name: title of the report.
        methods: options of `RunConfig` by the method's label; where ``method`` isn't among them, the label is it.
        datasets: by name.
        models: base models; those after the first are part of their runs' names.
        budgets: numbers of optimizer steps, likewise; each run is made with each of them. Without, ``steps`` says how
            many.
        seeds: of training.
        samples: numbers of draws N to report; the draws of a smaller N are the first of a larger one's.
        train: options of every training; a data set's go before them, a method's before both.
        baseline: label that the others are compared to.
        batch_size: inputs a forward in evaluation.
        distances: also tell sets from ``test`` by the distance of hidden states from those of the training data.
        keep_runs: leave trained models on disk; without, a run that is evaluated is deleted.
    """

    name: str
    methods: Mapping[str, Mapping[str, Any]]
    datasets: Mapping[str, DataSet]
    models: tuple[str, ...] = ("smollm2-135m",)
    budgets: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: tuple[int, ...] = (0, 10)
    train: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = "lora"
    batch_size: int = 32
    distances: bool = False
    keep_runs: bool = True

    def jobs(self, runs: str | os.PathLike[str], data: str | os.PathLike[str] = ".") -> list[Job]:
        """Every run, seed by seed, so that an unfinished study has whole rows.

        Args:
            runs: folder of the trained models.
            data: folder that relative paths of data files start from.

        Raises:
            RunError: an option that isn't one, or a value that it can't have, with the place in the file; the files of
                two runs would have one name; or ``data`` is no folder.
        """
        found = [
            self.job(dataset, model, label, seed, Path(runs), Path(data), steps)
            for dataset, model, label, seed, steps in self._each()
        ]
        alike = [job for job, count in Counter(job.name for job in found).items() if count > 1]
        if alike:
            raise RunError(f"methods, datasets: the files of two runs would be called {alike[0]}; rename one")
        return found

    def names(self) -> list[str]:
        """Those of every run, in the same order."""
        each = self._each()
        return [
            _run_name(self._place(dataset, model, steps), label, seed) for dataset, model, label, seed, steps in each
        ]

    def _each(self) -> Iterator[tuple[str, str, str, int, int | None]]:
        for seed in self.seeds:
            for dataset in self.datasets:
                for model in self.models:
                    for steps in self.budgets or (None,):
                        for label in self.methods:
                            yield dataset, model, label, seed, steps

    def _place(self, dataset: str, model: str, steps: int | None) -> list[str]:
        """The data set, and a model and steps that aren't the first ones: so that more of them can be added."""
        further = [model] if model != self.models[0] else []
        return [dataset, *further, *([f"{steps} steps"] if steps not in (None, *self.budgets[:1]) else [])]

    def job(
        self, dataset: str, model: str, label: str, seed: int, runs: Path, data: Path, steps: int | None = None
    ) -> Job:
        """One of them; arguments and errors as in `jobs`."""
        if not data.is_dir():  # else a file of the same name would be read from the present folder
            raise RunError(f"data: {quoted(str(data))} is not a folder")
        chosen = self.datasets[dataset]
        options = {**self.train, **chosen.train, **self.methods[label]}
        if not {"method", "preset"} & options.keys():
            options["method"] = label
        if steps is not None:
            options["steps"] = steps
        place = self._place(dataset, model, steps)
        name = _run_name(place, label, seed)
        options |= {"model": model, "seed": seed, "output": str(runs / name)}
        options["data"] = _locate(own := options["data"], data)
        if isinstance(validation := options.get("validation"), str) and validation != "auto":
            options["validation"] = _locate(validation, data)
        try:
            config = RunConfig.of(**options)
        except (TypeError, ValueError) as error:
            raise RunError(f"methods: {label} on {dataset}: {error}") from error
        sets = {key: located(value, data) for key, value in chosen.sets().items()}
        own_choice = [name for name in ("limit", "limit_seed") if name in self.methods[label]]
        for key, value in {**chosen.sets(), "validation": chosen.validation}.items():
            if value and value.unused and own_choice:
                raise RunError(
                    f"methods: {label}: {own_choice[0]!r} leaves other records unused than those of the other methods, "
                    f"and {key} of {dataset} are the unused ones; give it in the data set's 'train'"
                )
            if value and value.unused and (value.data != own or config.limit is None):
                raise RunError(
                    f"datasets: {dataset}: {key}: 'unused' is for the training file, {own}, and a 'limit' of it"
                )
        return Job(name, ", ".join(place), label, config, sets, self.samples, self.batch_size, self.distances)


def located(chosen: EvalSet, folder: Path) -> EvalSet:
    """The set with its file below ``folder``, where it is there."""
    return replace(chosen, data=_locate(chosen.data, folder))


def read_study(file: str | os.PathLike[str]) -> Study:
    """Read and check a study's YAML.

    Raises:
        RunError: the file can't be read, or a field is missing, unknown or of the wrong kind; the message names it.
    """
    try:
        content = parse_yaml(regular(Path(file)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: not readable as YAML: {error}") from error
    try:
        return _study(_mapping(content, "the file"), Path(file).stem)
    except RunError as error:
        raise RunError(f"{file}: {error}") from error


def _study(content: Mapping[str, Any], stem: str) -> Study:
    _check_fields(content, Study, "the file")
    for part in ("methods", "datasets"):
        if not content.get(part):
            raise RunError(f"field {quoted(part)} is missing; it lists what to compare")
    methods = {
        str(label): _options(options or {}, f"methods: {label}")
        for label, options in _mapping(content["methods"], "methods").items()
    }
    datasets = {str(name): _dataset(value, name) for name, value in _mapping(content["datasets"], "datasets").items()}
    if not isinstance(name := content.get("name", stem), str | int | float):
        raise RunError(f"name: {quoted(name)}; it must be a text")
    study = Study(
        **{
            **content,
            "name": str(name),
            "methods": methods,
            "datasets": datasets,
            "train": _options(content.get("train") or {}, "train"),
            "models": _sequence(content.get("models", Study.models), str, "models"),
            "budgets": _sequence(content["budgets"], int, "budgets") if content.get("budgets") else (),
            "seeds": _sequence(content.get("seeds", Study.seeds), int, "seeds"),
            "samples": tuple(sorted(_sequence(content.get("samples", Study.samples), int, "samples"))),
        }
    )
    if not isinstance(study.baseline, str) or study.baseline not in study.methods:
        raise RunError(f"baseline {quoted(study.baseline)} is not one of the methods {', '.join(study.methods)}")
    if study.samples[0] < 0:
        raise RunError(f"samples: {study.samples[0]} is negative; N is 0 (the mean) or more")
    if type(study.batch_size) is not int or study.batch_size < 1:
        raise RunError(f"batch_size: {quoted(study.batch_size)}; it must be a number of inputs, at least 1")
    for part in ("distances", "keep_runs"):
        if type(value := getattr(study, part)) is not bool:
            raise RunError(f"{part}: {quoted(value)}; it must be true or false")
    return study


def _dataset(value: Any, name: str) -> DataSet:
    where = f"datasets: {name}"
    content = _mapping(value, where)
    _check_fields(content, DataSet, where)
    for part in ("train", "test"):
        if content.get(part) is None:
            raise RunError(f"{where}: field {quoted(part)} is missing")
    train = _options(content["train"], f"{where}: train")
    if not isinstance(train.get("data"), str):
        raise RunError(f"{where}: train: field 'data': {quoted(train.get('data'))}; it must name a file or a data set")
    shifted = _mapping(content.get("shifted") or {}, f"{where}: shifted")
    if taken := {"test", "out_of_scope", "validation"} & shifted.keys():
        raise RunError(f"{where}: shifted: {quoted(taken.pop())} is the name of another set; choose one of its own")
    single = {
        part: _eval_set(content[part], f"{where}: {part}", labelled=part != "out_of_scope")
        for part in ("test", "out_of_scope", "validation")
        if content.get(part) is not None
    }
    for part in ("test", "validation"):
        if part in single and not single[part].labelled:
            raise RunError(f"{where}: {part}: field 'labelled': false; methods are measured by its labels")
    return DataSet(
        train=train, shifted={str(k): _eval_set(v, f"{where}: shifted: {k}") for k, v in shifted.items()}, **single
    )


def _eval_set(value: Any, where: str, labelled: bool = True) -> EvalSet:
    """A set as a mapping, or as its ``data`` alone."""
    content = {"data": value} if isinstance(value, str) else _mapping(value, where)
    _check_fields(content, EvalSet, where)
    if not isinstance(content.get("data"), str):
        raise RunError(f"{where}: field 'data': {quoted(content.get('data'))}; it must name a file or a data set")
    if (limit := content.get("limit")) is not None and (type(limit) is not int or limit < 1):
        raise RunError(f"{where}: field 'limit': {quoted(limit)}; it must be a number of records, at least 1")
    for name in ("labelled", "unused"):
        if type(value := content.get(name, False)) is not bool:
            raise RunError(f"{where}: field {name!r}: {quoted(value)}; it must be true or false")
    return EvalSet(**{"labelled": labelled, **content})


def _options(value: Any, where: str) -> dict[str, Any]:
    """Options of `RunConfig.of`, which checks them once a run's are complete; not those that the study sets itself."""
    options = dict(_mapping(value, where))
    for name, instead in _OWN_OPTIONS.items():
        if name in options:
            raise RunError(f"{where}: {quoted(name)} is for a single run; {instead}")
    return options


def _check_fields(content: Mapping[str, Any], kind: type, where: str) -> None:
    known = [option.name for option in fields(kind)]
    for name in content:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            meant = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise RunError(f"{where}: unknown field {quoted(name)}{meant}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RunError(f"{where}: {quoted(value)}; it must be a mapping of names to values")
    return value


def _sequence(value: Any, kind: type, where: str) -> tuple[Any, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or not all(type(item) is kind for item in values):
        raise RunError(f"{where}: {quoted(value)}; it must be a list of {kind.__name__}")
    if len(set(values)) < len(values):
        raise RunError(f"{where}: {quoted(value)}; each must be there once")
    return tuple(values)


def _locate(name: str, folder: Path) -> str:
    """A data file below ``folder`` where there is one, else the name, which may be a data set's."""
    return str(folder / name) if (folder / name).exists() else name


def _run_name(place: Sequence[str], label: str, seed: int) -> str:
    return "--".join(file_name(part) for part in (*place, label, f"seed{seed}"))


def file_name(text: str) -> str:
    """The text with what file systems and links may not bear replaced."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)

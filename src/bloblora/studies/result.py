"""What a run of a study leaves: one JSON file with its metrics, one safetensors file with its scores an example.

The JSON is all that tables need. The scores are for what pairs examples of two methods, or draws curves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import evaluation
from ..files import read_json, write_json, write_tensors
from ..prediction import Prediction
from ..runs import RunError

FORMAT_VERSION = 1
STUDY_FILE = "study.json"


@dataclass
class Result:
    """One run's results.

    Attributes:
        name: of the job, and of the files.
        dataset: name of the data set.
        label: the method's name in tables.
        config: the training's options, as given; data files without their folders.
        options: the method's options, with their defaults.
        training: ``seconds``, ``peak_memory_bytes``, ``num_examples``, ``final`` (the last log), ``curve`` (step and
            training NLL, mean since the log before).
        machine: processor, cores, threads and library versions.
        sets: ``data`` and ``limit`` of each set; results of earlier versions don't say.
        metrics: by set, then N: see `bloblora.evaluation.summary`.
        seconds: of predicting each set with the most draws.
        scores: an example: ``<set>/<N>/<score>``, (n,) float32.
    """

    name: str
    dataset: str
    label: str
    config: dict[str, Any]
    options: dict[str, Any]
    training: dict[str, Any]
    machine: dict[str, Any]
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    def lacks(self, sets: Mapping[str, Any], samples: tuple[int, ...]) -> bool:
        """Whether a set or a number of draws is missing."""
        return any(f"{key}/{n}/confidence" not in self.scores for key in sets for n in samples)

    def add(self, key: str, prediction: Prediction, targets: Tensor | None) -> None:
        """Add the scores of one set under one N, and its metrics where targets are known."""
        scores = evaluation.uncertainty(prediction)
        if targets is not None:
            scores |= evaluation.example_scores(prediction, targets)
            self.metrics.setdefault(key, {})[str(prediction.num_samples)] = evaluation.summary(prediction, targets)
        for name, values in scores.items():
            self.scores[f"{key}/{prediction.num_samples}/{name}"] = values.float()

    def scores_of(self, key: str, num_samples: int) -> dict[str, Tensor]:
        """The scores of one set under one N, by name; empty where there are none."""
        prefix = f"{key}/{num_samples}/"
        return {name.removeprefix(prefix): v for name, v in self.scores.items() if name.startswith(prefix)}


def write_result(result: Result, folder: Path) -> None:
    """Write both files; the JSON, by which a run counts as done, last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{result.name}.safetensors", dict(sorted(result.scores.items())))
    content = {key: value for key, value in vars(result).items() if key != "scores"}
    write_json(folder / f"{result.name}.json", {"format_version": FORMAT_VERSION, **content})


def read_result(folder: Path, name: str) -> Result | None:
    """A run's result, or None where there is none.

    Raises:
        RunError: a file is damaged, or of another version.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    content = read_json(file, RunError)
    if (found := content.pop("format_version", None)) != FORMAT_VERSION:
        raise RunError(f"{file}: format_version is {found!r}; this bloblora reads {FORMAT_VERSION}")
    try:
        return Result(**content, scores=load_file(file.with_suffix(".safetensors")))
    except (TypeError, OSError, SafetensorError) as error:
        raise RunError(f"{file}: it or its .safetensors can't be read: {error}; delete both to run again") from error


def read_results(folder: Path) -> Iterator[Result]:
    """All results in a folder, by name."""
    for file in sorted(folder.glob("*--*.json")):
        if (result := read_result(folder, file.stem)) is not None:
            yield result

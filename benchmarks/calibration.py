"""Does BLoB halve the calibration error of an overfitted LoRA? On ARC-Easy and on CLINC150 with few examples.

    python benchmarks/calibration.py --data FOLDER                  # the comparison, on test data
    python benchmarks/calibration.py --data FOLDER --published      # CLINC150 with the published code's settings
    python benchmarks/calibration.py --data FOLDER --search         # the choice of the settings, on validation data

FOLDER holds the public sets as JSON lines (``{"question", "choices", "answer"}`` and ``{"text", "label"}``):
arc_easy_train, arc_easy_test, clinc_small_train, clinc_small_val, clinc_small_test, clinc_small_oos. Each run is a
process of its own and writes a JSON file into results/calibration; a run that has its file is not repeated, a training
that was stopped goes on. The tables and diagrams in results/calibration are made from those files. The files of the
method "published_code" come from the authors' own repository, run beside this one on the same records, tokens, seeds.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bloblora import evaluation, runs
from bloblora.data import read_records
from bloblora.studies.job import cpu

RESULTS = Path(__file__).parents[1] / "results" / "calibration"
SETTINGS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "task": "choice_text",
        "normalization": "length",
        "limit": 640,
        "steps": 400,
        "batch_size": 8,
        "learning_rate": 2e-3,
    },
    "clinc150": {"task": "classification", "limit": 5, "steps": 300, "batch_size": 16, "learning_rate": 1e-3},
}
TRAIN = {"arc_easy": "arc_easy_train", "clinc150": "clinc_small_train"}
# The published code's training, but for the Trainer's clipping of gradients, which it lacks.
CLIPPED = {
    "estimator": "flipout",
    "optimizer_style": "alternating",
    "kl_weighting": "reweighted",
    "dataset_rescaling": True,
    "kl_scale": 16.0,  # it adds the KL to the mean NLL
    "kl_learning_rate": 0.01,
    "group_by_length": False,
}
PUBLISHED = {**CLIPPED, "max_grad_norm": 0.0}
_TITLES = {"published settings": PUBLISHED, "published settings, clipped gradients": CLIPPED}
# What --search tries instead of a set's settings.
_SUM = {"steps": 300, "normalization": "sum"}
_HEAD = {**_SUM, "targets": ["q_proj", "v_proj", "lm_head"]}
SEARCH: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "arc_easy": [(method, changed) for changed in ({"steps": 300}, _SUM, _HEAD) for method in ("lora", "blob")],
    "clinc150": [("lora", {}), ("blob", {}), ("blob", CLIPPED)],
}
NUM_OUT_OF_SCOPE = 500
_NAMES = {
    ("lora", 0): "LoRA",
    ("blob", 0): "BLoB, N = 0",
    ("blob", 10): "BLoB, N = 10",
    ("published_code", 0): "Published code, N = 0",
    ("published_code", 10): "Published code, N = 10",
}


@dataclass(frozen=True)
class Job:
    """One training and its evaluation."""

    name: str
    method: str
    seed: int = 0
    validation: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> str:
        """Name of the run's folder: one training serves validation and test."""
        values = {name: "+".join(value) if isinstance(value, list) else value for name, value in self.options.items()}
        changed = "".join(f"-{name}-{value}" for name, value in values.items())
        return f"{self.name}-{self.method}{changed}-seed{self.seed}"

    @property
    def key(self) -> str:
        """Name of the result's file."""
        return f"validation-{self.training}" if self.validation else self.training


def records_of(job: Job, data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Records to evaluate on, and out-of-scope ones where the set has a scope: the same for every seed and method."""
    if job.name == "clinc150":
        inside = read_records(data / f"clinc_small_{'val' if job.validation else 'test'}.jsonl")
        outside = None if job.validation else read_records(data / "clinc_small_oos.jsonl")[:NUM_OUT_OF_SCOPE]
        return runs.select(inside, 4 if job.validation else 5), outside
    if not job.validation:
        return runs.select(read_records(data / "arc_easy_test.jsonl"), 500), None
    everything = read_records(data / "arc_easy_train.jsonl")
    trained_on = {record["question"] for record in runs.select(everything, SETTINGS[job.name]["limit"])}
    return runs.select([record for record in everything if record["question"] not in trained_on], 400), None


def run(job: Job, data: Path, folder: Path) -> dict[str, Any]:
    """Train and evaluate."""
    config = runs.RunConfig.of(
        data=str(data / f"{TRAIN[job.name]}.jsonl"),
        output=str(folder),
        method=job.method,
        seed=job.seed,
        **{**SETTINGS[job.name], **job.options},
    )
    trained = runs.train(config)
    inside, outside = records_of(job, data)
    targets = runs.targets_of(trained.task, inside)
    # bins: how many predictions, their mean confidence and accuracy
    scores, bins = {}, {}
    for n in (n for method, n in _NAMES if method == job.method):
        near, *far = (
            trained.predict(records, n, job.seed, progress=True) for records in (inside, outside) if records is not None
        )
        scores[n] = evaluation.summary(near, targets, *far)
        found = evaluation.reliability(near.probabilities, targets)
        bins[n] = torch.stack([found.count, found.confidence, found.accuracy]).nan_to_num().T.tolist()
    return {
        "options": dict(job.options),
        "config": {**asdict(config), "data": TRAIN[job.name], "output": None},
        "training": trained.training,
        "metrics": scores,
        "reliability": bins,
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
    }


def report(folder: Path) -> str:
    """Markdown tables of all results that are there, mean ± standard deviation over seeds, and a diagram a set."""
    text = [
        "# Calibration of LoRA and BLoB\n",
        "Made by `python benchmarks/calibration.py`; settings, machine and versions are in the JSON files.\n",
    ]
    for name in SETTINGS:
        results = _read(folder, f"{name}-*.json")
        if results:
            text += [f"## {name}\n", f"Test data, {len({result['config']['seed'] for result in results})} seeds.\n"]
            text.append(_table(results))
            evaluation.reliability_diagram(_pooled(results), folder / f"{name}.png")
            text.append(f"![Reliability diagram of {name}]({name}.png)\n")
        searched = _read(folder, f"validation-{name}-*.json")
        if searched:
            text += [f"### {name}: the search\n", "Validation data, seed 0.\n", _table(searched)]
    return "\n".join(text)


def _table(results: list[dict[str, Any]]) -> str:
    rows: dict[str, dict[str, list[float]]] = {}
    for result in sorted(results, key=lambda result: (len(result["options"]), result["config"]["method"] != "lora")):
        for n in sorted(result["metrics"], key=int):
            _add(rows.setdefault(_label(result, n), {}), result, n)
    return evaluation.markdown_table(rows, _columns(rows))


def _label(result: dict[str, Any], n: str) -> str:
    options = result["options"]
    changed = ", ".join(f"{option} {value}" for option, value in options.items())
    extra = next((title for title, known in _TITLES.items() if options == known), changed)
    return f"{_NAMES[result['config']['method'], int(n)]}{extra and f': {extra}'}"


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(pattern))]


def _pooled(results: list[dict[str, Any]]) -> dict[str, evaluation.ReliabilityBins]:
    """Reliability of each method with the set's settings over the predictions of all seeds."""
    totals: dict[str, torch.Tensor] = {}
    for result in (result for result in results if not result["options"]):
        for n, rows in result["reliability"].items():
            label = _NAMES[result["config"]["method"], int(n)]
            bins = torch.tensor(rows, dtype=torch.float64)
            totals[label] = totals.get(label, 0) + torch.stack([bins[:, 0], *(bins[:, :1] * bins[:, 1:]).T])
    return {
        label: evaluation.ReliabilityBins(totals[label][0], *(totals[label][1:] / totals[label][0]))
        for label in _NAMES.values()
        if label in totals
    }


def _add(row: dict[str, list[float]], result: dict[str, Any], n: str) -> None:
    training = result["training"]
    cost = {
        "training NLL": training["final"]["nll"],
        "median Ω": training["final"].get("median_std"),
        "KL": training["final"].get("kl"),
        "minutes": training["seconds"] / 60,
        "peak GiB": training["peak_memory_bytes"] / 2**30,
    }
    for key, value in (result["metrics"][n] | cost).items():
        if value is not None:
            row.setdefault(key, []).append(value)


def _columns(rows: dict[str, dict[str, list[float]]]) -> list[str]:
    found = {column for row in rows.values() for column in row}
    order = ["accuracy", "ece", "nll", "brier", "auroc_confidence", "auroc_predictive_entropy"]
    order += ["auroc_mutual_information", "training NLL", "median Ω", "KL", "minutes", "peak GiB"]
    return [column for column in order if column in found]


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the JSON lines files")
    parser.add_argument("--search", action="store_true", help="try settings on validation data, seed 0")
    parser.add_argument("--published", action="store_true", help="the published settings, on CLINC150")
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=list(SETTINGS), help="which sets")
    parser.add_argument("--methods", choices=("lora", "blob"), nargs="+", default=["lora", "blob"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where result files go")
    parser.add_argument("--runs", type=Path, default=Path("runs/calibration"), help="where adapters go")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.search:
        jobs = [Job(n, method, 0, True, changed) for n in options.only for method, changed in SEARCH[n]]
        jobs = [job for job in jobs if job.method in options.methods]
    elif options.published:
        jobs = [Job("clinc150", "blob", s, options=chosen) for chosen in (PUBLISHED, CLIPPED) for s in options.seeds]
    else:
        jobs = [Job(n, method, seed) for seed in options.seeds for n in options.only for method in options.methods]
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.key}", flush=True)
        file = options.results / f"{job.key}.json"
        if not file.exists():
            # A process for each run: its peak memory is its own.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                runs.write_json(file, pool.submit(run, job, options.data, options.runs / job.training).result())
        (options.results / "README.md").write_text(report(options.results), encoding="utf-8")
    print(report(options.results))


if __name__ == "__main__":
    main()

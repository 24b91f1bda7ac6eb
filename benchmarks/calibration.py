"""Does BLoB halve the calibration error of an overfitted LoRA? On ARC-Easy and on CLINC150 with few examples.

    python benchmarks/calibration.py --data FOLDER [--only arc_easy] [--seeds 0 1 2]

FOLDER holds the public sets as JSON lines (``{"question", "choices", "answer"}`` and ``{"text", "label"}``):
arc_easy_train, arc_easy_test, clinc_small_train, clinc_small_test, clinc_small_oos. Each run is a process of its own
and writes ``results/calibration/<set>-<method>-seed<s>.json``; a run that has its file is not repeated, a training
that was stopped goes on. The tables in ``results/calibration/README.md`` are made from those files.
"""

import argparse
import json
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bloblora import evaluation, runs
from bloblora.data import read_records

SETS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "files": {"train": "arc_easy_train", "test": "arc_easy_test"},
        "options": {"task": "choice_text", "limit": 640, "steps": 400, "batch_size": 8},
        "test": 500,
    },
    "clinc150": {
        "files": {"train": "clinc_small_train", "test": "clinc_small_test", "out_of_scope": "clinc_small_oos"},
        "options": {"task": "classification", "limit": 5, "steps": 300, "batch_size": 16},
        "test": 10,
    },
}
METHODS = ("lora", "blob")
NUM_SAMPLES = {"lora": (0,), "blob": (0, 10)}
NUM_OUT_OF_SCOPE = 500
RESULTS = Path(__file__).parents[1] / "results" / "calibration"
_NAMES = {("lora", 0): "LoRA", ("blob", 0): "BLoB, N = 0", ("blob", 10): "BLoB, N = 10"}


def run(name: str, method: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train and evaluate one run."""
    setting = SETS[name]
    files = {part: str(data / f"{file}.jsonl") for part, file in setting["files"].items()}
    config = runs.TrainConfig(data=files["train"], output=str(folder), method=method, seed=seed, **setting["options"])
    trained = runs.train(config)
    inside = _test(read_records(files["test"]), setting["test"])
    outside = read_records(files["out_of_scope"])[:NUM_OUT_OF_SCOPE] if "out_of_scope" in files else None
    metrics = {str(n): runs.evaluate(trained, inside, outside, n, seed, progress=True) for n in NUM_SAMPLES[method]}
    return {
        "config": {**asdict(config), "data": setting["files"]["train"], "output": None},
        "training": trained.training,
        "metrics": metrics,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
    }


def report(folder: Path) -> str:
    """Markdown tables of all results that are there: mean ± standard deviation over seeds."""
    text = ["# Calibration of LoRA and BLoB\n", "Made by `python benchmarks/calibration.py --data FOLDER`.\n"]
    for name in SETS:
        rows: dict[str, dict[str, list[float]]] = {}
        for file in sorted(folder.glob(f"{name}-*-seed*.json")):
            result = json.loads(file.read_text())
            cost = {
                "training NLL": result["training"]["final"]["nll"],
                "training minutes": result["training"]["seconds"] / 60,
                "peak GiB": result["training"]["peak_memory_bytes"] / 2**30,
            }
            for n, metrics in result["metrics"].items():
                row = rows.setdefault(_NAMES[result["config"]["method"], int(n)], {})
                for key, value in (metrics | cost).items():
                    row.setdefault(key, []).append(value)
        if rows:
            seeds = max(len(row["accuracy"]) for row in rows.values())
            ordered = {label: rows[label] for label in _NAMES.values() if label in rows}
            text += [f"## {name}, {seeds} seeds\n", evaluation.markdown_table(ordered, _columns(rows))]
    return "\n".join(text)


def _test(records: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """``limit`` test records, per label for classification, the same for every run."""
    return runs.select(records, limit, seed=0)


def _columns(rows: dict[str, dict[str, list[float]]]) -> list[str]:
    found = {column for row in rows.values() for column in row}
    order = ["accuracy", "ece", "nll", "brier"]
    order += ["auroc_confidence", "auroc_predictive_entropy", "auroc_mutual_information"]
    return [column for column in [*order, "training NLL", "training minutes", "peak GiB"] if column in found]


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the JSON lines files")
    parser.add_argument("--only", choices=SETS, nargs="+", default=list(SETS), help="which sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where result files go")
    parser.add_argument("--runs", type=Path, default=Path("runs/calibration"), help="where adapters go")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    jobs = [(name, method, seed) for seed in options.seeds for name in options.only for method in METHODS]
    for number, (name, method, seed) in enumerate(jobs, start=1):
        key = f"{name}-{method}-seed{seed}"
        print(f"[{number}/{len(jobs)}] {key}", flush=True)
        if (options.results / f"{key}.json").exists():
            continue
        # A process for each run: its peak memory is its own.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(run, name, method, seed, options.data, options.runs / key).result()
        runs.write_json(options.results / f"{key}.json", result)
        (options.results / "README.md").write_text(report(options.results), encoding="utf-8")
    print(report(options.results))


if __name__ == "__main__":
    main()

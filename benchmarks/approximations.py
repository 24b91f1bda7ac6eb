"""What do cheaper predictions lose against N = 10 draws?

    python benchmarks/approximations.py --train FILE --test FILE --outside FILE     # {"text", "label"} records

Trains BLoB, and its distilled form, on a few examples a label with three seeds, and predicts the same test records by
ten forwards, by `predict`, by fewer draws, by pairs of mirrored draws, under `StoppingRule`, with `TopBlocks`,
linearized, and by the distilled LoRA. For each: accuracy, ECE, NLL, the AUROC of telling out-of-scope records apart,
draws an input, the time as a ratio to ten forwards in the same run (in batches, and one by one on a few records), and a
paired bootstrap of the difference from all ten draws.

Writes results/approximations/results.json and README.md; with the scores of each example, which git does not keep, the
files runs/seed<n>.json there. A seed that has its file is not repeated. With --missing, what the file lacks is measured
beside ten forwards of its own.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import keep, parser_of
from torch import Tensor

from bloblora import evaluation, models, runs, tasks
from bloblora.adapter import Posterior
from bloblora.data import read_records
from bloblora.files import read_json, write_json
from bloblora.prediction import Linearized, Prediction, Sampler, StoppingRule, TopBlocks, WeightDraws, predict
from bloblora.studies.job import machine

REFERENCE, EXACT, DISTILLED = "ten forwards", "predict, N = 10", "distilled"
MIRRORED_STOP = "mirrored, N = 4, stop, error 0.2, tolerance 0.1"
SEEDS, ALONE = (0, 1, 2), 40
NOT_OPTIONS = ("results", "runs", "seeds", "missing")
RULES = {
    f"stop, error {rule.error}, tolerance {rule.tolerance}": rule
    for rule in (StoppingRule(), StoppingRule(tolerance=0.1), StoppingRule(error=0.2, tolerance=0.1))
}


class OneByOne:
    """A posterior's draws, a forward each."""

    def __init__(self, posterior: Posterior) -> None:
        self.draw, self.mean = posterior.draw, posterior.mean


def variants(run: runs.Run, distilled: Callable[[], runs.Run]) -> dict[str, Callable[..., Prediction]]:
    """Ways to predict encoded examples."""
    assert isinstance(run.sampler, WeightDraws)
    posterior = run.sampler.weights
    assert isinstance(posterior, Posterior)

    def by(num_samples: int, sampler: Sampler, of: runs.Run = run, stop: StoppingRule | None = None) -> Any:
        return lambda examples, size: predict(
            of.model, examples, num_samples, task=run.task, sampler=sampler, stop=stop, batch_size=size
        )

    blocks = run.model.config.num_hidden_layers
    return {
        REFERENCE: by(10, WeightDraws(OneByOne(posterior))),
        EXACT: by(10, run.sampler),
        "predict, N = 5": by(5, run.sampler),
        "predict, N = 2": by(2, run.sampler),
        "mirrored, N = 4": by(4, WeightDraws(posterior, mirrored=True)),
        "mirrored, N = 2": by(2, WeightDraws(posterior, mirrored=True)),
        MIRRORED_STOP: by(4, WeightDraws(posterior, mirrored=True), stop=StoppingRule(0.2, 0.1, looks=(2,))),
        **{name: by(10, run.sampler, stop=rule) for name, rule in RULES.items()},
        **{
            f"top {number} of {blocks} blocks, N = 10": by(10, WeightDraws(TopBlocks(posterior, number)))
            for number in (max(1, blocks // part) for part in (2, 4, 8))
        },
        "linearized, two passes": by(10, Linearized(posterior)),
        DISTILLED: lambda examples, size: by(0, distilled().sampler, distilled())(examples, size),
        "the mean, N = 0": by(0, run.sampler),
    }


def train(method: str, seed: int, options: argparse.Namespace) -> runs.Run:
    """One run, from where it was stopped."""
    return runs.train(
        runs.RunConfig.of(
            data=options.train,
            output=str(options.runs / f"{method}-seed{seed}"),
            model=options.model,
            method=method,
            factors="A",
            head_prior_std="none",
            validation=0,
            limit=options.limit,
            steps=options.steps,
            learning_rate=options.learning_rate,
            seed=seed,
        )
    )


def measure(seed: int, options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Variants of one seed that aren't known, beside ten forwards: metrics, times, and scores an example."""
    run, distilled = train("blob", seed, options), cache(lambda: train("distilled", seed, options))
    inside = runs.select(read_records(options.test), options.test_limit)
    outside = runs.select(read_records(options.outside, require_labels=False), options.outside_limit)
    targets = runs.targets_of(run.task, inside)

    def encode(records: Any) -> list[dict[str, Any]]:
        unlabelled = [{k: v for k, v in record.items() if k != "label"} for record in records]
        return tasks.encode_all(run.task, unlabelled, run.tokenizer, progress=False)

    here, there = encode(inside), encode(outside)
    found: dict[str, Any] = {}
    ways = variants(run, distilled)
    for name, function in ways.items():
        if name in known and name != REFERENCE:
            continue
        start = time.perf_counter()
        prediction = function(here, options.batch_size)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        for example in here[:ALONE]:
            function([example], 1)
        alone = time.perf_counter() - start
        metrics = evaluation.summary(prediction, targets, function(there, options.batch_size))
        scores = evaluation.example_scores(prediction.log_probabilities, targets)
        base = found.get(REFERENCE, {"seconds": seconds, "seconds_one_by_one": alone})
        found[name] = {
            "metrics": metrics | {"draws": prediction.num_draws.double().mean().item()},
            "seconds": seconds,
            "seconds_one_by_one": alone,
            "time": seconds / base["seconds"],
            "time_one_by_one": alone / base["seconds_one_by_one"],
            "scores": {key: values.tolist() for key, values in scores.items()},
        }
        print(f"seed {seed}: {name}: {seconds:.1f} s, ECE {metrics['ece']:.3f}, NLL {metrics['nll']:.3f}", flush=True)
    if known and not torch.allclose(*(torch.tensor(v[REFERENCE]["scores"]["nll"]) for v in (known, found)), atol=1e-3):
        raise SystemExit(f"seed {seed}: its model is another on this machine; remove the file to start again")
    return {name: (found | known)[name] for name in ways}


def tables(results: list[dict[str, Any]]) -> str:
    """Quality and time of each variant."""

    def scores(name: str) -> list[dict[str, Tensor]]:
        return [
            {key: torch.tensor(values) for key, values in result["variants"][name]["scores"].items()}
            for result in results
        ]

    rows, differences = {}, {}
    for name in results[0]["variants"]:
        of = [result["variants"][name] for result in results]
        rows[name] = {
            **{key: [v["metrics"][key] for v in of] for key in ("accuracy", "ece", "nll", "auroc_confidence", "draws")},
            "time": [v["time"] for v in of],
            "time, one by one": [v["time_one_by_one"] for v in of],
        }
        if name not in (REFERENCE, EXACT):
            differences[name] = {
                f"Δ {key}": evaluation.paired_bootstrap(scores(name), scores(REFERENCE), key)  # type: ignore[arg-type]
                for key in ("accuracy", "squared_calibration_error", "nll")
            }
    first = next(iter(rows.values()))
    return (
        evaluation.markdown_table(rows, list(first))
        + "\nDifference from ten forwards with a 95 % interval: paired bootstrap over test examples.\n\n"
        + evaluation.markdown_table(differences, list(next(iter(differences.values()))))
    )


def main() -> None:
    """Measure what is missing, write, print."""
    parser = parser_of(__doc__, "approximations")
    parser.add_argument("--train", default="support_desk:train", help="records to train on")
    parser.add_argument("--test", default="support_desk:test", help="records to predict")
    parser.add_argument("--outside", default="support_desk:out_of_scope", help="records out of scope")
    parser.add_argument("--limit", type=int, help="of training records, per label")
    parser.add_argument("--test-limit", type=int, help="of test records, per label")
    parser.add_argument("--outside-limit", type=int)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--missing", action="store_true", help="measure variants that a seed's file lacks")
    parser.add_argument("--runs", type=Path, default=Path("runs/approximations"))
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        file = options.results / "runs" / f"seed{seed}.json"
        result = read_json(file, ValueError) if file.is_file() else {"variants": {}, "machine": machine()}
        if options.missing or not result["variants"]:
            shown = {k: Path(str(v)).name for k, v in vars(options).items() if k not in NOT_OPTIONS}
            found = measure(seed, options, result["variants"])
            write_json(file, {"options": shown, **result, "variants": found})
        results.append(read_json(file, ValueError))
    text = (
        "# Cheaper predictions against N = 10 draws\n\n"
        "Made by `python benchmarks/approximations.py`; options and machine are in results.json. Mean ± standard "
        f"deviation over {len(results)} seeds. Times are ratios to ten forwards, a draw each, in the same run: in "
        f"batches of {results[0]['options']['batch_size']}, and one record at a time.\n\n"
    )
    text += tables(results)
    for variant in (variant for result in results for variant in result["variants"].values()):
        del variant["scores"]
    keep(options.results, {f"seed {s}": result for s, result in zip(options.seeds, results, strict=True)}, text)
    print(text)


if __name__ == "__main__":
    main()

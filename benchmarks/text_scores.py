"""Which score tells right answers in text from wrong ones, and what is a probability of being right worth?

    python benchmarks/text_scores.py
    python benchmarks/text_scores.py --sets arc_easy openbookqa --folder DIR

``arithmetic`` is made by this program from a seed: additions of two- and of three-digit numbers, and days between two
dates, a third each, in turns; the answer's last number says whether it is right. ``arc_easy`` and ``openbookqa`` are
read from DIR/{arc_easy,obqa}_{train,test}.jsonl and answered in words; benchmarks/generation.py says what is right.
Each method is trained on the same questions in bfloat16, stopped in time on a fifth of them. The posterior mean, and of
an ensemble the first member, writes the answers, which the draws read; below each table is what changes where each
token is taken from the average over the draws. Other questions fit a map of each
score to the probability of being right, and p_correct, whose map cross-validation chooses among all; the test questions
measure it. Intervals are percentiles over resampled test questions: of these questions alone, not of trainings. What
results/text_scores/results.json has is not repeated, and a training that was stopped goes on.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
from common import alone, keep, kept, parser_of
from generation import is_right, to_text
from torch import Tensor

from bloblora import evaluation, runs
from bloblora.data import read_records
from bloblora.decision import CorrectnessError, confidence_of, fit_correctness
from bloblora.files import write_text
from bloblora.generation import Generation, find_agree, find_matcher
from bloblora.studies.job import machine

SETTINGS: dict[str, Any] = {"task": "generation", "batch_size": 8, "learning_rate": 1e-3}
SETTINGS |= {"validation": 0.2, "eval_steps": 20, "dtype": "bfloat16"}
METHODS = {"lora": "plain LoRA", "ensemble": "ensemble", "blob": "BLoB"}
FILES = {"arc_easy": "arc_easy", "openbookqa": "obqa"}
_BATCH = 16
_RESAMPLES = 1000


def additions_and_dates(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different questions with a number as their answer."""
    generator = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < number:
        if digits := (2, 3, 0)[len(found) % 3]:
            first, second = (generator.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            question, answer = f"What is {first} + {second}?", first + second
        else:
            answer = generator.randrange(1, 100)
            start = date(2001, 1, 1) + timedelta(days=generator.randrange(9000))
            days = (f"{day.day} {day:%B %Y}" for day in (start, start + timedelta(days=answer)))
            question = f"How many days are there from {' to '.join(days)}?"
        record = {"prompt": f"Question: {question}\nAnswer:", "response": str(answer)}
        found[question] = record | {"kind": f"{digits} digits" if digits else "days"}
    return [*found.values()]


def questions(name: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], ...]:
    """Questions to train on, to fit maps on, and to test."""
    counts = options.limit, options.calibration, options.questions
    if name == "arithmetic":
        records = iter(additions_and_dates(sum(counts)))
        return tuple([next(records) for _ in range(count)] for count in counts)
    files = (options.folder / f"{FILES[name]}_{part}.jsonl" for part in ("train", "test"))
    known, test = ([to_text(record) for record in read_records(file)] for file in files)
    known = runs.select(known, counts[0] + counts[1])
    return known[: counts[0]], known[counts[0] :], runs.select(test, counts[2])


def right_by(name: str) -> Callable[[str, dict[str, Any]], bool]:
    """Whether an answer to a record is right."""
    numeric = find_matcher("numeric")
    return is_right if name != "arithmetic" else lambda text, record: numeric(text, record["response"])


def run(name: str, method: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, answer and measure."""
    folder.mkdir(parents=True, exist_ok=True)
    training, calibration, test = questions(name, options)
    data, right = folder / "train.jsonl", right_by(name)
    write_text(data, "".join(json.dumps({k: r[k] for k in ("prompt", "response")}) + "\n" for r in training))
    settings = {**SETTINGS, "steps": options.steps, "model": options.model}
    if method == "ensemble":
        settings["members"] = options.samples
    config = runs.RunConfig.of(data=str(data), output=str(folder / "run"), method=method, seed=seed, **settings)
    trained = runs.train(config)
    samples = 0 if method == "lora" else options.samples
    how: dict[str, Any] = {"max_new_tokens": 8 if name == "arithmetic" else 24, "do_sample": False}
    how |= {"agree": find_agree("numeric" if name == "arithmetic" else "normalized"), "draws": samples > 0}

    def told(**asked: Any) -> list[tuple[Generation, Tensor]]:
        """The answers to each half, and whether they are right."""
        found = []
        for records in (calibration, test):
            written = trained.generate(records, samples, seed, batch_size=_BATCH, progress=True, **how | asked)
            found.append((written, torch.tensor([right(*pair) for pair in zip(written.texts, records, strict=True)])))
        return found

    fitted, tested = told(answers=options.answers, p_true=True)
    average: dict[str, Any] = {}
    if samples:
        of_fit, of_test = told(decoding="average", draws=False)
        average = {"accuracy": accuracies(of_test[1], test), "metrics": measured(*of_fit, *of_test)}
    return {
        "config": {**config.given(), "data": name, "output": None},
        "counts": [len(training), len(calibration), len(test)],
        "num_samples": samples,
        "num_answers": options.answers,
        "training": trained.training,
        "metrics": measured(*fitted, *tested),
        "accuracy": accuracies(tested[1], test),
        "average": average,
        "tokens_read": dict(costs(trained, test[:8], samples, options.answers, how)),
        "machine": machine(),
    }


def measured(written: Generation, right: Tensor, tested: Generation, outcome: Tensor) -> dict[str, Any]:
    """AUROC, AURC and Brier score of each score and of p_correct, with intervals, and what 0.8 means."""
    known, scores = written.scores(), tested.scores()
    maps = {name: {name: values} for name, values in known.items()} | {"p_correct": known}
    found: dict[str, Any] = {}
    for name, given in maps.items():
        try:
            fitted = fit_correctness(given, right, **({} if name == "p_correct" else {"maps": ("platt",)}))
        except CorrectnessError:  # the same of all texts, or too few are right
            continue
        p = fitted.probabilities(scores)
        confidence = p if name == "p_correct" else confidence_of(scores, name, None)
        found[name] = intervals(confidence, p, outcome)
        if name == "p_correct":
            found[name] |= {"map": f"{fitted.kind} of {', '.join(fitted.scores)}"} | above(p, outcome)
    return found


def intervals(confidence: Tensor, p: Tensor, right: Tensor) -> dict[str, list[float]]:
    """Each measure with the 2.5 and 97.5 percentiles over resampled questions."""
    generator = torch.Generator().manual_seed(0)
    everything = torch.arange(len(right))
    rows = [everything, *torch.randint(len(right), (_RESAMPLES, len(right)), generator=generator)]
    values: dict[str, list[float]] = {}
    for row in rows:
        own, ok = confidence[row], right[row]
        if ok.all() or not ok.any():
            continue
        ranked = evaluation.ood_metrics({"u": -own[ok]}, {"u": -own[~ok]})
        one = {"auroc": ranked["auroc_u"], "aurc": evaluation.risk_coverage(own, ok).aurc}
        one["brier"] = (p[row] - ok.double()).square().mean().item()
        for name, value in one.items():
            values.setdefault(name, []).append(value)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: [v[0], *torch.tensor(v[1:]).double().quantile(quantiles).tolist()] for name, v in values.items()}


def above(p: Tensor, right: Tensor, level: float = 0.8) -> dict[str, Any]:
    """Of the answers with p_correct of 0.8 and more how many there are, their mean p, and how many are right."""
    chosen = p >= level
    count = int(chosen.sum())
    result = {"count": count, "right": int(right[chosen].sum()), "mean_p": p[chosen].mean().item() if count else None}
    return {f"at_{level}": result}


def accuracies(right: Tensor, records: list[dict[str, Any]]) -> dict[str, float]:
    """Share of right answers, of all and of each kind of question."""
    kinds = sorted({record["kind"] for record in records if "kind" in record})
    rows = {kind: torch.tensor([record["kind"] == kind for record in records]) for kind in kinds}
    return {"all": right.double().mean().item()} | {k: right[row].double().mean().item() for k, row in rows.items()}


def costs(
    trained: runs.Run, records: list[dict[str, Any]], samples: int, answers: int, how: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    """Tokens that the model reads for a question: the answer, and what each group of scores adds."""
    read = [0]
    model: Any = trained.model
    last = model.get_base_model().model.layers[-1]  # blocks below may be shared by the draws
    hook = last.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[:2].numel()))
    plain = {**how, "draws": False}
    ways = {"answer": plain, "answers of draws": {**plain, "draws": True}} if samples else {"answer": plain}
    ways |= {f"{answers} sampled answers": {**plain, "answers": answers}, "P(True)": {**plain, "p_true": True}}
    least = 0.0
    for name, options in ways.items():
        read.clear()
        trained.generate(records, samples, 0, **options)
        tokens = sum(read) / len(records)
        yield name, tokens - least
        least = least or tokens
    hook.remove()


def report(results: dict[str, Any]) -> str:
    """Markdown tables of all results that are there."""
    text = [
        "# Scores of written answers\n",
        "Made by `python benchmarks/text_scores.py`, whose docstring says how; settings, machine and versions are in "
        "results.json. AUROC of right answers against wrong ones: 1 is perfect, 0.5 chance. AURC: less is better, the "
        "share of wrong answers is chance. Brier score of a Platt map of the score, fitted on other questions: less is "
        "better, a(1 - a) at an accuracy a says nothing. Brackets: 95 % intervals over test questions.\n",
    ]
    for name, result in results.items():
        counts = "{} questions to train on, {} for maps, {} to test".format(*result["counts"])
        text += [f"## {name}\n", f"{counts}; N = {result['num_samples']}, {result['num_answers']} sampled answers."]
        right = ", ".join(f"{value:.3f} ({kind})" for kind, value in result["accuracy"].items())
        text += [f"Right on test: {right}.\n"]
        if (p := result["metrics"].get("p_correct")) is None:
            text += ["No map: too few answers are right.\n"]
            continue
        at = p["at_0.8"]
        share = f", {at['right']} of them right; their mean p is {at['mean_p']:.3f}" if at["count"] else ""
        text += [f"`p_correct` is {p['map']}. At 0.8 and above: {at['count']} answers{share}.\n"]
        text += table(result["metrics"])
        if average := result["average"]:
            text += [f"\nBy the average {average['accuracy']['all']:.3f} are right, and of the scores:\n"]
            text += table(average["metrics"])
        read = ", ".join(f"{what} {tokens:.0f}" for what, tokens in result["tokens_read"].items())
        text += [f"\nTokens that the model reads for a question, each beside the answer's: {read}.\n"]
    return "\n".join(text)


def table(metrics: dict[str, dict[str, list[float]]]) -> list[str]:
    """A row for each score."""
    measures = {"auroc": "AUROC", "aurc": "AURC", "brier": "Brier"}
    lines = [f"| score | {' | '.join(measures.values())} |", "| --- | ---: | ---: | ---: |"]
    for score, found in metrics.items():
        cells = ("{:.3f} ({:.3f} to {:.3f})".format(*found[measure]) for measure in measures)
        lines.append(f"| {score} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = parser_of(__doc__, "text_scores")
    parser.add_argument("--sets", nargs="+", choices=("arithmetic", *FILES), default=["arithmetic"])
    parser.add_argument("--folder", type=Path, help="of the files of arc_easy and openbookqa")
    parser.add_argument("--model", default=runs.RunConfig.model)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=200, help="training questions")
    parser.add_argument("--calibration", type=int, default=150, help="questions for maps")
    parser.add_argument("--questions", type=int, default=150, help="test questions")
    parser.add_argument("--steps", type=int, default=100, help="most optimizer steps")
    parser.add_argument("--samples", type=int, default=3, help="weight samples N, and members of the ensemble")
    parser.add_argument("--answers", type=int, default=6, help="sampled answers")
    parser.add_argument("--runs", type=Path, default=Path("runs/text_scores"), help="where adapters go")
    options = parser.parse_args()
    if options.folder is None and {*options.sets} & {*FILES}:
        parser.error("--folder: give that of arc_easy_train.jsonl and the others")
    results = kept(options.results)
    for name in options.sets:
        for seed in options.seeds:
            for method in options.methods:
                key = f"{name}, {METHODS[method]}, seed {seed}"
                print(key, flush=True)
                if key not in results:
                    results[key] = alone(run, name, method, seed, options, options.runs / f"{name}-{method}-{seed}")
                keep(options.results, results, report(results))
    print(report(results))


if __name__ == "__main__":
    main()

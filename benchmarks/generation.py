"""Does uncertainty tell wrong free-form answers from right ones? SmolLM2-135M tuned on questions with short answers.

    python benchmarks/generation.py --data arc_easy_train.jsonl --test arc_easy_test.jsonl

The files hold ``{"question", "choices", "answer"}`` as JSON lines. The prompt lists the choices, without letters
and in the file's order, and the answer to write is the text of the right one. A written answer counts as right where,
without case, punctuation and articles, it is the right choice's text or holds it and no other choice's; everything else
is wrong. Each training and its evaluation is a process of its own; what results/generation/results.json has is not
repeated, a training that was stopped goes on. README.md there has the tables.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import alone, keep, kept, parser_of
from torch import Tensor

from bloblora import evaluation, runs
from bloblora.data import read_records
from bloblora.files import write_text
from bloblora.generation import Generation, normalized
from bloblora.prediction import average_draws
from bloblora.studies.job import machine
from bloblora.tasks import TextGeneration, encode_all

SETTINGS: dict[str, Any] = {"task": "generation", "steps": 150, "batch_size": 8, "learning_rate": 1e-3}
_NAMES = {("lora", 0): "LoRA", ("blob", 0): "BLoB, N = 0", ("blob", 5): "BLoB, N = 5"}
_BATCH = 16


def to_text(record: dict[str, Any]) -> dict[str, Any]:
    """A question with choices as a prompt and its response."""
    choices = "\n".join(f"- {choice}" for choice in record["choices"])
    prompt = f"Question: {record['question']}\nChoices:\n{choices}\nAnswer:"
    return {**record, "prompt": prompt, "response": record["choices"][record["answer"]]}


def is_right(text: str, record: dict[str, Any]) -> bool:
    """Whether a text is the right choice, or holds it and none of the others that it isn't itself a part of."""
    choices = [normalized(choice) for choice in record["choices"]]
    right, found = choices.pop(record["answer"]), normalized(text)
    others = any(_holds(found, other) and not _holds(right, other) for other in choices)
    return found == right or (_holds(found, right) and not others)


def run(method: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and evaluate."""
    folder.mkdir(parents=True, exist_ok=True)
    training = runs.select([to_text(record) for record in read_records(options.data)], options.limit)
    data = folder / "train.jsonl"
    write_text(data, "".join(json.dumps({k: r[k] for k in ("prompt", "response")}) + "\n" for r in training))
    settings = {**SETTINGS, "steps": options.steps, "model": options.model}
    config = runs.RunConfig.of(data=str(data), output=str(folder / "run"), method=method, seed=seed, **settings)
    trained = runs.train(config)
    records = runs.select([to_text(record) for record in read_records(options.test)], options.questions)
    metrics = {}
    for n in (n for name, n in _NAMES if name == method):
        written = trained.generate(
            records, n, seed, batch_size=_BATCH, progress=True, max_new_tokens=24, do_sample=False, draws=True
        )
        metrics[n] = {**answer_metrics(written, records), **token_metrics(trained, records, n, seed)}
    return {
        "config": {**config.given(), "data": options.data.name, "output": None},
        "num_training": len(training),
        "num_questions": len(records),
        "training": trained.training,
        "metrics": metrics,
        "machine": machine(),
    }


def answer_metrics(written: Generation, records: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy, and how each uncertainty ranks wrong answers above right ones."""
    pairs = zip(written.texts, records, strict=True)
    right = torch.tensor([is_right(text, record) for text, record in pairs])
    scores = written.scores()
    for name in ("log_probability", "sequence_log_probability", "agreement"):
        scores[name] = -scores[name]
    result = {"accuracy": right.double().mean().item()}
    for name, score in scores.items():
        result[f"aurc_{name}"] = evaluation.risk_coverage(-score, right).aurc
    if right.any() and not right.all():
        sides = ({name: score[of] for name, score in scores.items()} for of in (right, ~right))
        ranked = evaluation.ood_metrics(*sides)
        result |= {name: value for name, value in ranked.items() if name.startswith("auroc")}
    return result


@torch.no_grad()
def token_metrics(trained: runs.Run, records: list[dict[str, Any]], num_samples: int, seed: int) -> dict[str, float]:
    """ECE and perplexity of the next token, over the tokens of the right responses."""
    task = trained.task
    assert isinstance(task, TextGeneration)
    examples = sorted(encode_all(task, records, trained.tokenizer), key=task.length)
    confidence, right, nll = [], [], []
    for start in range(0, len(examples), _BATCH):
        batch = task.collate(examples[start : start + _BATCH])
        targets = batch["response_ids"]
        counted = targets >= 0

        def logits(batch: dict[str, Tensor] = batch, counted: Tensor = counted) -> Tensor:
            return task.token_logits(trained.model, batch)[counted]

        log_probs = average_draws(logits, trained.sampler, num_samples, seed)
        best, token = log_probs.max(-1)
        confidence.append(best.exp())
        right.append(token == targets[counted])
        nll.append(-log_probs.gather(-1, targets[counted, None]).squeeze(-1))
    bins = evaluation.confidence_bins(torch.cat(confidence), torch.cat(right))
    return {"token_ece": bins.ece, "perplexity": torch.cat(nll).double().mean().exp().item()}


def report(results: dict[str, Any]) -> str:
    """Markdown tables of all results that are there, mean ± standard deviation over seeds."""
    rows: dict[str, dict[str, list[float]]] = {}
    for result in results.values():
        for n, found in result["metrics"].items():
            row = rows.setdefault(_NAMES[result["config"]["method"]["name"], int(n)], {})
            for name, value in (found | {"minutes": result["training"]["seconds"] / 60}).items():
                row.setdefault(name, []).append(value)
    rows = {name: rows[name] for name in _NAMES.values() if name in rows}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    groups = {
        "Answers and tokens": ["accuracy", "perplexity", "token_ece", "minutes"],
        "AUROC of wrong answers against right ones, by uncertainty": [c for c in columns if c.startswith("auroc")],
        "Area under the risk-coverage curve, by uncertainty": [c for c in columns if c.startswith("aurc")],
    }
    text = [
        "# Uncertainty of written answers\n",
        "Made by `python benchmarks/generation.py`, whose docstring says what is right; settings, machine and versions "
        "are in results.json. AUROC: 1 is perfect, 0.5 chance; AURC: less is better, the error rate is chance. A "
        "single draw (LoRA, N = 0) has no mutual information, variance, agreement or draw semantic entropy.\n",
    ]
    for title, names in groups.items():
        if rows and names:
            shorter = {m: {_short(c): row[c] for c in names if c in row} for m, row in rows.items()}
            text += [f"## {title}\n", evaluation.markdown_table(shorter, [_short(c) for c in names])]
    return "\n".join(text)


def _short(column: str) -> str:
    return column.removeprefix("auroc_").removeprefix("aurc_").replace("_", " ")


def _holds(text: str, part: str) -> bool:
    """Whether a text holds another as whole words."""
    return f" {part} " in f" {text} "


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = parser_of(__doc__, "generation")
    parser.add_argument("--data", type=Path, required=True, help="training questions, JSON lines")
    parser.add_argument("--test", type=Path, required=True, help="test questions, JSON lines")
    parser.add_argument("--model", default=runs.RunConfig.model)
    parser.add_argument("--methods", choices=("lora", "blob"), nargs="+", default=["lora", "blob"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=640, help="training questions")
    parser.add_argument("--questions", type=int, default=200, help="test questions")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="optimizer steps")
    parser.add_argument("--runs", type=Path, default=Path("runs/generation"), help="where adapters go")
    options = parser.parse_args()
    results = kept(options.results)
    for seed in options.seeds:
        for method in options.methods:
            name = f"{method}-seed{seed}"
            print(name, flush=True)
            if name not in results:
                results[name] = alone(run, method, seed, options, options.runs / name)
            keep(options.results, results, report(results))
    print(report(results))


if __name__ == "__main__":
    main()

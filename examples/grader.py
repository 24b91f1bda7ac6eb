"""Grade multiple-choice answers and show which ones to check: a plain LoRA beside BLoB.

    python examples/grader.py                         # sums that this script makes, a toy problem
    python examples/grader.py --data questions.jsonl  # {"question": …, "choices": […], "answer": 0}
    python examples/grader.py --data arc_easy         # from the hub

A fifth of the questions is held out. The toy problem has a third set: sums of numbers larger than all training numbers,
where a calibrated model is less confident. Each choice is scored by its text.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from bloblora import evaluation, runs
from bloblora.data import read_records
from bloblora.models import DEFAULT_MODEL


def main(arguments: list[str] | None = None) -> None:
    """Train both on the same questions, and compare them on held-out ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="questions; default: sums")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=5, help="number of weight samples N")
    options = parser.parse_args(arguments)
    generator = random.Random(0)
    questions = read_records(options.data) if options.data else sums(generator, range(2, 20), 300)
    generator.shuffle(questions)
    count = len(questions) // 5
    sets = {"held out": questions[:count]}
    if not options.data:
        sets["larger numbers"] = sums(generator, range(60, 100), count)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder) / "train.jsonl"
        train.write_text("".join(json.dumps(question) + "\n" for question in questions[count:]), encoding="utf-8")
        for method, draws in (("lora", (0,)), ("blob", (0, options.samples))):
            output = str(Path(folder) / method)
            settings = {"model": options.model, "method": method, "steps": options.steps}
            run = runs.train(runs.RunConfig.of(data=str(train), output=output, **settings))
            for num_samples in draws:
                for name, records in sets.items():
                    row = f"{method}, N = {num_samples}: {name}" if method == "blob" else f"{method}: {name}"
                    rows[row] = measured(run, records, num_samples)
    Console().print(evaluation.rich_table(rows, f"{count} questions each", [*next(iter(rows.values()))]))


def measured(run: runs.Run, records: list[dict[str, Any]], num_samples: int) -> dict[str, float]:
    """Quality of the answers, confidence, and the accuracy if a fifth is handed to a person."""
    prediction = run.predict(records, num_samples, progress=True)
    found = evaluation.summary(prediction, runs.targets_of(run.task, records))
    sure = {
        "confidence": prediction.confidence.mean().item(),
        "epistemic": prediction.mutual_information.mean().item(),
    }
    return {name: found[name] for name in ("accuracy", "ece", "nll", "selective_accuracy_80")} | sure


def sums(generator: random.Random, numbers: range, count: int) -> list[dict[str, Any]]:
    """Questions such as "7 + 5 =" with four different choices near the sum."""
    questions = []
    for a, b in (generator.choices(numbers, k=2) for _ in range(count)):
        near = [a + b + offset for offset in generator.sample((-10, -2, -1, 1, 2, 10), 3)]
        choices = generator.sample([a + b, *near], 4)
        record = {"question": f"{a} + {b} =", "choices": [str(n) for n in choices], "answer": choices.index(a + b)}
        questions.append(record)
    return questions


if __name__ == "__main__":
    main()

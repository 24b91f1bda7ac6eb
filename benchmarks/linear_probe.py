"""Is a LoRA needed at all? A logistic regression on the base model's hidden states, as strong as it can be made.

    python benchmarks/linear_probe.py
    python benchmarks/linear_probe.py --folder DIR      # CLINC150 too: DIR/clinc_small_{train,test}.jsonl

The records are those of benchmarks/studies/support_desk.yaml and in_time.yaml: the same to train on, to choose on and
to test. Features are the last layer's hidden state of the text's last token, their mean over its tokens, or that of
the last token of the template that asks for one word, which is what the head of a LoRA reads by default; as they are
(in units of their root mean square) or standardized. Each has a weight decay and a temperature: those with the lowest
NLL of the validation records. Nothing is drawn at random. Minutes on one core.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import keep, parser_of
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from bloblora import models, runs
from bloblora.data import read_records
from bloblora.evaluation import markdown_table
from bloblora.prediction import fit_temperature
from bloblora.runs.selection import split
from bloblora.studies.job import machine
from bloblora.tasks.text_head import ONE_WORD

CLINC = {"clinc150": (7, 0.2857, 3), "clinc150, 20 an intent": (20, 0.2, 10)}
"""Records an intent to train and choose on, the share of those to choose on, and records an intent to test."""
DECAYS = [10.0 ** (power / 2) for power in range(-8, 6)]


def records_of(options: argparse.Namespace) -> dict[str, Sequence[list[dict[str, Any]]]]:
    """Records to train on, to choose on and to test, by data set."""
    found = {"support_desk": [read_records(f"support_desk:{part}") for part in ("train", "validation", "test")]}
    if options.folder is not None:
        known, test = (read_records(str(options.folder / f"clinc_small_{part}.jsonl")) for part in ("train", "test"))
        for name, (limit, share, tested) in CLINC.items():
            found[name] = [*split(runs.select(known, limit), share), runs.select(test, tested)]
    return found


@torch.no_grad()
def features(model: Any, tokenizer: Any, records: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """By name the hidden states (n, h) of each text."""

    def states_of(text: str) -> Tensor:
        states: Tensor = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].double()
        return states

    alone = [states_of(record["text"]) for record in records]
    asked = [states_of(ONE_WORD.format(text=record["text"])) for record in records]
    return {
        "last token": torch.stack([states[-1] for states in alone]),
        "mean of tokens": torch.stack([states.mean(0) for states in alone]),
        "in one word": torch.stack([states[-1] for states in asked]),
    }


def probe(inputs: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, float]:
    """Accuracy and NLL on the test records of the best of all weight decays."""
    found = []
    for inverse in DECAYS:
        fitted = LogisticRegression(C=inverse, max_iter=10_000).fit(inputs[0], labels[0])
        chosen, tested = (torch.as_tensor(fitted.decision_function(rows)) for rows in inputs[1:])
        temperature = fit_temperature([chosen[None]], [labels[1]])
        nlls = [nll(logits / temperature, right) for logits, right in ((chosen, labels[1]), (tested, labels[2]))]
        accuracy = (tested.argmax(-1) == labels[2]).double().mean().item()
        names = ("validation NLL", "accuracy", "nll", "C", "temperature")
        found.append(dict(zip(names, (nlls[0], accuracy, nlls[1], inverse, temperature), strict=True)))
    return min(found, key=lambda one: one["validation NLL"])


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean NLL, nats."""
    return torch.nn.functional.cross_entropy(logits, labels).item()


def main() -> None:
    """Measure, write, print."""
    parser = parser_of(__doc__, "linear_probe")
    parser.add_argument("--folder", type=Path, help="of the files of CLINC150")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    options = parser.parse_args()
    tokenizer = models.load_tokenizer(options.model)
    model = models.load_model(options.model, num_labels=2).base_model.eval()
    results, text = {}, ""
    for name, parts in records_of(options).items():
        labels = sorted({record["label"] for record in parts[0]})
        targets = [torch.tensor([labels.index(record["label"]) for record in records]) for records in parts]
        states = [features(model, tokenizer, records) for records in parts]
        found = {}
        for where, standard in itertools.product(states[0], (False, True)):
            inputs = [of_part[where] for of_part in states]
            if standard:
                scaler = StandardScaler().fit(inputs[0])
                inputs = [torch.as_tensor(scaler.transform(rows)) for rows in inputs]
            else:
                inputs = [rows / inputs[0].square().mean().sqrt() for rows in inputs]
            found[f"{where}, standardized" if standard else where] = probe(inputs, targets)
        results[name] = {"counts": [len(records) for records in parts], "probes": found}
        rows = {kind: {key: [value] for key, value in values.items()} for kind, values in found.items()}
        table = markdown_table(rows, [*next(iter(rows.values()))])
        text += f"\n## {name}\n\n{' / '.join(map(str, results[name]['counts']))} records.\n\n{table}"
        print(table)
    about = "Made by `python benchmarks/linear_probe.py`, whose docstring says how; machine and versions: results.json."
    keep(options.results, {"results": results, "machine": machine()}, f"# Linear probes\n\n{about}\n{text}")


if __name__ == "__main__":
    main()

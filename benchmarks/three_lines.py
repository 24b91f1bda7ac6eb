"""What do README's lines change in a PEFT script? Probabilities of its model, and of the same script without them.

    python benchmarks/three_lines.py

The script of README, the same with a Gaussian head in place of class means, and with transformers' own Trainer in place
of ours: 288 queries of the support desk, 200 steps, q and v of all blocks, float32. All have the validation queries;
with the Trainer a temperature is fitted on them by hand, in a row of its own, and ours are also shown without the
temperature that it fits. "Joined" is with `join_eval_dataset` after the training. N = 0 is the posterior mean. Some
five minutes a training on one core, and as much to predict with samples of A. What results/three_lines/results.json has
is not repeated.
"""

from typing import Any

import torch
from common import alone, keep, kept, parser_of
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from bloblora import BlobConfig, BlobTrainer, BlobTrainingArguments, bayesianize, data, find_posterior, models, predict
from bloblora.evaluation import markdown_table, summary
from bloblora.prediction import Prediction, fit_temperature
from bloblora.studies.job import machine

SHOWN = ("accuracy", "nll", "ece", "ece_floor", "confidence", "auroc_predictive_entropy", "auroc_mutual_information")


KINDS: dict[str, BlobConfig | None] = {
    "LoRA, Trainer": None,
    "BlobTrainer, a Gaussian head": BlobConfig(head_prior_std="auto"),
    "BlobTrainer": BlobConfig(),
}
"""What a script makes of the adapter."""


def run(kind: str, seed: int, steps: int) -> dict[str, Any]:
    """Train as README does, and measure."""
    config = KINDS[kind]
    splits = {name: data.support_desk(name) for name in ("train", "validation", "test", "out_of_scope")}
    labels = sorted({record["label"] for record in splits["train"]})
    tokenizer = models.load_tokenizer("smollm2-135m")
    examples = {
        name: [{**tokenizer(record["text"]), "labels": labels.index(record["label"])} for record in splits[name]]
        for name in ("train", "validation")
    }
    torch.manual_seed(seed)
    base = models.load_model("smollm2-135m", num_labels=len(labels))
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    if config is not None:
        bayesianize(model, config)
    of_trainer, of_arguments = (Trainer, TrainingArguments) if config is None else (BlobTrainer, BlobTrainingArguments)
    more: dict[str, Any] = {"save_strategy": "no", "report_to": [], "use_cpu": True}
    arguments = of_arguments("out", max_steps=steps, learning_rate=2e-3, seed=seed, **more)
    trainer: Any = of_trainer(
        model,
        arguments,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    right = torch.tensor([labels.index(record["label"]) for record in splits["test"]])

    def measured(num_samples: int, temperature: float | None = None) -> dict[str, float]:
        tested, outside = (
            scaled(predict(model, splits[name], num_samples, tokenizer=tokenizer), temperature)
            for name in ("test", "out_of_scope")
        )
        return {"confidence": tested.confidence.mean().item(), **summary(tested, right, outside)}

    if config is None:
        known = torch.tensor([example["labels"] for example in examples["validation"]])
        temperature = fit_temperature(
            [predict(model, splits["validation"], 0, tokenizer=tokenizer).draw_logits()], [known]
        )
        return {"temperatures": [temperature], "rows": {"": measured(0), "temperature": measured(0, temperature)}}
    posterior = find_posterior(model)
    assert posterior is not None
    assert posterior.temperatures is not None
    temperatures = posterior.temperatures
    rows = {f"N = {draws}": measured(draws) for draws in (0, 10)}
    posterior.temperatures = None
    rows |= {f"N = {draws}, without the temperature": measured(draws) for draws in (0, 10)}
    if trainer.join_eval_dataset():
        posterior.temperatures = temperatures
        rows |= {f"N = {draws}, validation queries joined": measured(draws) for draws in (0, 10)}
    return {"temperatures": [*temperatures], "rows": rows}


def scaled(prediction: Prediction, temperature: float | None) -> Prediction:
    """The prediction of one function, over a temperature."""
    if temperature is None:
        return prediction
    logits: Tensor = prediction.draw_logits() / temperature
    return Prediction(logits.log_softmax(-1), prediction.num_samples)


def main() -> None:
    """Measure what is missing, write, print."""
    parser = parser_of(__doc__, "three_lines")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    results = kept(options.results) or {"machine": machine(), "steps": options.steps, "runs": {}}
    for seed in options.seeds:
        for name in options.kinds:
            if f"{name}, seed {seed}" not in results["runs"]:
                results["runs"][f"{name}, seed {seed}"] = alone(run, name, seed, options.steps)
                keep(options.results, results, report(results))
    print(report(results))


def report(results: dict[str, Any]) -> str:
    """The table: each value of all seeds."""
    rows: dict[str, dict[str, list[float]]] = {}
    for name, found in results["runs"].items():
        kind, _, _ = name.rpartition(", seed ")
        for what, values in found["rows"].items():
            row = rows.setdefault(", ".join(part for part in (kind, what) if part), {key: [] for key in SHOWN})
            for key in SHOWN:
                row[key] += [values[key]] if values["num_samples"] or not key.endswith("information") else []
    shown = {name: {key: values for key, values in row.items() if values} for name, row in rows.items()}
    about = "Made by `python benchmarks/three_lines.py`, whose docstring says how; machine and versions: results.json."
    table = markdown_table(dict(sorted(shown.items())), [*SHOWN])
    return f"# README's lines\n\n{about} Mean ± standard deviation over seeds.\n\n{table}"


if __name__ == "__main__":
    main()

"""Which noise and which factor give the quietest gradient, and what does a step cost?

    python benchmarks/gradient_noise.py --data FILE.jsonl       # {"text", "label"} records; default the embedded ones

On one model and one batch, for each estimator of BLoB's noise (independent, flipout, shared, local) and for the other
choices of what is Gaussian (B; A and B), at the start of training and after some steps of it:

- noise of the gradient: tr Cov(g) / ‖E g‖², over draws of the noise with the data fixed, with a jackknife standard
  error; with respect to LoRA's A and B (their means where they are Gaussian);
- time of a forward and backward, as a ratio to plain LoRA's: medians over rounds in which all take turns.

Writes results/gradient_noise/results.json and README.md.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from bloblora import BlobConfig, bayesianize, evaluation, models, runs, tasks
from bloblora.data import read_records
from bloblora.methods import METHODS, Training
from bloblora.studies.job import cpu

RESULTS = Path(__file__).parents[1] / "results" / "gradient_noise"
VARIANTS = {
    "A, independent": BlobConfig(estimator="independent"),
    "A, flipout": BlobConfig(estimator="flipout"),
    "A, shared": BlobConfig(estimator="shared"),
    "A, local": BlobConfig(estimator="local"),
    "B, independent": BlobConfig(factors="B"),
    "A and B, independent": BlobConfig(factors="AB"),
}
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type=TaskType.SEQ_CLS)


def variant_of(trained: PeftModel, config: BlobConfig, std: float) -> PeftModel:
    """The trained LoRA with a posterior around it in which every Ω is ``std``."""
    model = copy.deepcopy(trained)
    posterior = bayesianize(model, config)
    with torch.no_grad():
        for parameter in posterior.named_std_parameters().values():
            parameter.fill_(std**0.5)
    return model.train()


def gradient(model: nn.Module, task: tasks.Task, batch: dict[str, Tensor]) -> Tensor:
    """Gradient of the NLL with respect to LoRA's A and B, flat."""
    loss = F.cross_entropy(task.logits(model, batch), batch["labels"])
    parameters = [p for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def noise(draw: Callable[[], Tensor], draws: int) -> tuple[float, float]:
    """tr Cov(g)/‖E g‖² over draws of the noise, and its jackknife standard error.

    Of n gradients, with their Gram matrix G, the unbiased ‖E g‖² is the mean of G off its diagonal.
    """
    gradients = torch.stack([draw() for _ in range(draws)]).double()
    gram = gradients @ gradients.T

    def ratio(rows: Tensor) -> float:
        part = gram[rows][:, rows]
        n = len(rows)
        mean_square = (part.sum() - part.trace()) / (n * (n - 1))
        return ((part.trace() / n - mean_square) / mean_square).item()

    everything = torch.arange(draws)
    left_out = [ratio(everything[everything != i]) for i in range(draws)]
    error = ((draws - 1) / draws * sum((x - statistics.mean(left_out)) ** 2 for x in left_out)) ** 0.5
    return ratio(everything), error


def times(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function; in each round all take turns, in another order."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        names = [*functions]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            functions[name]()
            if number:  # the first round warms up
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="support_desk:train", help="records to train on and to take the batch from")
    parser.add_argument("--limit", type=int, help="of records, per label")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=100, help="of plain LoRA before the second measurement")
    parser.add_argument("--draws", type=int, default=48, help="gradients of each variant")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--std", type=float, default=0.05, help="Ω of every entry")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    records = runs.select(read_records(options.data), options.limit)
    tokenizer = models.load_tokenizer(options.model)
    task = tasks.build_task("classification", records, tokenizer)
    examples = tasks.encode_all(task, records, tokenizer, progress=False)
    set_seed(0)
    lora = get_peft_model(models.load_model(options.model, num_labels=len(task.labels or ())), LORA)
    batch = task.collate(examples[:: max(1, len(examples) // options.batch_size)][: options.batch_size])

    results: dict[str, Any] = {"noise": {}, "options": {k: str(v) for k, v in vars(options).items() if k != "results"}}
    for state in ("start", f"after {options.steps} steps"):
        if state != "start":
            arguments = {
                "output_dir": str(options.results / "checkpoints"),
                "max_steps": options.steps,
                "learning_rate": 1e-3,
                "save_strategy": "no",
                "logging_steps": 1,
                "seed": 0,
                "report_to": [],
            }
            METHODS["lora"]().fit(lora, Training(task, examples, arguments))
        for name, config in VARIANTS.items():
            model = variant_of(lora, config, options.std)
            torch.manual_seed(0)
            ratio, error = noise(lambda model=model: gradient(model, task, batch), options.draws)
            results["noise"].setdefault(name, {})[state] = {"ratio": ratio, "standard_error": error}
            print(f"{state}: {name}: {ratio:.3g} ± {error:.2g}", flush=True)
    steps = {"plain LoRA": lora.train()} | {name: variant_of(lora, c, options.std) for name, c in VARIANTS.items()}
    seconds = times({n: lambda m=m: gradient(m, task, batch) for n, m in steps.items()}, options.rounds)
    plain = seconds["plain LoRA"]
    ratios = {name: [a / b for a, b in zip(values, plain, strict=True)] for name, values in seconds.items()}
    results["seconds"] = seconds
    results["machine"] = {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    rows: dict[str, dict[str, Any]] = {}
    for name in steps:
        rows[name] = {"time / plain LoRA": statistics.median(ratios[name])}
        quartiles = statistics.quantiles(ratios[name], n=4)
        rows[name] |= {"lower quartile": quartiles[0], "upper quartile": quartiles[2]}
        for state, found in results["noise"].get(name, {}).items():
            rows[name][f"noise, {state}"] = found["ratio"]
            rows[name][f"± {state}"] = found["standard_error"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in reversed(row)))[::-1]
    text = (
        "# Noise of the gradient, and time of a step\n\n"
        "Made by `python benchmarks/gradient_noise.py`; options and machine are in results.json. Noise is tr Cov(g) / "
        f"‖E g‖² over {options.draws} draws with the data fixed, ± its standard error; every Ω is {options.std}.\n\n"
    )
    runs.write_json(options.results / "results.json", results)
    (options.results / "README.md").write_text(text + evaluation.markdown_table(rows, columns), encoding="utf-8")
    print(evaluation.markdown_table(rows, columns))


if __name__ == "__main__":
    main()

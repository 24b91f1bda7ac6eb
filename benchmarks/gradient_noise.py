"""Which noise and which factor give the quietest gradient, and what does a step cost?

    python benchmarks/gradient_noise.py --data FILE.jsonl       # {"text", "label"} records; default the embedded ones

For each estimator of BLoB's noise (independent, flipout, shared, local) and for the other choices of what is Gaussian
(B; A and B), at the start of training and after some steps of it, with each seed (of LoRA's start, its training, and
the batch), with every Ω small (0.05) and as large as where trainings of 200 steps end (0.17):

- noise of the gradient: tr Cov(g) / ‖E g‖², over draws of the noise with the data fixed, with a jackknife standard
  error; with respect to LoRA's A and B (their means where they are Gaussian). The table shows it as the signal's share,
  ‖E g‖² / E‖g‖² = 1 / (1 + noise), which stays finite where next to nothing is signal;
- time of a forward and backward, as a ratio to plain LoRA's: medians over rounds in which all take turns.

Writes results/gradient_noise/results.json as it goes, goes on from there, and README.md.
"""

import copy
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import keep, kept, parser_of, times
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from bloblora import BlobConfig, bayesianize, evaluation, models, runs, tasks
from bloblora.data import read_records
from bloblora.methods import METHODS, Training
from bloblora.studies.job import machine

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
    bayesianize(model, config).set_stds(std)
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


def main() -> None:
    """Measure, write, print."""
    parser = parser_of(__doc__, "gradient_noise")
    parser.add_argument("--data", default="support_desk:train", help="records to train on and to take the batch from")
    parser.add_argument("--limit", type=int, help="of records, per label")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=100, help="of plain LoRA before the second measurement")
    parser.add_argument("--draws", type=int, default=16, help="gradients of each variant")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--stds", type=float, nargs="+", default=[0.05, 0.17], help="Ω of every entry")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    results = kept(options.results)
    described = {k: v for k, v in vars(options).items() if k not in ("results", "seeds")}
    if results.setdefault("options", described) != described:
        parser.error(f"{options.results} was made with other options: {results['options']}")
    results["machine"] = machine()

    records = runs.select(read_records(options.data), options.limit)
    tokenizer = models.load_tokenizer(options.model)
    task = tasks.build_task("classification", records, tokenizer)
    examples = tasks.encode_all(task, records, tokenizer, progress=False)
    for seed in options.seeds:
        if len(results.setdefault(f"seed {seed}", {})) == 2 * len(options.stds) and "seconds" in results:
            continue
        set_seed(seed)
        lora = get_peft_model(models.load_model(options.model, num_labels=len(task.labels or ())), LORA)
        batch = task.collate(random.Random(seed).sample(examples, options.batch_size))
        for state in ("start", f"after {options.steps} steps"):
            if state != "start":
                arguments = {
                    "output_dir": str(options.results / "checkpoints"),
                    "max_steps": options.steps,
                    "learning_rate": 1e-3,
                    "save_strategy": "no",
                    "logging_steps": 1,
                    "seed": seed,
                    "report_to": [],
                }
                METHODS["lora"]().fit(lora, Training(task, examples, arguments))
            for std in options.stds:
                column = f"{state}, Ω = {std}"
                if column in results[f"seed {seed}"]:
                    continue
                found = {}
                for name, config in VARIANTS.items():
                    model = variant_of(lora, config, std)
                    torch.manual_seed(seed)
                    ratio, error = noise(lambda m=model, b=batch: gradient(m, task, b), options.draws)
                    found[name] = {"ratio": ratio, "standard_error": error}
                    print(f"seed {seed}, {column}: {name}: {ratio:.3g} ± {error:.2g}", flush=True)
                results[f"seed {seed}"][column] = found
                keep(options.results, results)
        if "seconds" not in results:
            timed = {"plain LoRA": lora.train()} | {
                n: variant_of(lora, c, options.stds[0]) for n, c in VARIANTS.items()
            }
            results["seconds"] = times(
                {n: lambda m=m, b=batch: gradient(m, task, b) for n, m in timed.items()}, options.rounds
            )
            keep(options.results, results)

    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in results["seconds"].items():
        ratios = [a / b for a, b in zip(seconds, results["seconds"]["plain LoRA"], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {"time / plain LoRA": middle, "lower quartile": lower, "upper quartile": upper}
        for column in results[f"seed {options.seeds[0]}"] if name in VARIANTS else ():
            rows[name][column] = [1 / (1 + results[f"seed {s}"][column][name]["ratio"]) for s in options.seeds]
    table = evaluation.markdown_table(rows, list(dict.fromkeys(column for row in rows.values() for column in row)))
    text = (
        "# Noise of the gradient, and time of a step\n\n"
        "Made by `python benchmarks/gradient_noise.py`; options, machine, the ratios of noise to signal and their "
        "standard errors in results.json. Signal is ‖E g‖² / E‖g‖², the share of the gradient's square that isn't "
        f"noise (1: no noise), over {options.draws} draws with the data fixed, mean ± standard deviation of "
        f"{len(options.seeds)} seeds; time is the median and the quartiles of {options.rounds} rounds.\n\n"
    )
    keep(options.results, results, text + table)
    print(table)


if __name__ == "__main__":
    main()

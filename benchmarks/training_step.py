"""What does a training step of BLoB cost beside one of plain LoRA, in time and in memory?

    python benchmarks/training_step.py
    python benchmarks/training_step.py --published FOLDER    # and the authors' code: a checkout of bayesian-peft

A step is a whole one of the Trainer: forward, backward, the check that gradients are finite, clipping (for all, though
BLoB's default has none), AdamW, the KL, the schedule. On one base model and one batch, for each batch size × tokens and
choice of layers: plain LoRA, BLoB by default and with what else it offers, PEFT's MonteCLoRA and the published BLoB.
With --means, also under class means of so many labels and training records, whose states are random.

- time: in each round all take turns, in a random order; the median and quartiles over rounds of the ratio to plain LoRA
  in the same round;
- memory: the largest resident size (VmHWM) of a process that does nothing else but a few steps, and what of it is
  above the size before the first;
- the KL: time of its part alone, as a share of a plain step;
- where the difference goes: torch's profiler, self time of each operation less that in plain LoRA's step.

Writes results/training_step/results.json and README.md. In results/training_step/class_means are those of

    python benchmarks/training_step.py --batches 4x64 --layers "q and v" --variants BLoB --rounds 9 --no-memory \\
        --no-profile --means 24x288 150x2250 150x10000 --results results/training_step/class_means
"""

import argparse
import copy
import statistics
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from common import alone, keep, parser_of, times
from peft import LoraConfig, MontecloraConfig, TaskType, get_peft_model
from peft.helpers import MontecloraTrainerMixin
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from bloblora import BlobConfig, BlobTrainer, bayesianize, evaluation, models
from bloblora.studies.job import machine
from bloblora.training import BlobTrainingArguments
from bloblora.training.class_means import Read, keys_of

PLAIN, MONTECLORA, PUBLISHED = "plain LoRA", "MonteCLoRA (PEFT)", "published BLoB"
MEANS = ", class means "
"""Between a variant's name and labels x records."""
BLOB = {
    "BLoB": {},
    "reparameterization": {"std_gradient": "reparameterization"},
    "flipout": {"estimator": "flipout"},
    "shared": {"estimator": "shared"},
    "local": {"estimator": "local"},
    "paper": {"std_parameterization": "square", "optimizer_style": "paper"},
    "paper_flow": {"std_parameterization": "square", "optimizer_style": "paper_flow"},
}
"""What is not by default, of `BlobConfig` and of the training."""
TARGETS: dict[str, str | list[str]] = {"q and v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
NUM_LABELS, SEED = 10, 0
Batch = dict[str, Tensor]
Step = Callable[[], object]


class MeansTrainer(BlobTrainer):
    """Under class means of random states, without reading any data."""

    records: int
    batch: Batch

    def begin_class_means(self) -> None:
        """The batch's records are the first."""
        assert self.class_means is not None
        size, head = len(self.batch["labels"]), self.class_means.head
        states = torch.randn(self.records, head.in_features)
        labels = torch.arange(self.records) % head.out_features
        labels[:size] = self.batch["labels"]
        keys = torch.cat([keys_of(self.batch, self.batch["labels"]), torch.arange(self.records - size)])
        self.class_means.begin(iter([Read(states, labels, keys)]))
        self.is_in_train = True


class MontecloraTrainer(MontecloraTrainerMixin, Trainer):
    """As PEFT's documentation has it."""


def load(name: str | None) -> PreTrainedModel:
    """The base with a head of ``NUM_LABELS``; without a name a tiny random one."""
    torch.manual_seed(SEED)
    if name is not None:
        return models.load_model(name, num_labels=NUM_LABELS)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=NUM_LABELS, pad_token_id=0))


def batch_of(base: PreTrainedModel, examples: int, tokens: int) -> Batch:
    """Random tokens without padding."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, base.config.vocab_size, (examples, tokens), generator=generator)
    labels = torch.randint(NUM_LABELS, (examples,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules of its own, and the same tensors."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()})


def means_of(name: str) -> tuple[str, int, int] | None:
    """The variant that a name says has class means, their labels and their records; None of one without."""
    base, _, size = name.partition(MEANS)
    return (base, *map(int, size.split("x"))) if size else None  # type: ignore[return-value]


def trainer_of(name: str, base: PreTrainedModel, targets: str | list[str], batch: Batch | None = None) -> Trainer:
    """The trainer of a variant, of a fresh adapter on ``base``; class means are to know the batch."""
    means = means_of(name)
    if means is not None:
        name, labels, records = means
        base.config.num_labels, base.num_labels = labels, labels
        base.score = nn.Linear(base.config.hidden_size, labels, bias=False)
    torch.manual_seed(SEED)
    monteclora = {"monteclora_config": MontecloraConfig()} if name == MONTECLORA else {}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=TaskType.SEQ_CLS, **monteclora)
    model = get_peft_model(base, lora)
    common: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 1.0,
    }
    if means is not None:
        common["head"] = "class_means"
    if (name == PLAIN and means is None) or name == MONTECLORA:
        kind = MontecloraTrainer if name == MONTECLORA else Trainer
        return kind(model=model, args=TrainingArguments(**common))
    if name in BLOB:
        options = {"factors": "A", "head_prior_std": "none", **BLOB[name]}
        common["optimizer_style"] = options.pop("optimizer_style", "joint")
        bayesianize(model, BlobConfig(**options))  # type: ignore[arg-type]
    arguments = BlobTrainingArguments(**common, dataset_size=1000)
    if means is None:
        return BlobTrainer(model, arguments)
    trainer = MeansTrainer(model, arguments)
    trainer.records, trainer.batch = records, cast(Batch, batch)
    return trainer


def step_of(trainer: Trainer, batch: Batch) -> Step:
    """What the Trainer's loop does in each step."""
    trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
    trainer.current_gradient_accumulation_steps = 1
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    model, optimizer, schedule = trainer.model, trainer.optimizer, trainer.lr_scheduler

    def step() -> Tensor:
        loss = trainer.training_step(model, batch)
        trainer._clip_grad_norm(model)
        optimizer.step()
        if isinstance(trainer, BlobTrainer):
            trainer.kl_step()
        schedule.step()
        model.zero_grad()
        trainer.state.global_step += 1
        return loss

    return step


def kl_part(trainer: BlobTrainer) -> Step:
    """The KL's part of a step, alone."""
    if trainer.args.optimizer_style != "joint":
        return trainer.kl_step
    posterior = trainer.posterior
    assert posterior is not None
    return lambda: trainer._kl_gradients(posterior)


def published_step(folder: Path, base: PreTrainedModel, targets: str | list[str], batch: Batch) -> Step:
    """One turn of the loop in the authors' own ``fit``."""
    from accelerate import Accelerator

    # Their imports: a module of PEFT that is empty without bitsandbytes, and a debugger.
    sys.modules["peft.tuners.lora.bnb"] = types.ModuleType("peft.tuners.lora.bnb")
    sys.modules["peft.tuners.lora.bnb"].Linear8bitLt = type("Linear8bitLt", (nn.Module,), {})  # type: ignore[attr-defined]
    sys.modules.setdefault("ipdb", types.ModuleType("ipdb")).set_trace = lambda *_: None  # type: ignore[attr-defined]
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from modelwrappers.blob import BLoB, get_parser

    given = "--dataset-type bertds --dataset x --modelwrapper blob --model x --model-type seqcls"
    given += f" --max-train-steps 10000 --batch-size {len(batch['labels'])}"
    options = get_parser().parse_args(given.split())
    vars(options).update(outdim=NUM_LABELS, num_samples=1000, bayes_klreweighting=True, bayes_datasetrescaling=True)
    vars(options).update(bayes_eps=0.05, bayes_beta=0.2, bayes_gamma=8, eval_per_steps=10**9, epoch=0)
    torch.manual_seed(SEED)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=TaskType.SEQ_CLS)
    wrapper = BLoB(base, lora, options, Accelerator(cpu=True))
    loader = torch.utils.data.DataLoader([{}])
    wrapper.prepare_for_fit_evaluate(
        types.SimpleNamespace(train_dataloader=loader, test_dataloader=loader, num_samples=1000)
    )
    wrapper.train()
    return lambda: wrapper.fit([batch], None)


def memory(name: str, cell: tuple[int, int, str], options: argparse.Namespace) -> dict[str, float]:
    """MiB that this process has taken after a few steps: at most, and above what it held before them."""
    torch.set_num_threads(1)
    examples, tokens, layers = cell
    base = load(options.model)
    batch = batch_of(base, examples, tokens)
    step = build(name, base, TARGETS[layers], batch, options)[0]
    before = resident("VmRSS")
    for _ in range(3):
        step()
    peak = resident("VmHWM")
    return {"peak": peak, "step": peak - before}


def resident(field: str) -> float:
    """MiB: what this process holds (VmRSS), or has held at most (VmHWM). ru_maxrss would begin at its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**10


def build(
    name: str, base: PreTrainedModel, targets: str | list[str], batch: Batch, options: argparse.Namespace
) -> tuple[Step, Step | None]:
    """A variant's step, and the KL's part of it."""
    if name == PUBLISHED:
        return published_step(options.published.resolve(), base, targets, batch), None
    trainer = trainer_of(name, base, targets, batch)
    bayesian = isinstance(trainer, BlobTrainer) and trainer.posterior is not None
    return step_of(trainer, batch), kl_part(trainer) if bayesian else None


def account(steps: Mapping[str, Step], name: str, count: int = 4) -> dict[str, float]:
    """Seconds of self time a step that each operation takes more than in plain LoRA's, largest differences first."""
    seconds: list[dict[str, float]] = [{}, {}]
    for _ in range(count):
        for found, step in zip(seconds, (steps[name], steps[PLAIN]), strict=True):
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                step()
            for event in recorded.key_averages():
                found[event.key] = found.get(event.key, 0) + event.self_cpu_time_total / 1e6 / count
    blob, plain = seconds
    more = {key: blob.get(key, 0) - plain.get(key, 0) for key in blob.keys() | plain.keys()}
    return dict(sorted(more.items(), key=lambda item: -abs(item[1])))


def measure(cell: tuple[int, int, str], names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one batch size, number of tokens, and choice of layers."""
    examples, tokens, layers = cell
    base = load(options.model)
    batch = batch_of(base, examples, tokens)
    built = {name: build(name, share_weights(base), TARGETS[layers], batch, options) for name in names}
    steps = {name: step for name, (step, _) in built.items()}
    seconds = times(steps, options.rounds)
    plain = seconds[PLAIN]
    result: dict[str, Any] = {"seconds": seconds, "kl_share": {}, "peak_mib": {}, "step_mib": {}}
    result["ratio"] = {name: [a / b for a, b in zip(of, plain, strict=True)] for name, of in seconds.items()}
    for name, (_, kl) in built.items():
        if kl is not None:
            result["kl_share"][name] = statistics.median(times({name: kl}, 15)[name]) / statistics.median(plain)
    if options.profile:
        more = account(steps, next(name for name in names if name in BLOB))
        result["more_seconds"] = dict([*more.items()][:12])
    for name in names if options.memory else []:
        found = alone(memory, name, cell, options)
        result["peak_mib"][name], result["step_mib"][name] = found["peak"], found["step"]
    return result


def row(name: str, result: Mapping[str, Any]) -> dict[str, float]:
    """A line of a cell's table."""
    ratios = result["ratio"][name]
    lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    values = {"time / plain LoRA": statistics.median(ratios), "lower quartile": lower, "upper quartile": upper}
    values["seconds"] = statistics.median(result["seconds"][name])
    for key, title in (("peak_mib", "peak memory"), ("step_mib", "the step's memory")):
        if name in result[key]:
            values[f"{title} / plain LoRA"] = result[key][name] / result[key][PLAIN]
    if name in result["kl_share"]:
        values["KL, % of a step"] = 100 * result["kl_share"][name]
    return values


def report(results: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    text = [
        "# Cost of a training step\n",
        "Made by `benchmarks/training_step.py`, which says how; options and machine are in results.json. Time: median "
        "and quartiles over rounds in which all take turns. Peak memory: the whole process; the step's: what it takes "
        "above its size before the first.\n",
    ]
    for cell, result in results["cells"].items():
        rows = {name: row(name, result) for name in result["seconds"]}
        columns = list(dict.fromkeys(column for values in rows.values() for column in values))
        text += [f"## {cell}\n", evaluation.markdown_table(rows, columns)]
        if "more_seconds" in result:
            whole = statistics.median(result["seconds"][PLAIN])
            parts = {key: {"% of a plain step": 100 * more / whole} for key, more in result["more_seconds"].items()}
            text += ["Self time beyond plain LoRA's, by the profiler:\n", evaluation.markdown_table(parts)]
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, print."""
    parser = parser_of(__doc__, "training_step")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--batches", nargs="+", default=["4x64", "8x128", "2x512"], help="examples x tokens")
    parser.add_argument("--layers", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--variants", nargs="+", default=[*BLOB, MONTECLORA], choices=[*BLOB, MONTECLORA])
    parser.add_argument("--means", nargs="*", default=[], help="labels x records of class means; 10 labels or more")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--published", type=Path, help="checkout of github.com/Wang-ML-Lab/bayesian-peft")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--smoke", action="store_true", help="seconds, on a tiny random model: does it run?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.model, options.batches, options.rounds = None, ["2x8"], 2
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    of_means = [f"{name}{MEANS}{size}" for size in options.means for name in (PLAIN, "BLoB")]
    names = [PLAIN, *options.variants, *of_means, *([PUBLISHED] if options.published else [])]
    results: dict[str, Any] = {
        "options": {key: str(value) for key, value in vars(options).items() if key not in ("results", "published")},
        "machine": machine(),
        "cells": {},
    }
    for layers in options.layers:
        for size in options.batches:
            examples, tokens = map(int, size.split("x"))
            results["cells"][f"{examples} × {tokens}, {layers}"] = measure((examples, tokens, layers), names, options)
            keep(options.results, results, report(results))
            print(report(results), flush=True)


if __name__ == "__main__":
    main()

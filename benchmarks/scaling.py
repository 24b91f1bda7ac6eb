"""How do time and memory grow with the model, the tokens, the rank, the layers, and the draws?

    python benchmarks/scaling.py

Plain LoRA, BLoB and full fine-tuning of random Llamas with a classification head. One thing varies at a time around a
base case. Each point is measured in processes of its own:

- training step, prediction: in one process all methods, on the same weights, take turns; medians and quartiles of
  seconds, and of the ratio to plain LoRA in the same round;
- memory: of a process that does nothing else but two training steps, the largest resident size (VmHWM), and what
  of it is above the size before the first, as in benchmarks/training_step.py;
- arithmetic of a step, counted on meta tensors.

Growth rates are slopes of the logarithms, by least squares. Points are kept: what is measured is not measured again.

Writes results/scaling/results.json, README.md and scaling.svg.
"""

import argparse
import copy
import functools
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
import transformers
from common import keep, kept, parser_of, ratios, spread, times
from counting import count
from peft import LoraConfig, TaskType, get_peft_model
from scipy.stats import linregress
from torch import nn
from training_step import TARGETS, batch_of, resident, step_of
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from bloblora import BlobTrainer, bayesianize, evaluation, predict
from bloblora.evaluation import plots
from bloblora.studies.job import machine
from bloblora.training import BlobTrainingArguments

PLAIN, BLOB, FULL = "plain LoRA", "BLoB", "full fine-tuning"
NUM_LABELS, EXAMPLES, SEED = 10, 4, 0
FLOPS = 1e12  # of plain LoRA's steps that are timed in a point; not fewer than 3 rounds, nor more than 9
DRAWS, FEW = (0, 1, 2, 5, 10, 20), (0, 2)  # in the base case, and elsewhere


_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SHAPES = {
    "tiny": (97, 32, 64, 2, 4, 2),
    "small": (97, 64, 128, 2, 4, 2),
    "10M": (49152, 128, 384, 20, 2, 1),
    "30M": (49152, 256, 768, 22, 4, 2),
    "135M": (49152, 576, 1536, 30, 9, 3),  # SmolLM2's, as the next
    "360M": (49152, 960, 2560, 32, 15, 5),
    "1B": (49152, 2048, 8192, 16, 32, 8),  # its blocks are those of Llama-3.2-1B
}
SIZES: dict[str, dict[str, Any]] = {
    name: dict(zip((*_FIELDS, "num_key_value_heads"), shape, strict=True)) for name, shape in _SHAPES.items()
}


@dataclass(frozen=True)
class Point:
    """What is measured; a batch is ``EXAMPLES`` × ``tokens``."""

    size: str = "135M"
    tokens: int = 64
    rank: int = 8
    targets: str = "q and v"

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.size}-{self.tokens}-r{self.rank}-{self.targets.replace(' ', '_')}"


FACTORS: dict[str, list[Any]] = {
    "size": ["10M", "30M", "135M", "360M", "1B"],
    "tokens": [16, 64, 256, 512, 1024],
    "rank": [2, 8, 32, 64],
    "targets": [*TARGETS],
}
SMOKE: dict[str, list[Any]] = {"size": ["tiny", "small"], "tokens": [4, 8], "rank": [2, 8], "targets": [*TARGETS]}


def around(base: Point, factors: Mapping[str, list[Any]]) -> dict[str, list[Point]]:
    """The points of each factor, the others as in the base case."""
    return {name: [replace(base, **{name: value}) for value in values] for name, values in factors.items()}


def load(point: Point, device: str = "cpu") -> PreTrainedModel:
    """Random weights, float32."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**SIZES[point.size], num_labels=NUM_LABELS, pad_token_id=0, use_cache=False)
    config._attn_implementation = "eager" if device == "meta" else "sdpa"  # which asks for values of the mask
    with torch.device(device):
        return LlamaForSequenceClassification(config)


def model_of(method: str, base: PreTrainedModel, point: Point) -> nn.Module:
    """The base, or a fresh adapter on it."""
    if method == FULL:
        return base
    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=point.rank,
        lora_alpha=2 * point.rank,
        target_modules=TARGETS[point.targets],
        task_type=TaskType.SEQ_CLS,
    )
    model = get_peft_model(base, lora)
    if method == BLOB:
        bayesianize(model)
    return model


def trainer_of(model: nn.Module, method: str) -> Trainer:
    """The Trainer of a method, with its defaults."""
    common: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if method == BLOB:
        return BlobTrainer(model, BlobTrainingArguments(**common, dataset_size=1000))
    return Trainer(model, TrainingArguments(**common))


def flops(point: Point, method: str) -> int:
    """Arithmetic of a step's forward and backward."""
    base = load(point, "meta")
    batch = {name: tensor.to("meta") for name, tensor in batch_of(base, EXAMPLES, point.tokens).items()}
    return count(model_of(method, base, point).to("meta").train(), batch, backward=True).flops


def rounds_of(point: Point) -> int:
    """Rounds of timing: many where they are short."""
    return min(9, max(3, round(FLOPS / flops(point, PLAIN))))


def fits(point: Point, method: str) -> bool:
    """Whether float32 weights, and for full fine-tuning gradients and two moments, leave a tenth and 1 GiB free."""
    needed = 4 * load(point, "meta").num_parameters() * (4 if method == FULL else 1)
    return 1.1 * needed + 2**30 < psutil.virtual_memory().available


def same_storage(base: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters have the memory of the other's, and their own gradients."""
    return copy.deepcopy(base, {id(p): nn.Parameter(p.detach()) for p in base.parameters()})


def timings(point: Point, methods: list[str], draws: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Seconds of training steps, and of predictions."""
    base, number = load(point), rounds_of(point)
    batch = batch_of(base, EXAMPLES, point.tokens)
    models = {method: model_of(method, same_storage(base), point) for method in methods}
    steps = {method: step_of(trainer_of(model, method), batch) for method, model in models.items()}
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def predicting(method: str, num_samples: int) -> Callable[[], Any]:
        return lambda: predict(models[method], inputs, num_samples, SEED, batch_size=EXAMPLES)

    predictions = {PLAIN: predicting(PLAIN, 0)} | {f"{BLOB}, N = {num}": predicting(BLOB, num) for num in draws}
    return {"step": times(steps, number), "prediction": times(predictions, min(number, 5))}


def memory(point: Point, method: str) -> dict[str, float]:
    """MiB that this process has taken after two steps: at most, and above what it held before them."""
    base = load(point)
    batch = batch_of(base, EXAMPLES, point.tokens)
    step = step_of(trainer_of(model_of(method, base, point), method), batch)
    before = resident("VmRSS")
    for _ in range(2):
        step()
    peak = resident("VmHWM")
    return {"peak": peak, "step": peak - before}


def alone(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result, from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bloblora", "scipy.stats"])  # imported once, before any thread
    with ProcessPoolExecutor(1, context, _prepare, (threads,)) as pool:
        return pool.submit(function, *arguments).result()


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()


def measure(point: Point, base: Point, threads: int) -> dict[str, Any]:
    """Everything about a point; full fine-tuning has neither rank nor targets, so it isn't measured again for them."""
    methods = [PLAIN, BLOB]
    if (point.rank, point.targets) == (base.rank, base.targets) and fits(point, FULL):
        methods.append(FULL)
    draws = DRAWS if point == base else FEW
    torch.set_num_threads(1)  # the counter sees its own thread
    on_meta = load(point, "meta")
    return {
        "point": asdict(point),
        "parameters": on_meta.num_parameters(),
        "parameters_that_multiply": on_meta.num_parameters() - on_meta.get_input_embeddings().weight.numel(),
        "flops": {method: flops(point, method) for method in methods},
        "seconds": alone(threads, timings, point, methods, draws),
        "mib": {method: alone(threads, memory, point, method) for method in methods},
    }


def measured(point: Point, base: Point, options: argparse.Namespace) -> dict[str, Any]:
    """A point that was measured, now or before."""
    found = kept(options.results)
    if point.name not in found:
        found[point.name] = measure(point, base, options.threads) | {
            "machine": machine() | {"threads": options.threads}
        }
        keep(options.results, found)
    return kept(options.results)[point.name]


def growth(x: list[float], y: list[float]) -> dict[str, float]:
    """Exponent of y in x, and its standard error: the slope of the logarithms."""
    fit = linregress([*map(math.log, x)], [*map(math.log, y)])
    return {"exponent": float(fit.slope), "standard error": float(fit.stderr), "points": len(x)}


def series(found: Mapping[str, list[dict[str, Any]]], factor: str) -> Iterator[tuple[str, list[float], list[float]]]:
    """What grows with a factor: its name, x, and y at the points that have it."""
    points = found[factor]
    values = {
        f"{quantity}, {method}": [
            (_at(point, factor), value) for point in points if (value := of(point, method)) is not None
        ]
        for quantity, of in QUANTITIES.items()
        for method in (PLAIN, BLOB, FULL)
    }
    for name, pairs in values.items():
        if len({x for x, _ in pairs}) > 2:
            yield name, [x for x, _ in pairs], [y for _, y in pairs]


def _at(point: dict[str, Any], factor: str) -> float:
    return point["parameters_that_multiply"] if factor == "size" else point["point"][factor]


def _step(point: dict[str, Any], method: str) -> float | None:
    seconds = point["seconds"]["step"].get(method)
    return None if seconds is None else statistics.median(seconds)


def _mib(point: dict[str, Any], method: str, kind: str) -> float | None:
    return point["mib"].get(method, {}).get(kind)


QUANTITIES: dict[str, Callable[[dict[str, Any], str], float | None]] = {
    "step s": _step,
    "peak MiB": functools.partial(_mib, kind="peak"),
    "the step's MiB": functools.partial(_mib, kind="step"),
}


def row(point: dict[str, Any]) -> dict[str, float]:
    """A line of a factor's table."""
    steps, mib = point["seconds"]["step"], point["mib"]
    to_plain = {method: spread(values) for method, values in ratios(steps, PLAIN).items()}
    predictions = ratios(point["seconds"]["prediction"], f"{BLOB}, N = 0")
    found = {"M parameters": point["parameters"] / 1e6}
    found |= {f"{method}, s": statistics.median(values) for method, values in steps.items()}
    found |= {"BLoB / LoRA": to_plain[BLOB]["median"]}
    found |= {name: to_plain[BLOB][name] for name in ("lower quartile", "upper quartile")}
    found |= {"full / LoRA": to_plain[FULL]["median"]} if FULL in to_plain else {}
    found |= {f"{method}, peak MiB": values["peak"] for method, values in mib.items()}
    found |= {"BLoB / LoRA, the step's memory": mib[BLOB]["step"] / mib[PLAIN]["step"]}
    found |= {f"N = {FEW[1]} / N = 0": statistics.median(predictions[f"{BLOB}, N = {FEW[1]}"])}
    found |= {"GFLOP/s of LoRA": point["flops"][PLAIN] / 1e9 / statistics.median(steps[PLAIN])}
    return found


def draws_table(base: dict[str, Any]) -> tuple[dict[str, dict[str, float]], str]:
    """Latency of the base case's predictions, and the line through N = 1, 2, …"""
    seconds = base["seconds"]["prediction"]
    rows = {
        name: {"s": statistics.median(seconds[name])} | {f"{key} / LoRA": value for key, value in spread(ratio).items()}
        for name, ratio in ratios(seconds, PLAIN).items()
    }
    pairs = [(num, time) for num in DRAWS if num for time in seconds[f"{BLOB}, N = {num}"]]
    fit = linregress(*zip(*pairs, strict=True))
    line = f"{fit.intercept:.3g} ± {fit.intercept_stderr:.2g} s, and {fit.slope:.3g} ± {fit.stderr:.2g} s a draw"
    return rows, f"Least squares over N ≥ 1: {line}.\n"


def report(found: Mapping[str, list[dict[str, Any]]], base: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    of = base["machine"]
    text = [
        "# How cost grows\n",
        f"Made by `python benchmarks/scaling.py`; all times are in results.json. Base case: {base['point']['size']}, "
        f"{EXAMPLES} × {base['point']['tokens']} tokens, r = {base['point']['rank']}, {base['point']['targets']}, "
        f"float32, random weights; {of['cpu']}, {of['threads']} threads, torch {of['torch']}. Seconds: "
        "medians over rounds in which all take turns; ratios are within a round. Peak: a whole process of two steps; "
        f"the step's memory: what it takes above its size before the first. “–” for {FULL}: it didn't fit into the "
        "memory that was free, or doesn't depend on the factor.\n",
        "![How time and memory grow](scaling.svg)\n",
    ]
    for factor, points in found.items():
        rows = {str(point["point"][factor]): row(point) for point in points}
        columns = list(dict.fromkeys(column for point in points for column in row(point)))
        text += [f"## By {factor}\n", evaluation.markdown_table(rows, columns)]
    rows, line = draws_table(base)
    text += ["## By N: a prediction of the base case's batch\n", evaluation.markdown_table(rows), line]
    text += [
        "## Growth rates\n",
        "y grows as x to this power; ± the standard error of the fit, which says how straight ",
    ]
    text[-1] += "the line is, not what noise there is. Where it is far from straight, look at the table.\n"
    for factor in ("size", "tokens", "rank"):
        fits_of = {name: growth(x, y) for name, x, y in series(found, factor)}
        if fits_of:
            text += [
                f"In {'parameters without the embedding' if factor == 'size' else factor}:\n",
                evaluation.markdown_table(fits_of),
            ]
    return "\n".join(text)


def figure(found: Mapping[str, list[dict[str, Any]]], base: dict[str, Any]) -> Any:
    """Step time and peak memory against each number, and latency against N."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 6), layout="constrained")
    grid = canvas.subplots(2, 4)
    for column, factor in enumerate(("size", "tokens", "rank")):
        for axes, quantity in zip(grid[:, column], ("step s", "peak MiB"), strict=True):
            for method, marker in zip((PLAIN, BLOB, FULL), "os^", strict=True):
                of = QUANTITIES[quantity]
                pairs = [(_at(p, factor), y) for p in found[factor] if (y := of(p, method)) is not None]
                axes.plot(*zip(*pairs, strict=True), marker=marker, label=method, fillstyle="none") if pairs else None
            axes.set(xscale="log", yscale="log", xlabel=factor, ylabel=quantity)
            axes.set_xticks([_at(p, factor) for p in found[factor]], [str(p["point"][factor]) for p in found[factor]])
            axes.xaxis.minorticks_off()
    rows, _ = draws_table(base)
    latency, unused = grid[:, 3]
    latency.plot(DRAWS, [rows[f"{BLOB}, N = {num}"]["s"] for num in DRAWS], marker="s", color="C1", fillstyle="none")
    latency.axhline(rows[PLAIN]["s"], color="C0", linestyle="--")
    latency.set(xlabel="N", ylabel="prediction s", ylim=(0, None))
    unused.axis("off")
    unused.legend(*grid[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    return canvas


def main(arguments: list[str] | None = None) -> None:
    """Measure what isn't yet, write, print."""
    parser = parser_of(__doc__, "scaling")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=FACTORS["size"])
    parser.add_argument("--smoke", action="store_true", help="a minute, on tiny models: does it run?")
    options = parser.parse_args(arguments)
    base = Point(*(values[0] for values in SMOKE.values())) if options.smoke else Point()
    factors = SMOKE if options.smoke else FACTORS | {"size": options.sizes}
    found: dict[str, list[dict[str, Any]]] = {}
    for factor, points in around(base, factors).items():
        found[factor] = []
        for point in points:
            found[factor].append(measured(point, base, options))
            print(point.name, row(found[factor][-1]), flush=True)
    text = report(found, first := measured(base, base, options))
    plots.save_figure(figure(found, first), options.results / "scaling.svg")
    keep(options.results, kept(options.results), text)
    print(text)


if __name__ == "__main__":
    main()

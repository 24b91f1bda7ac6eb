"""What do N = 10 draws cost at prediction, against ten separate forward passes?

    python benchmarks/prediction.py

On one base model and random tokens, for each batch size × tokens, with adapters in all layers or in the top quarter:

- time: `predict` and its parts (a forward shared by draws, forwards side by side) as a ratio to ten forwards of the
  same model, a draw each; in each round all take turns, in another order; medians and quartiles over rounds. Plain
  LoRA's one forward and one of the base model stand beside them;
- that they agree: the largest difference of any probability;
- the limit: arithmetic operations counted by torch, bytes of the weights, and the share of this machine's fastest
  matrix product that `predict` reaches.

Writes results/prediction/results.json and README.md.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import keep, parser_of, ratios, spread, times
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from bloblora import Posterior, bayesianize, evaluation, find_posterior, models, predict
from bloblora.prediction.forward import BatchForward
from bloblora.studies.job import machine

SHAPES = ((1, 16), (1, 64), (16, 16), (16, 60))
NUM_SAMPLES, NUM_LABELS, SEED = 10, 10, 0
SEPARATE, SHARED, SIDE, WHOLE = "ten forwards", "shared forwards", "side by side", "predict"
QUARTILES = ("lower quartile", "upper quartile")
ONE, BASE = "plain LoRA, one forward", "base model, one forward"


def load(name: str | None, num_labels: int = NUM_LABELS) -> PreTrainedModel:
    """The base with a fresh head; without a name a tiny random one."""
    torch.manual_seed(SEED)
    if name is not None:
        return models.load_model(name, num_labels=num_labels)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=num_labels, pad_token_id=0))


def bayesian(base: PreTrainedModel, layers: list[int] | None) -> PeftModel:
    """A LoRA that does something, with Ω = 0.05."""
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=layers,
        task_type=TaskType.SEQ_CLS,
        init_lora_weights=False,
    )
    model = get_peft_model(base, lora)
    bayesianize(model).set_stds(0.05)
    return model.eval()


@torch.no_grad()
def separate(model: PeftModel, posterior: Posterior, batch: dict[str, Tensor]) -> Tensor:
    """(N, b, C) probabilities, a forward a draw."""
    generator, found = torch.Generator().manual_seed(SEED), []
    for _ in range(NUM_SAMPLES):
        with posterior.draw(generator):
            found.append(model(**batch).logits.softmax(-1))
    return torch.stack(found)


def together(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """The same by `predict`."""
    return predict(model, batch, NUM_SAMPLES, SEED, batch_size=len(batch["input_ids"])).draw_probabilities


@contextmanager
def waves(size: Callable[[list[int]], list[int]]) -> Iterator[None]:
    """Another choice of how draws are made."""
    chosen = BatchForward.wave
    with patch.object(BatchForward, "wave", lambda self, left: size(chosen(self, left))):
        yield


def parts(model: PeftModel, base: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """What takes turns."""
    posterior = find_posterior(model)
    assert posterior is not None

    def shared() -> Tensor:
        with waves(lambda sizes: [sizes[0]]):
            return together(model, batch)

    def side() -> Tensor:
        with waves(lambda sizes: [1] * len(sizes)):
            return together(model, batch)

    @torch.no_grad()
    def one(network: Any) -> Tensor:
        return network(**batch).logits

    def plain() -> Tensor:
        with posterior.mean():
            return one(model)

    return {
        SEPARATE: lambda: separate(model, posterior, batch),
        SHARED: shared,
        SIDE: side,
        WHOLE: lambda: together(model, batch),
        ONE: plain,
        BASE: lambda: one(base),
    }


def peak_flops() -> float:
    """Operations a second of a large matrix product."""
    x = torch.randn(2048, 2048)
    start = time.perf_counter()
    for _ in range(8):
        x @ x
    return 8 * 2 * 2048**3 / (time.perf_counter() - start)


def measure(
    model: PeftModel, base: PreTrainedModel, shape: tuple[int, int], rounds: int, peak: float
) -> dict[str, Any]:
    """One case."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, base.config.vocab_size, shape, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    functions = parts(model, base, batch)
    expected = functions[SEPARATE]()
    differences = {name: (functions[name]() - expected).abs().max().item() for name in (SHARED, SIDE, WHOLE)}
    seconds = times(functions, rounds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the counter sees its own thread
    with FlopCounterMode(display=False) as counter:
        functions[WHOLE]()
    torch.set_num_threads(threads)
    flops = counter.get_total_flops()
    return {
        "ratios": {name: spread(values) for name, values in ratios(seconds, SEPARATE).items()},
        "seconds": seconds,
        "differences": differences,
        "flops": flops,
        "share_of_peak": flops / spread(seconds[WHOLE])["median"] / peak,
        "weight_bytes": sum(p.numel() * p.element_size() for n, p in base.named_parameters() if "embed" not in n),
    }


def write(folder: Path, results: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Both files."""
    text = (
        "# Time of N = 10 draws at prediction\n\n"
        "Made by `python benchmarks/prediction.py`; options, machine and all times are in results.json. Ratios to ten "
        "forwards, a draw each, in the same round: medians, and for `predict` the quartiles. The case is batch × "
        "tokens and where the adapters are. The difference is the largest of any probability; the share of peak is "
        "`predict`'s arithmetic over that of the machine's fastest matrix product.\n\n"
    )
    table = evaluation.markdown_table(rows, [*dict.fromkeys(column for row in rows.values() for column in row)])
    keep(folder, results, text + table)


def main() -> None:
    """Measure, write, print."""
    parser = parser_of(__doc__, "prediction")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, two rounds: to see that it works")
    options = parser.parse_args()
    name, rounds = (None, 2) if options.smoke else (options.model, options.rounds)
    results: dict[str, Any] = {
        "options": {"model": name, "rounds": rounds, "num_samples": NUM_SAMPLES},
        "machine": machine(),
        "peak_flops": (peak := peak_flops()),
        "cases": {},
    }
    rows: dict[str, dict[str, Any]] = {}
    count = load(name).config.num_hidden_layers
    for where, layers in (("all layers", None), ("top quarter", [*range(count - count // 4, count)])):
        base = load(name).eval()
        model = bayesian(load(name), layers)
        for shape in SHAPES:
            case = f"{shape[0]} × {shape[1]}, {where}"
            found = results["cases"][case] = measure(model, base, shape, rounds, peak)
            rows[case] = {part: ratio["median"] for part, ratio in found["ratios"].items() if part != SEPARATE}
            rows[case] |= {f"{WHOLE}, {name}": found["ratios"][WHOLE][name] for name in QUARTILES}
            rows[case] |= {
                "difference × 10⁶": found["differences"][WHOLE] * 1e6,
                "share of peak": found["share_of_peak"],
            }
            print(case, rows[case], flush=True)
            write(options.results, results, rows)


if __name__ == "__main__":
    main()

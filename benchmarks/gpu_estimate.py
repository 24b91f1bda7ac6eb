"""What would BLoB cost on Llama-2-7B and 70B on a GPU? An estimate: nothing here was run on one.

    python benchmarks/gpu_estimate.py

Models of the true shapes are made on torch's meta device, without memory. A training step and a prediction are counted
operation by operation: arithmetic, bytes, kernels, and what is kept for the backward. An operation then takes the
longest of its arithmetic over ``MATMUL_SHARE`` of the GPU's peak, its bytes over ``BANDWIDTH_SHARE`` of its bandwidth,
and ``LAUNCH`` seconds. Nothing is fused but the attention; bfloat16 base, float32 adapters without autocast. Where a
model needs several GPUs, the time is the sum over them, without communication. The noise of a draw is made on the
host: its time is this machine's.

The same estimate is set against a measurement that others have published: Qwen-7B's LoRA on an A100.

Writes results/scaling/estimate.json and estimate.md.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import keep, parser_of
from counting import Cost, Operation, count, count_call
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import repeat_kv

from bloblora import BlobConfig, Posterior, bayesianize, evaluation, find_posterior
from bloblora.files import write_text
from bloblora.studies.job import machine

MATMUL_SHARE, BANDWIDTH_SHARE, LAUNCH = 0.6, 0.8, 5e-6
EXAMPLES, TOKENS, RANK, TARGETS = 4, 300, 8, ("q_proj", "v_proj")
DRAWS = (0, 1, 2, 5, 10, 20)
SHARED_TOKENS = 8192  # of draws in one forward, as `predict` has it on a GPU
PLAIN, BLOB, FULL, CHECKPOINTING = "plain LoRA", "BLoB", "full fine-tuning", ", checkpointing"


@dataclass(frozen=True)
class Gpu:
    """Peak operations a second by bytes of an element, bytes a second, and bytes; without sparsity."""

    flops: dict[int, float]
    bandwidth: float
    memory: float


# NVIDIA's data sheets of the A100 80GB SXM and the H100 SXM: bfloat16 tensor cores, float32, HBM.
GPUS = {
    "A100": Gpu({2: 312e12, 4: 19.5e12}, 2.039e12, 80e9),
    "H100": Gpu({2: 989e12, 4: 67e12}, 3.35e12, 80e9),
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "Llama-2-70B": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
QWEN = SHAPES["Llama-2-7B"] | {"vocab_size": 151936}
# README of github.com/QwenLM/Qwen: tokens → (GB, seconds of 8 micro-batches of one), A100-SXM4-80G, LoRA of its
# finetune script (r 64, every linear layer but the head, bfloat16, checkpointing), flash attention.
QWEN_MEASURED = {256: (20.1, 1.2), 512: (20.4, 1.5), 1024: (21.5, 2.8), 2048: (23.8, 5.2)}


def flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The attention kernel that a GPU would run; the meta device has no choice of its own."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("fused_on_meta", flash)


def build(
    shape: dict[str, Any], method: str, rank: int = RANK, targets: Any = TARGETS, float32: bool = True
) -> nn.Module:
    """A bfloat16 model on the meta device, in train mode, with adapters in float32 or bfloat16."""
    with torch.device("meta"):
        config = LlamaConfig(**{"vocab_size": 32000} | shape, attn_implementation="fused_on_meta", use_cache=False)
        base = LlamaForCausalLM(config).to(torch.bfloat16)
        if method == FULL:
            return base.train()
        targets = targets if isinstance(targets, str) else list(targets)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        model = get_peft_model(base, lora, autocast_adapter_dtype=float32)
        if method == BLOB:
            bayesianize(model, BlobConfig())
    return model.train()


def batch_of(examples: int, tokens: int) -> dict[str, Tensor]:
    """Token ids without values."""
    ids = torch.zeros(examples, tokens, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def seconds(cost: Cost, gpu: Gpu) -> float:
    """Of all operations, one after the other."""
    return sum(
        max(
            operation.flops / (MATMUL_SHARE * gpu.flops.get(operation.element, gpu.flops[4])),
            operation.bytes / (BANDWIDTH_SHARE * gpu.bandwidth),
            LAUNCH,
        )
        for operation in cost.operations
    )


def training(
    shape: dict[str, Any], method: str, batch: dict[str, Tensor], checkpointing: bool = False, **adapter: Any
) -> tuple[Cost, dict[str, float]]:
    """A step's cost, and the GB that it holds: frozen weights, what trains, and activations.

    What trains takes 16 bytes a parameter: its weight, its gradient and AdamW's two moments in float32.
    """
    model = build(shape, method, **adapter)
    if checkpointing:  # the backward computes each block again
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if method != FULL:
            model.enable_input_require_grads()
    cost = count(model, batch, backward=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    cost.operations.append(Operation(0, 7 * 4 * trained, 4))  # AdamW, fused: it reads four numbers and writes three
    if (posterior := find_posterior(model)) is not None:
        cost.operations += count_call(posterior.kl_gradients).operations
    kept = kept_by_checkpoints(shape, method, batch, **adapter) if checkpointing else cost.saved
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return cost, {"weights": weights / 1e9, "trained": 16 * trained / 1e9, "activations": kept / 1e9}


def kept_by_checkpoints(shape: dict[str, Any], method: str, batch: dict[str, Tensor], **adapter: Any) -> int:
    """Bytes: each block's bfloat16 input, all of one block, and what isn't in a block."""
    one, two = (
        count(build(shape | {"num_hidden_layers": blocks}, method, **adapter), batch, backward=True).saved
        for blocks in (1, 2)
    )
    block = two - one
    inputs = shape["num_hidden_layers"] * batch["input_ids"].numel() * shape["hidden_size"] * 2
    return inputs + block + max(one - block, 0)


def prediction(shape: dict[str, Any], batch: dict[str, Tensor], num_samples: int) -> list[Cost]:
    """The forwards of N draws, as many in each as `predict` puts there; of the mean for N = 0."""
    model = build(shape, BLOB).eval()
    posterior = find_posterior(model)
    assert posterior is not None
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if num_samples == 0:
        with posterior.mean():
            return [count(model, inputs)]
    together = max(1, SHARED_TOKENS // inputs["input_ids"].numel())
    return [
        _stacked(model, posterior, inputs, min(together, num_samples - start))
        for start in range(0, num_samples, together)
    ]


@torch.no_grad()
def _stacked(model: nn.Module, posterior: Posterior, inputs: dict[str, Tensor], size: int) -> Cost:
    samples = [posterior.sample(torch.Generator())] * size
    repeated = {name: tensor.repeat(size, 1) for name, tensor in inputs.items()}
    with posterior.stacked(samples, len(repeated["input_ids"])):
        return count(model, repeated)


def normals_a_second(count: int = 2**22) -> float:
    """Of torch's generator on this host, in one thread."""
    torch.randn(count)
    start = time.perf_counter()
    torch.randn(count)
    return count / (time.perf_counter() - start)


def estimate(shape: dict[str, Any], normals: float) -> dict[str, Any]:
    """Training steps and predictions of one model; ``normals`` a second are drawn on the host."""
    batch, one = batch_of(EXAMPLES, TOKENS), batch_of(1, TOKENS)
    steps = {}
    for method in (PLAIN, BLOB, FULL):
        for checkpointing in (False, True):
            cost, memory = training(shape, method, batch, checkpointing)
            steps[method + CHECKPOINTING * checkpointing] = described([cost]) | {"GB": memory}
    posterior = find_posterior(build(shape, BLOB))
    assert posterior is not None
    entries = sum(mean.numel() for mean in posterior.named_means().values())
    draws = {num: described(prediction(shape, one, num)) | {"host_seconds": num * entries / normals} for num in DRAWS}
    return {"training": steps, "prediction": draws}


def described(costs: list[Cost]) -> dict[str, Any]:
    """Sums over forwards, and seconds by GPU."""
    return {
        "flops": sum(cost.flops for cost in costs),
        "bytes": sum(cost.bytes for cost in costs),
        "kernels": sum(len(cost.operations) for cost in costs),
        "seconds": {name: sum(seconds(cost, gpu) for cost in costs) for name, gpu in GPUS.items()},
    }


def against_measured() -> dict[str, dict[str, float]]:
    """Qwen-7B's LoRA: what its authors measured on an A100, and the estimate of the same."""
    rows = {}
    for tokens, (gigabytes, measured) in QWEN_MEASURED.items():
        adapter: dict[str, Any] = {"rank": 64, "targets": "all-linear", "float32": False}
        cost, memory = training(QWEN, PLAIN, batch_of(1, tokens), checkpointing=True, **adapter)
        estimated = 8 * seconds(cost, GPUS["A100"])
        rows[f"{tokens} tokens"] = {
            "s, measured": measured,
            "s, estimated": estimated,
            "measured / estimated": measured / estimated,
            "GB, measured": gigabytes,
            "GB, estimated": sum(memory.values()),
            "measured / estimated GB": gigabytes / sum(memory.values()),
        }
    return rows


def training_row(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """A line of the table."""
    whole = sum(found["GB"].values())
    return {
        "TFLOP": found["flops"] / 1e12,
        **{f"{name} s": value for name, value in found["seconds"].items()},
        **{f"{name} time / LoRA": value / plain["seconds"][name] for name, value in found["seconds"].items()},
        "kernels": found["kernels"],
        **{f"{part}, GB": value for part, value in found["GB"].items()},
        "GB": whole,
        "GPUs of 80 GB": math.ceil(whole * 1e9 / GPUS["A100"].memory),
    }


def report(results: dict[str, Any]) -> str:
    """Tables, in Markdown."""
    text = [
        "# Estimate for GPUs\n",
        "Made by `python benchmarks/gpu_estimate.py`, whose first lines say how. Nothing was run on a GPU but what "
        f"others have measured, in the last table. Assumed: {MATMUL_SHARE:.0%} of peak for matrix products, "
        f"{BANDWIDTH_SHARE:.0%} of bandwidth, {LAUNCH * 1e6:.0f} µs a kernel. Training: {EXAMPLES} × {TOKENS} tokens, "
        f"r = {RANK}, q and v. Prediction: one input of {TOKENS} tokens. Seconds are summed over the GPUs that a model "
        "needs, without communication; their number is by memory, without a reserve.\n",
    ]
    for name, found in results["models"].items():
        steps = found["training"]
        rows = {
            method: training_row(step, steps[PLAIN + CHECKPOINTING * method.endswith(CHECKPOINTING)])
            for method, step in steps.items()
        }
        draws = {
            f"N = {num}": {
                "TFLOP": cost["flops"] / 1e12,
                **{f"{gpu} ms": 1e3 * value for gpu, value in cost["seconds"].items()},
                "noise on the host, ms": 1e3 * cost["host_seconds"],
                "A100 time / N = 0": cost["seconds"]["A100"] / found["prediction"][DRAWS[0]]["seconds"]["A100"],
            }
            for num, cost in found["prediction"].items()
        }
        text += [f"## {name}: a training step\n", evaluation.markdown_table(rows)]
        text += [f"## {name}: a prediction\n", evaluation.markdown_table(draws)]
    text += ["## The estimate against a measurement of others: Qwen-7B, LoRA, A100\n"]
    text += [evaluation.markdown_table(results["Qwen-7B"])]
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    """Count, write, print."""
    parser = parser_of(__doc__, "scaling")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    normals = normals_a_second()
    assumed = {"matmul_share": MATMUL_SHARE, "bandwidth_share": BANDWIDTH_SHARE, "launch": LAUNCH}
    results = {
        "assumed": assumed | {"normals_a_second_on_host": normals},
        "machine": machine(),
        "models": {name: estimate(shape, normals) for name, shape in SHAPES.items()},
        "Qwen-7B": against_measured(),
    }
    keep(options.results, results, file="estimate.json")
    write_text(options.results / "estimate.md", report(results))
    print(report(results))


if __name__ == "__main__":
    main()

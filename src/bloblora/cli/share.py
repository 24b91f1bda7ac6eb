"""A run for others: exported for other programs, and on the Hugging Face hub."""

import shlex
from typing import Any, Literal

from ..hub import push as push_run
from ..hub import write_card
from ..runs import CodeOptions, RunError, import_adapter


def import_(
    directory: str,
    output: str,
    code: CodeOptions,
    model: str | None = None,
    task: str = "choice_letter",
    max_length: int = 300,
    prior_std: float = 0.2,
    std_parameterization: Literal["square", "softplus"] | None = None,
) -> None:
    """Make a run of an adapter that the published BLoB code saved (`--checkpoint` of Wang-ML-Lab/bayesian-peft).

    The folder has adapter_config.json and adapter_model.safetensors with `lora_A_rho` of each layer. Only adapters of
    language models can be imported, since of others that code saves no classification head.

    Examples:
      bloblora import checkpoints/blob/obqa --model meta-llama/Llama-2-7b-hf --output runs/obqa
      bloblora evaluate runs/obqa --data obqa:test

    Args:
        directory: folder that the published code saved an adapter to.
        output: folder of the run, new.
        model: base model: a hub id or a folder; default the one that the adapter names.
        task: how questions become logits, `choice_letter` as in the published code, or `choice_text`.
        max_length: most tokens of a question.
        prior_std: σp, its `--bayes-beta`.
        std_parameterization: `square` for σ = ρ², `softplus` for a negative `--bayes-eps`; default by the sign of ρ.
        code: of the base model.
    """
    how: dict[str, Any] = {"prior_std": prior_std, "std_parameterization": std_parameterization}
    how |= {"model": model, "task": task, "max_length": max_length, "trust_remote_code": code.trust_remote_code}
    run = import_adapter(directory, output, **how)
    print(f"{output}: a run of method {run.method.name}; next: bloblora evaluate {shlex.quote(output)} --data FILE")


def export(
    directory: str,
    output: str,
    code: CodeOptions,
    format: Literal["lora", "merged", "gguf"] = "lora",
    samples: int = 10,
    seed: int = 0,
    draw: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a run for other programs: its mean and draws as ordinary LoRAs, or one of them as a whole model.

    `lora` makes a folder a draw that PEFT and servers of several LoRAs load, such as vLLM, `gguf` a file a draw for
    llama.cpp, `merged` one model that needs no adapter. Draw s is the function that draw s of `predict` is for the same
    seed. manifest.json has the hashes, the names to serve the draws by, and the server's command; with it
    `bloblora.client` asks a server for all draws and averages. See docs/export.md.

    Examples:
      bloblora export runs/arc --output exports/arc
      bloblora export runs/arc --format gguf --samples 5 --output exports/arc-gguf
      bloblora export runs/desk --format merged --output exports/desk-mean
      bloblora export runs/desk --format merged --draw 3 --output exports/desk-3

    Args:
        directory: folder of a run.
        output: folder to make; it appears when it is complete.
        code: of the base model.
        format: `lora`, `merged` or `gguf`.
        samples: weight draws N of `lora` and `gguf`; 0 is the mean alone.
        seed: of the draws.
        draw: which one to merge, counted from 0; default the mean.
        dtype: of the tensors of `lora`; `merged` has the base model's, `gguf` float32.
    """
    from ..export import export as export_run

    try:
        more: dict[str, Any] = {"draw": draw, "dtype": dtype, "trust_remote_code": code.trust_remote_code}
        manifest = export_run(directory, output, format, samples, seed, **more)
    except NotImplementedError as error:  # a quantized base that PEFT can't merge
        raise RunError(f"{directory}: {error}") from error
    print(f"{output}: {len(manifest.files)} files, {', '.join(filter(None, [manifest.mean, *manifest.draws]))}")
    for program, command in manifest.commands.items():
        print(f"{program}: cd {shlex.quote(output)} && {command}")
    for warning in manifest.warnings:
        print(f"note: {warning}")


def card(directory: str, to: str | None = None, base_model: str | None = None) -> None:
    """Write a model card, the README.md of a run's folder: use, data, settings, metrics, promises, limits.

    Metrics are those that `bloblora evaluate` has written into the folder, of all data sets; pictures are
    reliability.png and reliability-NAME.png in it. What isn't there is left out.

    Examples:
      bloblora evaluate runs/desk --data support_desk:test --diagram runs/desk/reliability-test.png
      bloblora card runs/desk

    Args:
        directory: folder of a run.
        to: name on the hub, `user/name`, for the card's examples.
        base_model: hub id of the base model, where the run was trained from a folder or a file.
    """
    print(f"written to {write_card(directory, to, base_model)}")


def push(
    directory: str,
    to: str,
    code: CodeOptions,
    revision: str | None = None,
    base_model: str | None = None,
    private: bool = False,
    update: bool = False,
) -> None:
    """Upload a run to the Hugging Face hub, with its model card; `hub:user/name` is then as good as its folder.

    Only what the run needs goes up, no checkpoints and no training records, after a copy of it has been loaded. A
    README.md that someone has written goes with it; else a card is made as by `bloblora card`. The token is that of
    `hf auth login`, or HF_TOKEN.

    Examples:
      bloblora push runs/desk --to user/desk --private
      bloblora predict hub:user/desk --input queries.jsonl

    Args:
        directory: folder of a run.
        to: name on the hub, `user/name`.
        code: of the base model.
        revision: branch to commit to, made where it is missing; default main.
        base_model: hub id of the base model, needed where the run was trained from a folder or a file.
        private: make a private repository.
        update: commit to a repository that exists already.
    """
    how: dict[str, Any] = {"private": private, "revision": revision, "update": update, "base_model": base_model}
    address = push_run(directory, to, trust_remote_code=code.trust_remote_code, **how)
    print(f"uploaded: {address}; next: bloblora predict hub:{to}{f'@{revision}' if revision else ''} --input FILE")

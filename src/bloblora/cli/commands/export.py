"""The command that writes a run for other programs."""

from typing import Literal

from transformers.utils import logging

from ... import runs


def export(
    directory: str,
    output: str,
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
        directory: folder of the run.
        output: folder to make; it appears when it is complete.
        format: `lora`, `merged` or `gguf`.
        samples: weight draws N of `lora` and `gguf`; 0 is the mean alone.
        seed: of the draws.
        draw: which one to merge, counted from 0; default the mean.
        dtype: of the tensors of `lora`; `merged` has the base model's, `gguf` float32.
    """
    logging.disable_progress_bar()
    from ...export import export as export_run

    try:
        manifest = export_run(directory, output, format, samples, seed, draw=draw, dtype=dtype)
    except NotImplementedError as error:  # a quantized base that PEFT can't merge
        raise runs.RunError(f"{directory}: {error}") from error
    print(f"{output}: {len(manifest.files)} files, {', '.join(filter(None, [manifest.mean, *manifest.draws]))}")
    for program, command in manifest.commands.items():
        print(f"{program}: cd {output} && {command}")
    for warning in manifest.warnings:
        print(f"note: {warning}")

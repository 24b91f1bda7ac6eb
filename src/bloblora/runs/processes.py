"""The processes of one run, as `accelerate launch` or `torchrun` start them, and files of lines that they share."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from rich.console import Console
from rich.progress import track
from torch import nn

from ..files import naming, parse_json, read_json, replacing, write_json
from ..messages import quoted
from .config import RunError
from .entries import changes
from .folder import alone

CHUNK = 256
"""Records that are read, predicted and written at a time."""

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether the processes compute on the CPU: there is nothing else, or accelerate was told so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def computes_bfloat16() -> bool:
    """Whether the processes' device multiplies matrices in bfloat16 natively: recent GPUs; AVX512-BF16 or AMX."""
    if on_cpu():
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch before 2.11 doesn't say
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def use_device(name: str | None) -> None:
    """Compute on a device from now on: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None is the GPU where there is one.

    It must be chosen before anything is computed, and is then that of the whole process.

    Raises:
        RunError: it is none of these, or isn't there.
    """
    if name is None:
        return
    if not (known := re.fullmatch(r"cpu|mps|cuda(?::(\d+))?", name)):
        raise RunError(f"device must be cpu, cuda, cuda:N or mps, got {quoted(name)}")
    if name == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    there = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if ("cuda:0" if name == "cuda" else name) not in there:
        raise RunError(f"device {quoted(name)}: PyTorch sees no such device here, only {', '.join(there)}")
    if (index := known[1]) is not None:
        # Of all that are visible, so that the Trainer doesn't split its batches over the others.
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(index, os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def visible_device(index: str, visible: str) -> str:
    """What CUDA calls the device that PyTorch calls ``cuda:index``, where CUDA_VISIBLE_DEVICES is ``visible``."""
    return visible.split(",")[int(index)] if visible else index


def processes() -> PartialState:
    """This process among all of the run, which can wait for one another; the only one where no launcher started it."""
    return PartialState(cpu=on_cpu())


def sharded() -> bool:
    """Whether FSDP2 splits models over the processes, so that all must call a model together."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and Accelerator(cpu=on_cpu()).is_fsdp2


def shard(model: nn.Module) -> nn.Module:
    """Leave each process a part of every weight; those of the first process count."""
    return fsdp2_prepare_model(Accelerator(cpu=on_cpu()), model)


def check_alone(command: str) -> None:
    """Raise a RunError where several processes were started for a command that isn't for them."""
    if (count := processes().num_processes) > 1:
        raise RunError(f"{command} is one process, not {count}; `bloblora predict` is what several can share")


def share_of(chunks: Iterable[T]) -> Iterator[T]:
    """This process's chunks: every W-th of W processes; all of them where a model is split over the processes."""
    return iter(chunks) if sharded() else islice(chunks, processes().process_index, None, processes().num_processes)


def part_of(file: Path, process: int | None = None) -> Path:
    """Where a process writes its lines, by default this one: the file itself where there is no other."""
    if processes().num_processes == 1 or (sharded() and processes().is_main_process):
        return file
    return file.with_name(f".{file.name}.{processes().process_index if process is None else process}")


def join_parts(file: Path) -> None:
    """Put the lines of all processes into one file, in the order of the whole, once all have written theirs."""
    state = processes()
    state.wait_for_everyone()
    if sharded() and not state.is_main_process:
        part_of(file).unlink()  # the same lines as the first's
    if state.num_processes == 1 or sharded() or not state.is_main_process:
        return
    names = [part_of(file, process) for process in range(state.num_processes)]
    with replacing(file) as joined, ExitStack() as stack, joined.open("wb") as handle:
        parts = [stack.enter_context(name.open("rb")) for name in names]
        for number in count():
            lines = list(islice(parts[number % len(parts)], CHUNK))
            if not lines:
                break
            handle.writelines(lines)
    for name in names:
        name.unlink()


def append_lines(
    file: Path,
    rows: Sequence[T],
    describe: Callable[[Sequence[T]], Iterable[dict[str, Any]]],
    identity: dict[str, Any],
    *,
    is_of: Callable[[dict[str, Any], T], bool] = lambda line, row: True,
    progress: bool = False,
) -> None:
    """Write what ``describe`` says of each row, a line each, from where an earlier call was stopped.

    Args:
        file: JSON lines; ``<file>.meta.json`` beside it says whose they are.
        rows: all of them, also those that are in the file.
        describe: of a chunk of rows.
        identity: what the lines depend on, as JSON takes it.
        is_of: whether a line that is there is what could be said of a row.
        progress: show a bar.

    Raises:
        RunError: the file is of something else, has lines of other rows or more of them than there are rows, or another
            process writes it.
    """
    meta = file.with_name(f"{file.name}.meta.json")
    with alone(file), alone(meta):
        _append_lines(file, meta, rows, describe, identity, is_of, progress)


def _append_lines(
    file: Path,
    meta: Path,
    rows: Sequence[T],
    describe: Callable[[Sequence[T]], Iterable[dict[str, Any]]],
    identity: dict[str, Any],
    is_of: Callable[[dict[str, Any], T], bool],
    progress: bool,
) -> None:
    if meta.is_file():
        _check_same(file, read_json(meta, RunError), identity)
    elif file.exists():
        raise RunError(f"{file}: is there, without the {meta.name} that says of what it is; give another file")
    write_json(meta, identity)
    with naming(file), file.open("ab+") as handle:
        starts = range(_whole_chunks(file, handle, rows, is_of), len(rows), CHUNK)
        for start in track(starts, "predicting", disable=not progress, console=Console(stderr=True)):
            lines = [
                json.dumps(line, ensure_ascii=False, allow_nan=False) for line in describe(rows[start : start + CHUNK])
            ]
            handle.write("".join(f"{line}\n" for line in lines).encode())
            handle.flush()


def _check_same(file: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    if found := changes(stored, identity):
        raise RunError(f"{file} holds other predictions ({'; '.join(found)}); give another file, or remove it")


def _whole_chunks(file: Path, handle: Any, rows: Sequence[T], is_of: Callable[[dict[str, Any], T], bool]) -> int:
    """Lines in whole chunks, each that of its row; what follows them, of which a stop may have cut something, goes."""
    handle.seek(0)
    size = kept = done = 0
    for number, line in enumerate(handle, start=1):
        if number > len(rows):
            raise RunError(f"{file}: has more lines than the {len(rows)} records; remove it to predict again")
        size += len(line)
        if not line.endswith(b"\n"):
            break
        if not _is_line_of(line, rows[number - 1], is_of):
            raise RunError(f"{file}:{number}: isn't a prediction of record {number}; remove the file to predict again")
        if number % CHUNK == 0 or number == len(rows):
            kept, done = size, number
    handle.truncate(kept)
    return done


def _is_line_of(line: bytes, row: T, is_of: Callable[[dict[str, Any], T], bool]) -> bool:
    try:
        return is_of(parse_json(line), row)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False

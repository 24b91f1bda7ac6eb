"""Hidden states of the trunk on disk: for adapters in the top layers only, the base below them is computed once.

Training sees each example several times, evaluation once for each run; what lies below the first adapted layer is the
same each time. It runs here in eval mode, so a base model that has dropout of its own trains without it in the trunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..contexts import eval_mode
from ..files import file_sha256, locked, naming
from ..tasks.likelihood import Likelihood, likelihood_of
from .forward import PredictionTask, Trunk, trunk_below

_HIDDEN, ROW = "trunk_hidden", "trunk_row"
_FORMAT_VERSION = 3


@dataclass(frozen=True)
class CachedTrunk:
    """A task whose batches bring the trunk's output along, so that its forwards start above it.

    Attributes:
        task: of the same examples.
        trunk: the blocks that are spared.
        hidden: (all tokens, d), of one example after the other.
        starts: where each example's tokens start, (n + 1,).
        dtype: of the hidden states.
        padded_left: whether the task pads on the left.
    """

    task: PredictionTask
    trunk: Trunk
    hidden: np.ndarray
    starts: np.ndarray
    dtype: torch.dtype
    padded_left: bool

    @property
    def likelihood(self) -> Likelihood:
        """The task's."""
        return likelihood_of(self.task)

    def length(self, example: Any) -> int:
        """As the task's."""
        return self.task.length(example)

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """The task's batch, and the hidden states (b, T, d) of its tokens; 0 for padding."""
        batch = self.task.collate(examples)
        ids = batch["input_ids"]
        hidden = torch.zeros(*ids.shape, self.hidden.shape[-1], dtype=self.dtype)
        for i, example in enumerate(examples):
            row = example[ROW]
            own = torch.from_numpy(self.hidden[self.starts[row] : self.starts[row + 1]].copy()).view(self.dtype)
            hidden[i, _place(len(own), ids.shape[1], self.padded_left)] = own
        return batch | {_HIDDEN: hidden}

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The task's logits, from the blocks above the trunk."""
        inputs = {name: tensor for name, tensor in batch.items() if name != _HIDDEN}
        with self.trunk.replayed(batch[_HIDDEN]):
            return self.task.logits(model, inputs)


class IndexedExamples(Sequence[Any]):
    """Examples that know their place in the cache, where the first of them is at ``start``."""

    def __init__(self, examples: Sequence[Any], start: int = 0) -> None:
        self._examples, self._start = examples, start

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return {**self._examples[index], ROW: self._start + index}


def cache_trunk(
    model: nn.Module,
    task: PredictionTask,
    examples: Sequence[Any],
    folder: Path,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> tuple[CachedTrunk, IndexedExamples]:
    """Compute the trunk of examples, or find it in a folder, where it is kept by a hash of model, tokens and versions.

    The file, ``KEY.DTYPE.SHA256.npy``, holds every token's hidden state as integers of the same bits (NumPy has no
    bfloat16): n tokens × d × 4 bytes in float32. It is memory-mapped.

    Args:
        model: a PEFT model with LoRA in its top layers only.
        task: whose examples these are.
        examples: encoded.
        folder: of the cache.
        batch_size: examples a forward.
        progress: show a bar.

    Returns:
        A task and examples to train and predict with in place of the given ones.

    Raises:
        ValueError: the first block is adapted, the adapted layers don't stand in one list of blocks, or the file was
            altered.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    trunk = trunk_below(model, names)
    if trunk is None:
        raise ValueError(
            "the model has no trunk: adapt only layers above its first block (LoraConfig.layers_to_transform), all of "
            "them in one list of blocks or the output head"
        )
    folder.mkdir(parents=True, exist_ok=True)
    padded_left = _pads_left(task, examples)
    lengths = [task.collate([example])["input_ids"].shape[1] for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    key = _key(model, trunk, task, examples)
    with locked(folder / key):  # another run may be computing the same
        if not (files := [*folder.glob(f"{key}.*.npy")]):
            order = sorted(range(len(examples)), key=lambda i: -lengths[i])
            batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            tracked = track(batches, "trunk", disable=not progress, console=Console(stderr=True))
            computed = ((rows, _compute(model, trunk, task, [examples[i] for i in rows])) for rows in tracked)
            partial = folder / f"{key}.partial"
            try:
                dtype = _write(partial, computed, starts, padded_left)
                name = f"{key}.{str(dtype).removeprefix('torch.')}.{file_sha256(partial)}.npy"
                files = [partial.replace(folder / name)]
            finally:
                partial.unlink(missing_ok=True)
    _, dtype_name, digest, _ = files[0].name.split(".")
    if file_sha256(files[0]) != digest:
        raise ValueError(f"{files[0]}: its SHA-256 isn't the one in its name: it was altered; remove it")
    hidden = np.load(files[0], mmap_mode="r", allow_pickle=False)
    dtype = getattr(torch, dtype_name)
    return CachedTrunk(task, trunk, hidden, starts, dtype, padded_left), IndexedExamples(examples)


def _write(
    file: Path, computed: Iterable[tuple[list[int], Tensor]], starts: np.ndarray, padded_left: bool
) -> torch.dtype:
    """Write the hidden states of each batch's examples to their places, and return their type.

    Not through a memory map, in which a full disk ends the process by SIGBUS.
    """
    dtype, begin = torch.float32, 0
    with naming(file), file.open("wb") as handle:
        for rows, hidden in computed:
            dtype, values = hidden.dtype, hidden.view(_integer(hidden.dtype)).numpy()
            if not begin:
                shape = (int(starts[-1]), values.shape[-1])
                header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(handle, header)
                begin = handle.tell()
            for i, own in zip(rows, values, strict=True):
                handle.seek(begin + int(starts[i]) * own[0].nbytes)
                handle.write(own[_place(int(starts[i + 1] - starts[i]), len(own), padded_left)].tobytes())
    return dtype


@torch.no_grad()
def _compute(model: nn.Module, trunk: Trunk, task: PredictionTask, examples: Sequence[Any]) -> Tensor:
    """The trunk's output (b, T, d) on a batch of examples, on the CPU."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in task.collate(examples).items()}
    with eval_mode(model):
        output = trunk.compute(lambda: task.logits(model, batch))
    return (output[0] if isinstance(output, tuple) else output).cpu()


def _pads_left(task: PredictionTask, examples: Sequence[Any]) -> bool:
    """The side on which a task pads, seen on its shortest example beside its longest."""
    by_length = sorted(range(len(examples)), key=lambda i: task.length(examples[i]))
    short, long = examples[by_length[0]], examples[by_length[-1]]
    own, row = task.collate([short])["input_ids"][0], task.collate([short, long])["input_ids"][0]
    return not torch.equal(row[: len(own)], own)


def _place(length: int, width: int, padded_left: bool) -> slice:
    """Where an example's own tokens are in its padded row of a batch."""
    return slice(width - length, width) if padded_left else slice(0, length)


def _integer(dtype: torch.dtype) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _key(model: nn.Module, trunk: Trunk, task: PredictionTask, examples: Sequence[Any]) -> str:
    """Hash of all that the trunk's output depends on."""
    digest = hashlib.sha256(f"{_FORMAT_VERSION} {torch.__version__} {len(trunk.blocks)}".encode())
    for part in _parts(model, trunk, task, examples):
        digest.update(part)
    return digest.hexdigest()[:32]


def _parts(model: nn.Module, trunk: Trunk, task: PredictionTask, examples: Sequence[Any]) -> Iterator[bytes]:
    config: Any = model.config
    yield json.dumps(config.to_dict(), sort_keys=True, default=str).encode()
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *trunk.blocks):
        for name, tensor in module.state_dict().items():
            yield name.encode()
            yield tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    for example in examples:
        for name, tensor in sorted(task.collate([example]).items()):
            if name != "labels":
                yield f"{name} {tuple(tensor.shape)}".encode()
                yield tensor.contiguous().view(torch.uint8).numpy().tobytes()

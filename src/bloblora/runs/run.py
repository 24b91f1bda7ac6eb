"""A trained run and its predictions."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import models, tasks
from ..data import unanswered
from ..prediction import Prediction, Sampler, StoppingRule, predict
from .approximation import Approximation
from .checks import check_sharded, num_labels
from .config import TrainConfig
from .folder import open_run
from .processes import processes, shard, sharded
from .remote import local_folder


@dataclass
class Run:
    """A trained run, ready to predict.

    Attributes:
        model: the model, in eval mode: a PEFT model but for full fine-tuning.
        tokenizer: its tokenizer.
        task: how records become logits.
        sampler: where the method's draws come from.
        config: the configuration that it was trained with.
        training: what the training took: ``seconds`` (of all sessions, without what a stop threw away),
            ``peak_memory_bytes`` (of the last session), ``final`` (the last log).
        adapter_sha256: of the trained weights' file.
        approximation: how `predict` saves forwards; None for all draws.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: tasks.Task
    sampler: Sampler
    config: TrainConfig
    training: dict[str, Any] = field(default_factory=dict)
    adapter_sha256: str | None = None
    approximation: Approximation | None = None

    @property
    def approximate(self) -> str | None:
        """The approximation's name."""
        return self.approximation.name if self.approximation else None

    @property
    def stop(self) -> StoppingRule | None:
        """When `predict` makes no more draws for an input."""
        return self.approximation.stop if self.approximation else None

    def predict(
        self,
        records: Sequence[dict[str, Any]],
        num_samples: int = 10,
        seed: int = 0,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Prediction:
        """Predictions of raw records, in their order, whatever label they have; see `bloblora.predict`."""
        examples = tasks.encode_all(self.task, [unanswered(record) for record in records], self.tokenizer)
        return predict(
            self.model,
            examples,
            num_samples,
            seed,
            task=self.task,
            sampler=self.sampler,
            stop=self.stop,
            batch_size=batch_size,
            progress=progress,
        )


def load_run(directory: str | os.PathLike[str], approximate: str | None = None) -> Run:
    """Load a finished run, onto the GPU where there is one; under FSDP each process holds a part of it.

    Args:
        directory: its folder, or its place on the hub: ``hub:user/name`` or ``hub:user/name@revision``.
        approximate: how its predictions save forwards, at some loss: ``mirrored`` (draws in pairs about the mean; two
            do what several do), ``linearized`` (two passes, whatever N), ``top-blocks:K`` (draws in the last K blocks
            alone), ``stop`` (no more draws for an input whose answer is settled; ``stop:ERROR:TOLERANCE``), or
            ``mirrored-stop`` (both; try it with N = 4).

    Raises:
        RunError: the folder isn't one, its training isn't finished, or its method can't be approximated so.
        AdapterFileError: the adapter's files are damaged.
    """
    directory = local_folder(directory)
    description = open_run(directory)
    approximation = None if approximate is None else Approximation.parse(approximate)
    if approximation:
        approximation.check(description.method)
    config, task = description.config, description.task
    if split := sharded():
        check_sharded(config.method, approximate)
    base = base_model(config, task)
    if torch.accelerator.is_available() and not split and not getattr(base, "is_quantized", False):
        base.to(processes().device)
    model, sampler = description.method.load(base, directory)
    if split:
        model = shard(model)
    tokenizer = models.load_tokenizer(config.model)
    if approximation:
        sampler = approximation.apply(sampler)
    sha256 = description.adapter_sha256
    return Run(model, tokenizer, task, sampler, config, description.training, sha256, approximation)


def base_model(config: TrainConfig, task: tasks.Task) -> Any:
    """The pretrained model, with a head where the task needs one."""
    return models.load_model(config.model, num_labels=num_labels(task), dtype=config.dtype)

"""A trained run and its predictions."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import models, tasks
from ..prediction import Prediction, Sampler, predict
from .checks import num_labels
from .config import TrainConfig
from .folder import open_run
from .processes import processes
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
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: tasks.Task
    sampler: Sampler
    config: TrainConfig
    training: dict[str, Any] = field(default_factory=dict)
    adapter_sha256: str | None = None

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
        unlabelled = [{k: v for k, v in record.items() if k not in ("label", "answer")} for record in records]
        examples = tasks.encode_all(self.task, unlabelled, self.tokenizer)
        return predict(
            self.model,
            examples,
            num_samples,
            seed,
            task=self.task,
            sampler=self.sampler,
            batch_size=batch_size,
            progress=progress,
        )


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Load a finished run, onto the GPU where there is one.

    Args:
        directory: its folder, or its place on the hub: ``hub:user/name`` or ``hub:user/name@revision``.

    Raises:
        RunError: the folder isn't one, or its training isn't finished.
        AdapterFileError: the adapter's files are damaged.
    """
    directory = local_folder(directory)
    description = open_run(directory)
    config, task = description.config, description.task
    base = base_model(config, task)
    if torch.accelerator.is_available() and not getattr(base, "is_quantized", False):
        base.to(processes().device)
    model, sampler = description.method.load(base, directory)
    tokenizer = models.load_tokenizer(config.model)
    return Run(model, tokenizer, task, sampler, config, description.training, description.adapter_sha256)


def base_model(config: TrainConfig, task: tasks.Task) -> Any:
    """The pretrained model, with a head where the task needs one."""
    return models.load_model(config.model, num_labels=num_labels(task), dtype=config.dtype)

"""What the posterior looks like during training, for TensorBoard."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..adapter import Posterior, find_posterior
from ..adapter.sharding import is_sharded
from ..posterior import separate_noise


class PosteriorHistograms(TensorBoardCallback):
    """`TensorBoardCallback` that also writes the posterior, as often as the Trainer logs its losses.

    Of each Gaussian factor there are histograms of Ω (``std/<layer>.lora_A``), M (``mean/…``) and |M|/Ω
    (``signal_to_noise/…``: an entry below 1 says little), and its KL in nats as a scalar (``kl/…``). A plain model has
    the losses only. Give the Trainer ``report_to=[]`` beside it, or the losses are written twice.

    Args:
        folder: of the event files; default the Trainer's own, in its ``output_dir``. Where one callback serves several
            trainings, such as those of an ensemble's members, the later ones go to ``folder/2``, ``folder/3``, …
        every: write the posterior at every so many logs of losses.

    Raises:
        RuntimeError: tensorboard isn't installed.
        ValueError: ``every`` is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        super().__init__()
        self._folder, self._every = folder, every
        self._trainings = self._logs = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Open the event file of one training.

        Raises:
            ValueError: FSDP has split the model over the processes.
        """
        if is_sharded(kw["model"]):
            raise ValueError(
                "model: each process holds a part of it (FSDP); histograms are of a whole one: leave them out"
            )
        self._trainings += 1
        self._logs = 0
        if self._folder is not None:
            later = str(self._trainings) if self._trainings > 1 else ""
            self.logging_dir = str(Path(self._folder) / later)
        super().on_train_begin(args, state, control, **kw)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kw: Any
    ) -> None:
        """Write the losses, and the posterior when it is due."""
        super().on_log(args, state, control, logs=logs, **kw)
        if self.tb_writer is None or "loss" not in (logs or {}):
            return
        posterior = find_posterior(kw["model"])
        if posterior is not None and self._logs % self._every == 0:
            _write(self.tb_writer, posterior, state.global_step)
        self._logs += 1


@torch.no_grad()
def _write(writer: Any, posterior: Posterior, step: int) -> None:
    stds, parameters = posterior.named_stds(), posterior.named_std_parameters()
    for name, mean in posterior.named_means().items():
        values = {"std": stds[name], "mean": mean, "signal_to_noise": mean.abs() / stds[name]}
        for kind, tensor in values.items():
            writer.add_histogram(f"{kind}/{name}", tensor.float(), step)
        with separate_noise(mean.device):  # looking must not change the noise of what follows
            kl = posterior.prior.kl([mean], [parameters[name]], posterior.config.std_parameterization)
        writer.add_scalar(f"kl/{name}", kl.item(), step)
    writer.flush()

"""What happens between the steps of a training: the KL step, warnings, and the posterior in TensorBoard."""

import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..adapter import Posterior, find_posterior
from ..adapter.sharding import is_sharded
from ..posterior import separate_noise
from .checkpoints import KEPT

_RANK_STRIDE = 1_000_003


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
        ValueError: ``every`` is below 1; when training starts, FSDP has split the model over the processes.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        super().__init__()
        self._folder, self._every = folder, every
        self._trainings = self._logs = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Open the event file of one training."""
        if is_sharded(kw["model"]):
            raise ValueError("model: FSDP holds it in parts, and histograms are of a whole one: leave them out")
        self._trainings, self._logs = self._trainings + 1, 0
        if self._folder is not None:
            self.logging_dir = str(Path(self._folder, str(self._trainings) if self._trainings > 1 else ""))
        super().on_train_begin(args, state, control, **kw)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kw: Any) -> None:
        """Write the losses, and the posterior when it is due."""
        super().on_log(args, state, control, logs=logs, **kw)
        if self.tb_writer is None or "loss" not in (logs or {}):
            return
        if self._logs % self._every == 0 and (posterior := find_posterior(kw["model"])):
            _write(self.tb_writer, posterior, state.global_step)
        self._logs += 1


class ElboCallback(TrainerCallback):
    """Hooks of a training with `BlobTrainerMixin`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give each process its own noise; a resumed run then loads the generator that the checkpoint holds."""
        self.trainer.begin_class_means()
        torch.manual_seed(args.seed + _RANK_STRIDE * args.process_index)
        self.trainer.reset_logs()  # also of an attempt with too large a batch
        if isinstance(state.stateful_callbacks, dict) and (kept := state.stateful_callbacks.get(KEPT)):
            self.trainer.restore_logs(kept)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell the sampler the epoch; the Trainer's own attempt misses it where it skips batches in many processes."""
        if hasattr(loader := kwargs["train_dataloader"], "set_epoch"):
            loader.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Let the KL take its own step."""
        self.trainer.kl_step()
        if (posterior := self.trainer.posterior) is not None:
            self.trainer._kl_weights.append(self.trainer.current_kl_weight(head=not posterior.adapter_is_gaussian))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Look at the last step's weights, and at the posterior."""
        self.trainer._check_weights()
        if (posterior := self.trainer.posterior) is not None:
            posterior.batch.expects_labels = False
            summary = posterior.summary()  # by all processes: each may hold a part of it
            if problem := _degenerate(posterior.start_std(), summary):
                self.trainer.problems.append(problem)
                if state.is_world_process_zero:
                    warnings.warn(problem, stacklevel=1)


@torch.no_grad()
def _write(writer: Any, posterior: Posterior, step: int) -> None:
    stds = posterior.named_stds()
    for name, mean in posterior.named_means().items():
        values = {"std": stds[name], "mean": mean, "signal_to_noise": mean.abs() / stds[name]}
        for kind, tensor in values.items():
            writer.add_histogram(f"{kind}/{name}", tensor.float(), step)
    with separate_noise(mean.device):  # looking must not change the noise of what follows
        for name, kl in posterior.named_kls().items():
            writer.add_scalar(f"kl/{name}", kl.item(), step)
    writer.flush()


def _degenerate(init_std: float, summary: dict[str, float]) -> str | None:
    """What is wrong with a posterior that says nothing."""
    median = summary["median_std"]
    start = init_std * ((1 + math.sqrt(0.5)) / 2) ** 2
    if median < 0.01 * start:
        return (
            f"the posterior has collapsed: median Ω is {median:.1e}, so all draws are the mean. Raise kl_scale or "
            "prior_std, or lower learning_rate."
        )
    if summary["kl"] < 1:
        return (
            f"the posterior is the prior: its KL is {max(summary['kl'], 0):.2f} nats, so it has learned nothing. Lower "
            "kl_scale, raise prior_std or the number of steps, or train on more data."
        )
    # 1/√n: three standard errors of a fresh median. A median at the prior is no start, but of another run's posterior.
    if summary["share_at_prior"] < 0.5 and abs(median / start - 1) < 0.02 + 1 / math.sqrt(summary["num_parameters"]):
        return (
            f"the posterior has not left its start: median Ω is {median:.2e}, the start {start:.2e}. Raise the "
            "number of steps, or std_learning_rate."
        )
    return None

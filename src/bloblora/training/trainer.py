"""The Trainer with the evidence lower bound as its loss."""

import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..adapter import (
    AdapterFileError,
    Posterior,
    check_folder,
    find_posterior,
    load_posterior,
    save_posterior,
)
from .arguments import BlobTrainingArguments
from .kl_weights import kl_weight, rescaled_dataset_size

_RANK_STRIDE = 1_000_003


class TrainingTask(Protocol):
    """What the trainer needs of a task."""

    def length(self, example: Any) -> int:
        """Tokens that an encoded example takes in a batch."""
        ...

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (b, C) of a batch."""
        ...


class DivergedError(FloatingPointError):
    """A loss or gradient is not finite; the message names the step, the layer and the likely cause."""


class BlobTrainer(Trainer):
    """`transformers.Trainer` that trains a Bayesian LoRA on the ELBO, and a plain one on the NLL.

    Everything of the Trainer stays: accelerate, mixed precision, trackers, resume. See `BlobTrainingArguments` for the
    objective. Each optimizer step's log has ``nll``, ``kl``, ``kl_weight``, ``elbo`` (nats an example), ``median_std``
    and ``share_at_prior``.

    Args:
        model: a PEFT model, Bayesian after `bayesianize`.
        args: `BlobTrainingArguments`.
        task: where logits come from; without it the model's own ``outputs.loss`` is the NLL.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        DivergedError: by ``train``, when the loss or a gradient is not finite. Checkpoints stay as they are.
    """

    args: BlobTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: BlobTrainingArguments,
        *,
        task: TrainingTask | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self._module = model
        self.task = task
        self.posterior: Posterior | None = find_posterior(model)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch, whatever the model could do
        self._nll_sum, self._nll_count = torch.zeros((), device=args.device), 0
        self.add_callback(_ElboCallback(self))

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """As in the Trainer; ``resume_from_checkpoint=True`` takes the newest *complete* checkpoint."""
        if resume_from_checkpoint is True:
            found = last_checkpoint(str(self.args.output_dir))
            if found is None:
                raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {self.args.output_dir}")
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean NLL over the batch and the weight draws, plus the weighted KL where one optimizer takes both."""
        nll, logits = self._nll(model, inputs)
        for _ in range(self.args.num_weight_draws - 1):
            nll = nll + self._nll(model, inputs)[0]
        nll = nll / self.args.num_weight_draws
        self._nll_sum += nll.detach()
        self._nll_count += 1
        loss = nll
        if self.posterior is not None and self.args.optimizer_style == "joint" and self.args.kl_scale > 0:
            loss = nll + self.current_kl_weight() * self.posterior.kl()
        if not torch.isfinite(loss):
            raise self._diverged("the loss", nll)
        return (loss, {"logits": logits}) if return_outputs else loss

    def current_kl_weight(self) -> float:
        """Factor of the KL in this step's loss: s·λ_i / b."""
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        size = float(self._dataset_size())
        if self.args.dataset_rescaling:
            size = rescaled_dataset_size(size, self.args.gamma)
        num_batches = max(1, math.ceil(size / batch))
        position = self.state.global_step % num_batches + 1
        return self.args.kl_scale * kl_weight(position, num_batches, self.args.kl_weighting) / batch

    def kl_step(self) -> None:
        """The second half of an ``alternating`` step: θ ← θ - η_KL ∇(λ_i KL), on the mean and Ω alone."""
        if self.posterior is None or self.args.optimizer_style != "alternating" or self.args.kl_scale == 0:
            return
        parameters: list[Tensor] = [
            *self.posterior.named_means().values(),
            *self.posterior.named_std_parameters().values(),
        ]
        schedule = self._get_learning_rate() / self.args.learning_rate if self.args.learning_rate else 1.0
        gradients = torch.autograd.grad(self.posterior.kl() * self.current_kl_weight(), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-self.args.kl_learning_rate * schedule)

    def check_gradients(self) -> None:
        """Stop before a step that would write NaN into the weights."""
        if self.accelerator.scaler is not None:
            return  # float16: the scaler skips such steps itself
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        if not torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum()):
            raise self._diverged("a gradient")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the ELBO and the state of the posterior to a training log."""
        if "loss" in logs and self._nll_count:
            logs["nll"] = (self._nll_sum / self._nll_count).item()
            self._nll_sum.zero_()
            self._nll_count = 0
            if self.posterior is not None:
                summary = self.posterior.summary()
                logs["kl"], logs["kl_weight"] = summary["kl"], self.current_kl_weight()
                logs["elbo"] = -(logs["nll"] + logs["kl"] * logs["kl_weight"])
                logs["median_std"], logs["share_at_prior"] = summary["median_std"], summary["share_at_prior"]
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay leaves Ω alone: its prior is the KL's."""
        return [name for name in super().get_decay_parameter_names(model) if "blob_std_parameter" not in name]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluation on the posterior mean, or on the average over ``eval_num_samples`` draws."""
        from ..prediction import average_draws

        task = self.task
        if task is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            log_probs = average_draws(
                lambda: task.logits(model, inputs),
                self.posterior,
                self.args.eval_num_samples,
                self.args.seed,
            )
        labels = inputs.get("labels")
        loss = None if labels is None else F.nll_loss(log_probs, labels)
        return (loss, None, None) if prediction_loss_only else (loss, log_probs, labels)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.task is None or self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [self.task.length(example) for example in dataset]
        return _LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            lengths,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _nll(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.task is None:
            outputs = model(**inputs)
            return outputs.loss, outputs.logits
        logits = self.task.logits(model, inputs)
        return F.cross_entropy(logits, inputs["labels"]), logits

    def _dataset_size(self) -> int:
        if self.args.dataset_size is not None:
            return self.args.dataset_size
        try:
            return len(self.train_dataset)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(
                "dataset_size is None and the training data has no length; the KL is weighed against the number of "
                "examples: set BlobTrainingArguments.dataset_size"
            ) from error

    def _diverged(self, what: str, nll: Tensor | None = None) -> DivergedError:
        names = [n for n, p in self._module.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        names += [
            n for n, p in self._module.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        where = f"first in {names[0]}" if names else "in no weight yet, so in the activations of this batch"
        if nll is not None and torch.isfinite(nll):
            where = "in the KL: an entry of Ω has reached 0 or infinity" if not names else where
        init_std = f", init_std {self.posterior.config.init_std}" if self.posterior else ""
        return DivergedError(
            f"{what} is not finite at step {self.state.global_step + 1}, {where}. Likely cause: learning_rate "
            f"{self.args.learning_rate} (kl_learning_rate {self.args.kl_learning_rate}{init_std}) is too high; "
            f"halve it and resume from the last checkpoint in {self.args.output_dir}."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.posterior is not None and self.args.should_save:
            save_posterior(self.posterior, str(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.posterior is not None:
            load_posterior(self.posterior.model, resume_from_checkpoint, self.posterior.adapter_name)


class _LengthGroupedSampler(LengthGroupedSampler):
    """The Trainer's, with an order that its seed and the epoch decide, so that a resumed training finds its place."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class _ElboCallback(TrainerCallback):
    """Hooks of one optimizer step."""

    def __init__(self, trainer: BlobTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give each process its own noise; a resumed run then loads the generator that the checkpoint holds."""
        self.trainer._dataset_size()
        torch.manual_seed(args.seed + _RANK_STRIDE * args.process_index)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.check_gradients()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.kl_step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.trainer.posterior is not None:
            _warn_of_degenerate(self.trainer.posterior)


def _warn_of_degenerate(posterior: Posterior) -> None:
    """Warn of a posterior that says nothing."""
    median = posterior.summary()["median_std"]
    start = (posterior.config.init_std * (1 + math.sqrt(0.5)) / 2) ** 2
    if median < 0.01 * start:
        warnings.warn(
            f"the posterior has collapsed: median Ω is {median:.1e}, so all draws are the mean. Raise kl_scale or "
            "prior_std, or lower learning_rate.",
            stacklevel=2,
        )
    elif abs(median / start - 1) < 0.02:
        warnings.warn(
            f"the posterior has not left its start: median Ω is {median:.2e}, the start {start:.2e}. Raise kl_scale, "
            "the number of steps, or init_std.",
            stacklevel=2,
        )


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a training, or None.

    A process that is killed while it writes leaves a folder whose files are missing or cut; such a folder is passed
    over. The Trainer writes its state last and deletes old checkpoints only after that.
    """
    folders = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            check_folder(folder)
        except (OSError, ValueError, AdapterFileError):
            continue
        return folder
    return None

"""The Trainer with the evidence lower bound as its loss."""

import copy
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..adapter import Posterior, find_posterior, load_posterior
from ..adapter.bayesianize import is_head
from ..adapter.head import Bounding
from ..adapter.sharding import trained_state
from ..adapter.storage import adapter_folder
from ..adapter.variant import STD_PARAMETER
from ..files import as_os_error, naming
from ..messages import shortened
from ..posterior import separate_noise, stack
from ..tasks.likelihood import Categorical, likelihood_of, mean_nll
from .arguments import (
    CLASS_MEANS,
    OBJECTIVE,
    TRAINED,
    BlobTrainingArguments,
    Objective,
    automatic_head_kl_scale,
    automatic_kl_scale,
    automatic_std_learning_rate,
    check_style,
    kl_weight,
    rescaled_dataset_size,
)
from .callbacks import ElboCallback
from .checkpoints import KEPT, last_checkpoint, remove_torn, tensor_files_sha256
from .class_means import LeftOut
from .divergence import (
    DivergedError,
    all_finite,
    first_bad_activation,
    first_bad_weight,
    last_bad_gradient,
)
from .head import HeadMixin
from .kinds import TrainingTask, classes, classifies, is_of, writes

_EPSILON = 1e-15  # of Adam, for Ω
_IGNORED = -100  # a label that transformers' losses leave out


class BlobTrainerMixin(HeadMixin):
    """Adds the KL to the loss of any Trainer: transformers' (`BlobTrainer`), TRL's, or one of your own.

    ``class BlobSFTTrainer(BlobTrainerMixin, SFTTrainer): ...`` keeps what that Trainer does with data, loss, logs and
    files. A Bayesian LoRA is trained on the ELBO, a plain one on the NLL. Each optimizer step's log has ``nll``,
    ``kl``, ``kl_weight``, ``elbo`` (nats an example), ``median_std``, ``share_at_prior``, and those of `drift`.

    Args:
        model: a PEFT model, Bayesian after `bayesianize`; or ``model_init`` makes it, anew for each training.
        args: the Trainer's arguments with the fields of `Objective`: a dataclass ``class Arguments(Objective,
            SFTConfig): ...``; it may also have the fields of `BlobTrainingArguments`.
        task: where logits come from; without it the NLL is the loss of the Trainer that the mixin stands before, and
            columns that the model doesn't take are removed, as ``remove_unused_columns`` says.
        **kwargs: as for that Trainer.

    Raises:
        TypeError: ``args`` lacks fields of `Objective`; or, when a class is made, the mixin stands after a Trainer.
        ValueError: a field is out of its range; ``label_smoothing_factor`` with a task of other answers than classes;
            ``eval_num_samples`` without a task, and the model doesn't classify
            sequences; ``peft_config``, whose adapter would have no posterior; or version 1 of FSDP. By ``train``: a
            Bayesian adapter and neither a length of the data nor ``dataset_size``.
        DivergedError: by ``train``, when a loss, a validation metric, a gradient or a weight is not finite. Checkpoints
            stay as they are.

    Attributes:
        class_means: how the head is made, where ``head`` is ``class_means``, or where ``train`` has chosen that for
            ``auto``; None where the head is trained.
        class_means_found: what `bloblora.training.class_means.ClassMeans.finish` has found in the last training with
            class means, or `join_eval_dataset` after it.

    Warns:
        UserWarning: by ``train`` without a task, when the model has no posterior; or when its loss is a mean over
            tokens, and ``dataset_size`` isn't given.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(BlobTrainerMixin):
            raise TypeError(f"{cls.__name__}: BlobTrainerMixin stands after a Trainer, which hides it; name it first")

    def __init__(self, model: Any = None, args: Any = None, *, task: TrainingTask | None = None, **kwargs: Any) -> None:
        if missing := [name for name in OBJECTIVE if not hasattr(args, name)]:
            kind = type(args).__name__
            raise TypeError(
                f"args: {type(self).__name__} needs the objective's options, and {kind} lacks {', '.join(missing)}; "
                f"give BlobTrainingArguments, or a dataclass with both: class Arguments(Objective, {kind}): ..., with "
                "Objective from bloblora.training"
            )
        Objective.check(args)
        if kwargs.get("peft_config") is not None:
            raise ValueError(
                "peft_config: the adapter that the Trainer would add has no posterior; leave it out, and call "
                "model = get_peft_model(model, peft_config) and bayesianize(model, BlobConfig()) before"
            )
        if args.label_smoothing_factor and not likelihood_of(task).smooths:
            raise ValueError("label_smoothing_factor is for classes, choices and tags; the task has none: leave it out")
        if task is not None:
            args.remove_unused_columns = False  # a task's columns are no arguments of the model
        # Otherwise the data's order hangs on whichever seed torch was given last, and that differs between processes.
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        self.task = task
        self._bypassed = False
        self._grouped_stds = False  # an optimizer that is given has rates of its own
        super().__init__(model=model, args=args, **kwargs)
        assert isinstance(self.model, nn.Module)
        self._take(self.model)
        self.problems: list[str] = []  # of the posterior that was trained
        if task is None and (draws := getattr(args, "eval_num_samples", 0)) > 0 and not classifies(self._module):
            raise ValueError(
                f"eval_num_samples is {draws}; without a task it must be 0 (the mean), but for a model that classifies "
                "sequences: draws are averaged over the probabilities of classes"
            )
        self._trainers_loss = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss
        sequences = is_of(self._module, ("SEQ_CLS",), MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
        sequences &= self._trainers_loss
        if task is not None or self.is_deepspeed_enabled or sequences:
            # The loss is a mean over the batch; models that classify sequences take a number of items and ignore it.
            self.model_accepts_loss_kwargs = False
        self.reset_logs()
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_version is 1, which hides the parameters in flat ones; it must be 2")
        self.add_callback(ElboCallback(self))

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in the Trainer, which calls it before each training; the new model's posterior is then the one trained."""
        model = super().call_model_init(*args, **kwargs)
        self._take(model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        Objective.check(self.args)  # the Trainer makes a value the type of the one before: a text, where that is `auto`

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in the Trainer; ``resume_from_checkpoint=True`` takes the newest *complete* checkpoint."""
        if resume_from_checkpoint is True:
            if (found := last_checkpoint(self.args.output_dir)) is None:
                raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {self.args.output_dir}")
            resume_from_checkpoint = str(found)
        if self.model_init is None:
            self._take(self._module)  # since then another adapter may be active, or this one Bayesian
            if self.optimizer is not None and not any(p.requires_grad for p in _weights_of(self.optimizer)):
                self.optimizer = None  # it was made for an adapter that isn't active any more
        if self.posterior is not None:
            self._dataset_size()
        self._resumed_from = resume_from_checkpoint or None
        with self._head_given_back():
            if self.task is None and (problem := self._problem()):
                warnings.warn(problem, stacklevel=2)
            if resume_from_checkpoint and self.args.save_total_limit is not None and self.args.should_save:
                remove_torn(self.args.output_dir, resume_from_checkpoint)
            if self.posterior is not None:
                self.posterior.temperatures = None
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            if self.class_means is not None:
                self._finish_class_means()
                self._check_weights()
        fits = getattr(self.args, "temperature_scaling", False) and self._knows_likelihood and not self._bypassed
        if self.posterior is not None and fits:
            self._set_temperature(self.posterior)
        return output

    def _has_own_loss(self) -> bool:
        """Whether a subclass computes the loss."""
        return getattr(self.compute_loss, "__func__", None) is not BlobTrainerMixin.compute_loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """NLL of the batch, in train mode averaged over the weight draws; `training_step` adds the KL's part."""

        def loss(outputs: bool = False, module: nn.Module = model) -> Any:
            return self._loss(module, copy.copy(inputs), outputs, num_items_in_batch)

        if not model.training:
            return loss(return_outputs)
        self._bypassed = False
        if self.is_in_train and self.posterior is not None:
            self.posterior.batch.expects_labels = self.expects_labels()
        nll, *outputs = loss(True) if return_outputs else (loss(),)
        if (draws := self.args.num_weight_draws) > 1:
            nll = sum((loss() for _ in range(draws - 1)), nll) / draws
        if not self._finite(nll):
            if isinstance(labels := inputs.get("labels"), Tensor) and (labels == _IGNORED).all():
                raise DivergedError(
                    f"the loss is not finite at step {self.state.global_step + 1}, for all labels of a batch are "
                    f"{_IGNORED}, which says nothing to learn: leave such examples out, or give larger batches"
                )
            slopes = self.posterior is not None and self.posterior.head is not None and self._bounds
            slopes |= self.class_means is not None

            def again() -> None:
                with torch.set_grad_enabled(slopes):  # which of a head's outputs count is seen by a gradient
                    loss(module=self._module)

            raise self._diverged_nll(again)
        if self.is_deepspeed_enabled and (posterior := self._with_kl("joint")):  # which adds no gradients later
            adapter, head = posterior.kls()
            nll = self.with_penalty(nll, self.current_kl_weight() * adapter + self.current_kl_weight(head=True) * head)
        return (nll, *outputs) if return_outputs else nll

    def kl_scale(self, head: bool = False) -> float:
        """Factor of the adapter's KL, or of a Gaussian head's, beside its weight; `auto` by examples and weights."""
        if not isinstance(scale := self.args.head_kl_scale if head else self.args.kl_scale, str):
            return scale
        if head:
            return automatic_head_kl_scale(self._dataset_size())
        assert self.posterior is not None
        point_head = self.posterior.under_head and self.posterior.head is None
        return automatic_kl_scale(self._dataset_size(), max(1, self.posterior.num_weights), point_head)

    def automatic(self) -> dict[str, Any]:
        """What the options of a posterior and its objective are that may be ``auto``, where they have a part."""
        assert self.posterior is not None
        found: dict[str, Any] = {}
        if self.posterior.adapter_is_gaussian:
            found |= {"prior_std": self.posterior.config.prior_std, "kl_scale": self.kl_scale()}
        if self.posterior.head is not None:
            found |= {"head_prior_std": self.posterior.config.head_prior_std, "head_kl_scale": self.kl_scale(head=True)}
        if self.args.optimizer_style == "joint":
            rate = self.args.std_learning_rate
            found["std_learning_rate"] = automatic_std_learning_rate(self.state.max_steps) if rate == "auto" else rate
        numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
        heads = {"head": CLASS_MEANS if self.class_means else TRAINED} if self.posterior.under_head else {}
        return {"factors": self.posterior.config.factors, **heads, **numbers}

    def current_kl_weight(self, head: bool = False) -> float:
        """Factor of the adapter's KL in this step's loss, s/D or s·λ_i; or of a Gaussian head's."""
        scale = self.kl_scale(head)
        size = float(self._dataset_size())
        if self.args.dataset_rescaling:
            size = rescaled_dataset_size(size, self.args.gamma)
        if self.args.kl_weighting == "uniform":
            return scale / size
        whole = math.floor if self.args.dataloader_drop_last else math.ceil
        micro_batches = whole(size / (self._train_batch_size * self.args.world_size))
        num_batches = max(1, math.ceil(micro_batches / self.args.gradient_accumulation_steps))
        position = self.state.global_step % num_batches + 1
        return scale * kl_weight(position, num_batches, self.args.kl_weighting)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in the Trainer; before an optimizer step the KL joins, and nothing that isn't finite passes.

        The gradient of the KL is added after the backward: once however many micro-batches there are, and without
        DistributedDataParallel, which takes no gradient for a weight that the forward didn't use. It is the same on
        all processes.
        """
        self._bypassed = True  # until `compute_loss` runs: a subclass may have one that doesn't call it
        if self.posterior is not None:
            self.posterior.batch.expects_labels = False
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._nll_sum += loss  # its share of the step's
        self._loss_sum += loss
        if not self.accelerator.sync_gradients:
            return loss
        self._nll_count += 1
        scaler = self.accelerator.scaler
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        self._correct_squares(loss_scale)
        if not self.is_deepspeed_enabled and (posterior := self._with_kl("joint")):
            for parameter, gradient, weight in self._kl_gradients(posterior):
                old, scale = parameter.grad, weight * loss_scale
                parameter.grad = gradient * scale if old is None else old.add_(gradient, alpha=scale)
        # Here and not in a callback: clipping, which comes between, spreads one NaN over all gradients. With float16
        # the scaler skips such steps itself.
        assert self.optimizer is not None
        if scaler is None and (name := last_bad_gradient(self._module, self.optimizer)) is not None:
            raise self._diverged("a gradient", f"in {name}")
        return loss

    def _correct_squares(self, loss_scale: float) -> None:
        """Make squares of gradients of a loss that was scaled, or divided among forwards, those of the loss itself."""
        factor = self.current_gradient_accumulation_steps * self.args.num_weight_draws / loss_scale
        if factor != 1 and self.posterior is not None and self.posterior.uses_squares:
            # A head whose NLL is bounded has no draws, and so no squares.
            named, bounded = self.posterior.named_std_parameters().items(), self._bounds and not self._bypassed
            of_squares = [parameter for key, parameter in named if not (bounded and is_head(key))]
            if of_squares and self.is_deepspeed_enabled:  # which keeps the gradients to itself
                raise ValueError("std_gradient must not be 'fisher' where DeepSpeed scales or divides the loss")
            for parameter in of_squares:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def expects_labels(self) -> bool:
        """Whether the squares of examples' gradients can be made those of the labels that the model expects."""
        return not self.is_deepspeed_enabled and self._knows_likelihood and likelihood_of(self.task).expects

    def _expect_labels(self, logits: Tensor, labels: Tensor) -> None:
        """Make the squares of examples' gradients those of the labels that the model expects."""
        if (squares := self._squares(logits)) is not None:
            smoothing = self.args.label_smoothing_factor
            squares.mul_(likelihood_of(self.task).expected_square(logits, labels, smoothing))

    def kl_step(self) -> None:
        """The second half of the paper's step: the weighted KL, on the mean and Ω alone.

        ``paper`` is θ ← θ - η_KL ∇(λ_i KL); ``paper_flow`` goes the same way in infinitely many small steps.
        """
        if (posterior := self._with_kl("paper", "paper_flow")) is None or self.accelerator.optimizer_step_was_skipped:
            return
        rate = self.args.kl_learning_rate
        rate *= self._get_learning_rate() / self.args.learning_rate if self.args.learning_rate else 1.0
        if self.args.optimizer_style == "paper_flow":
            with self._common_noise():
                posterior.flow_(rate * self.current_kl_weight(), rate * self.current_kl_weight(head=True))
            return
        gradients = self._kl_gradients(posterior)
        with torch.no_grad():
            for tensor, gradient, weight in gradients:
                tensor.add_(gradient, alpha=-rate * weight)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the ELBO and the state of the posterior to a training log.

        ``nll`` and ``kl_weight`` are means over the steps since the last log, ``nll`` over the processes too. So is
        ``loss``, of which the Trainer's own lacks the steps before a resume.
        """
        if "loss" in logs and self._nll_count:
            logs["nll"], logs["loss"] = (total / self._nll_count for total in self._mean_sums())
            if self.posterior is not None and self._kl_weights:
                summary = self.posterior.summary()
                logs["kl"], logs["kl_weight"] = summary["kl"], sum(self._kl_weights) / len(self._kl_weights)
                head_kl = summary.get("head_kl", 0.0)
                cost = (summary["kl"] - head_kl) * logs["kl_weight"] + head_kl * self.current_kl_weight(head=True)
                logs["elbo"] = -(logs["nll"] + cost)
                logs |= {name: summary[name] for name in ("median_std", "share_at_prior")}
                logs |= {f"drift_{name}": value for name, value in self.drift().items()}
            self.reset_logs()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the Trainer; of a sharded model what was trained is gathered, not the base."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, trained_state(self._module))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in the Trainer; in ``joint`` Ω's parameters are a group of their own, at ``std_learning_rate``."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.std_learning_rate if self.args.optimizer_style == "joint" else None
        if new and rate is not None and (own := self.std_parameters()):
            moved = set(own)
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter not in moved]
            rate = self.args.learning_rate if rate == "auto" else rate  # until the scheduler knows the steps
            # Adam's own would hide a KL that weighs 1e-8 a weight, as with 10⁷ of them.
            small = {"eps": _EPSILON} if isinstance(optimizer.defaults.get("eps"), float) else {}
            optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0, **small})
            self._grouped_stds = True
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in the Trainer; with ``auto`` the number of steps says what ``std_learning_rate`` is."""
        automatic = self.args.optimizer_style == "joint" and self.args.std_learning_rate == "auto"
        if automatic and self.lr_scheduler is None and self._grouped_stds:
            own = set(self.std_parameters())
            for group in (optimizer or self.optimizer).param_groups:  # type: ignore[union-attr]
                if group["params"] and own.issuperset(group["params"]):
                    group["lr"] = group["initial_lr"] = automatic_std_learning_rate(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients of all but Ω; see `Objective`."""
        if self._with_kl("joint") is None or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        own = {*self.std_parameters()}
        assert self.optimizer is not None
        others = [p for p in _weights_of(self.optimizer) if p not in own]
        return self.accelerator.clip_grad_norm_(others, self.args.max_grad_norm)

    def std_parameters(self) -> list[Tensor]:
        """The parameters whose learning rate is ``std_learning_rate``: those of Ω that are trained."""
        return [] if self.posterior is None else [p for p in self.posterior.parameters()[1] if p.requires_grad]

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        r"""How far ``mean`` and ``std``, M and Ω's parameter, are from standing still, by Adam's averages.

        .. math:: \sqrt{\frac{1 + \beta_1}{1 - \beta_1}\, \overline{\hat m^2 / \hat v}}

        About 1 where gradients are noise around 0, and √19 ≈ 4.4 (β₁ = 0.9) where each points the same way every time.

        Returns:
            Both by their names; nothing for a plain model or a sharded one, nor where Adam doesn't see the KL.
        """
        if self.posterior is None or self.args.optimizer_style != "joint" or self.is_fsdp_enabled:
            return {}
        assert self.optimizer is not None
        first, second = self.optimizer.param_groups[0].get("betas", (0.0, 0.0))
        found = {}
        for name, tensors in zip(("mean", "std"), self.posterior.parameters(), strict=True):
            states = [self.optimizer.state.get(tensor, {}) for tensor in tensors]
            if not all({"exp_avg", "exp_avg_sq", "step"} <= state.keys() for state in states):
                return {}
            ratios = [s["exp_avg"].square() / s["exp_avg_sq"].clamp_min(1e-30) for s in states]
            steps = float(states[0]["step"])
            unbiased = (1 - second**steps) / (1 - first**steps) ** 2
            found[name] = math.sqrt((1 + first) / (1 - first) * unbiased * stack(ratios).mean().item())
        return found

    def with_penalty(self, loss: Tensor, penalty: Tensor) -> Tensor:
        """A micro-batch's loss with what the prior adds, such as a weighted KL, which the log's NLL doesn't count."""
        self._nll_sum -= penalty.detach() / self.current_gradient_accumulation_steps
        return loss + penalty

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay leaves Ω alone: its prior is the KL's."""
        return [name for name in super().get_decay_parameter_names(model) if STD_PARAMETER not in name]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the Trainer; the noise of a training is the same with evaluations and without."""
        if self.class_means is not None and self.is_in_train:
            self.class_means.set_head()
        with separate_noise(self.args.device):
            metrics = super().evaluate(*args, **kwargs)
        chosen = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        bad = [n for n, v in metrics.items() if n.endswith(("_loss", f"_{chosen}")) and not math.isfinite(v)]
        if self.is_in_train and bad:
            where = f"first in the weight {name}" if (name := first_bad_weight(self._module)) else "on validation data"
            raise self._diverged(bad[0], where, self.state.global_step)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluation on the posterior mean, or on the average over ``eval_num_samples`` draws, over T where known."""
        from ..prediction.prediction import draw_logits, tempered_sampler_of

        task, draws = self.task, getattr(self.args, "eval_num_samples", 0)
        if task is None and not draws and (self.posterior is None or self.posterior.temperatures is None):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")

        likelihood = likelihood_of(task)
        with torch.no_grad(), self.compute_loss_context_manager():
            forward = partial(self._logits, model, inputs)
            logits = draw_logits(forward, tempered_sampler_of(self.posterior), draws, self.args.seed)
        loss = None
        if labels is not None:
            nll = -likelihood.averaged(logits, labels)
            loss = (nll[labels.reshape(-1) != _IGNORED] if task is None else nll).mean()
        return (loss, None, None) if prediction_loss_only else (loss, likelihood.merged(logits), labels)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.task is not None and self.args.train_sampling_strategy == "group_by_length" and dataset is not None:
            lengths = [self.task.length(example) for example in dataset]
        elif isinstance(sampler := super()._get_train_sampler(train_dataset), LengthGroupedSampler):
            lengths = sampler.lengths
        else:
            return sampler
        batch = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _LengthGroupedSampler(batch, lengths, self.args.data_seed or 0)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        """In the given order: the Trainer groups by ``input_ids``, which not every task's examples have."""
        return super()._get_eval_sampler(eval_dataset) if self.task is None else SequentialSampler(eval_dataset)

    def _loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any) -> Any:
        """One forward: the loss of a task's logits, or of the Trainer below; as `compute_loss` returns it.

        Of a task it is the mean NLL by its likelihood, smoothed by ``label_smoothing_factor``, or what
        ``compute_loss_func`` makes of ``{"logits": (b, C)}``, the labels and the number of examples of the whole step.
        """
        bounds = model.training and self.posterior is not None and self._bounds
        means = self.class_means if model.training and self.is_in_train else None
        with (
            self.posterior.bounding() if bounds else nullcontext() as bounding,  # type: ignore[union-attr]
            means.reading() if means is not None else nullcontext() as by_others,
        ):
            labels = inputs.get("labels")
            if self.task is None:
                expected = self.posterior is not None and self.posterior.batch.expects_labels
                if labels is None or not (model.training and (expected or bounding is not None or means is not None)):
                    return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                labels = classes(labels)
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                if by_others is not None:
                    outputs["logits"], loss = self._left_out(by_others(outputs["logits"], inputs, labels))
                else:
                    loss = loss + self._noise_cost(outputs["logits"], labels, bounding)
                return (loss, outputs) if return_outputs else loss
            if labels is None:
                raise ValueError(
                    f"train_dataset: a batch of {', '.join(inputs)} has no labels; give each example its label"
                )
            outputs = {"logits": self.task.logits(model, inputs)}
            loss = None
            if by_others is not None:
                outputs["logits"], loss = self._left_out(by_others(outputs["logits"], inputs, labels))
            noisy = model.training and by_others is None
            cost = self._noise_cost(outputs["logits"], labels, bounding) if noisy else 0.0
            if self.compute_loss_func is None:
                if loss is None:
                    smoothing = self.args.label_smoothing_factor
                    loss = mean_nll(likelihood_of(self.task), outputs["logits"], labels, smoothing)
                loss = loss + cost
            else:
                loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
                if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                    loss = loss * self.accelerator.num_processes  # which counted together
            return (loss, outputs) if return_outputs else loss

    def _left_out(self, found: LeftOut) -> tuple[Tensor, Tensor]:
        """Logits of a batch (b, C), and its mean NLL with the gradient of all records' NLL over b."""
        likelihood, smoothing = likelihood_of(self.task), self.args.label_smoothing_factor
        own = found.logits[found.rows].detach()
        nll = mean_nll(likelihood, own, found.labels[found.rows], smoothing)
        slopes = found.slopes(mean_nll(likelihood, found.logits, found.labels, smoothing) * len(found.labels))
        if (squares := self._squares(own)) is not None and isinstance(likelihood, Categorical):
            squares.mul_(found.expected_square(slopes, likelihood.weight(found.labels)))
        moved = (slopes * found.states).sum() / len(found.rows)
        return own, nll + moved - moved.detach()

    def _squares(self, logits: Tensor) -> Tensor | None:
        """Factors of the squares of examples' gradients (b,), where they are to be those of expected labels."""
        batch = None if self.posterior is None else self.posterior.batch
        if batch and batch.expects_labels and batch.squares is not None and len(logits) == len(batch.squares):
            return batch.squares.data
        return None

    @property
    def _bounds(self) -> bool:
        """Whether the expected NLL under a Gaussian head has a bound that needs no draws of it."""
        return self._knows_likelihood and likelihood_of(self.task).bounds

    def _noise_cost(self, logits: Tensor, labels: Tensor, bounding: Bounding | None) -> Tensor | float:
        """What the head's noise adds to the loss at most, mean over the batch; the squares know of it as well."""
        counted = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if self.task is None:  # classes, of which the model's own loss leaves some out
            counted = labels != _IGNORED
            labels = labels.where(counted, 0)
        if bounding is None or not bounding.outputs:  # with a draw in force there is no noise
            self._expect_labels(logits.detach(), labels)
            return 0.0
        variance = bounding.variance_of(logits)
        self._expect_labels((logits + variance / 2).detach(), labels)
        costs = likelihood_of(self.task).noise_cost(logits.float(), variance.float(), labels)
        return (costs * counted).sum() / counted.sum()

    def _finite(self, nll: Tensor) -> bool:
        """Whether an NLL is finite; all processes of a sharded model say the same, for they look together for where."""
        finite = torch.isfinite(nll)
        if self.is_fsdp_enabled:
            finite = self.accelerator.reduce(finite.float(), reduction="mean") == 1
        return bool(finite)

    def _take(self, model: nn.Module) -> None:
        """Train this model."""
        self._module = model
        self.posterior: Posterior | None = find_posterior(model)
        if self.posterior is not None:
            self.posterior.watch.silent = True
        if self._head == CLASS_MEANS:
            self._make_class_means()
        if self.posterior is not None and self.args.kl_scale != 0:
            check_style(self.args.optimizer_style, self.posterior.config.std_parameterization)

    def _problem(self) -> str | None:
        """What makes a training without a task another one than was meant, and what to do."""
        name = type(self).__name__
        if not isinstance(self._module, PeftModel):
            return (
                f"{name}: {type(self._module).__name__} is no PEFT model, so there is no posterior to train: call "
                "get_peft_model(model, LoraConfig(...)) and bayesianize(model, BlobConfig()) before"
            )
        if self.posterior is None:
            return (
                f"{name}: adapter {self._module.active_adapter!r} has no posterior, so a plain LoRA is trained: call "
                "bayesianize(model, BlobConfig()) before"
            )
        if self.args.kl_scale != 0 and getattr(self.args, "dataset_size", None) is None and writes(self._module):
            return (
                f"{name}: dataset_size is None, so the KL is divided by the {self._dataset_size()} examples, but a "
                "language model's loss is a mean over tokens: set dataset_size of the arguments to the number of label "
                "tokens of the training data (those that aren't -100), or to that of the examples if your loss is a "
                "mean over examples"
            )
        return None

    def _dataset_size(self) -> int:
        if (size := getattr(self.args, "dataset_size", None)) is not None:
            return size
        try:
            return len(self.train_dataset)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(
                "dataset_size is None and the training data has no length; the KL is weighed against the number of "
                "examples: set dataset_size of the arguments"
            ) from error

    def reset_logs(self) -> None:
        """Begin the next log with the next step."""
        self._nll_sum, self._loss_sum = torch.zeros(2, device=self.args.device)
        self._nll_count = 0
        self._kl_weights: list[float] = []

    def _kept_logs(self) -> dict[str, Any]:
        """What the next log is made of, for a checkpoint; losses as their means over the processes."""
        return {"sums": self._mean_sums(), "nll_count": self._nll_count, "kl_weights": self._kl_weights}

    def restore_logs(self, kept: Mapping[str, Any]) -> None:
        """Go on with what the steps before a checkpoint left for the next log."""
        self._nll_sum += kept["sums"][0]
        self._loss_sum += kept["sums"][1]
        self._nll_count, self._kl_weights = kept["nll_count"], [*kept["kl_weights"]]

    def _mean_sums(self) -> list[float]:
        """Sums of the NLL and of the loss since the last log, as means over the processes."""
        sums: Any = self.accelerator.reduce(torch.stack([self._nll_sum, self._loss_sum]), reduction="mean")
        return sums.tolist()

    def _with_kl(self, *styles: str) -> Posterior | None:
        """The posterior where it has a KL to minimize, in one of these styles."""
        if self.posterior is None or self.args.optimizer_style not in styles:
            return None
        scales = (self.args.kl_scale, 0 if self.posterior.head is None else self.args.head_kl_scale)
        return self.posterior if scales != (0, 0) else None

    def _kl_gradients(self, posterior: Posterior) -> list[tuple[Tensor, Tensor, float]]:
        """The trained means and Ω parameters, each with the KL's gradient with respect to it and the KL's weight."""
        weights = [self.current_kl_weight(), self.current_kl_weight(head=True)]
        with self._common_noise():
            found = posterior.kl_gradients()
        if not all_finite([gradient for _, _, gradient in found]):
            bad = next(key for key, _, gradient in found if not all_finite([gradient]))
            raise self._diverged("the loss", f"in the KL of {bad}: an entry of Ω is 0, or one of M or Ω is huge")
        return [(tensor, gradient, weights[is_head(key)]) for key, tensor, gradient in found]

    def _common_noise(self) -> AbstractContextManager[None]:
        """One noise for all processes, for a KL that is estimated: their posteriors must stay equal."""
        return separate_noise(self.args.device, self.args.seed + self.state.global_step)

    def _diverged_nll(self, forward: Callable[[], object]) -> DivergedError:
        """The error for an NLL that is not finite: in a weight, or in what ``forward`` computes."""
        if (name := first_bad_weight(self._module)) is not None:
            return self._diverged("the loss", f"first in the weight {name}")
        if (name := first_bad_activation(self._module, forward)) is not None:
            where = f"first in the output of {name}"
            if self.state.global_step == 0 and "lora_" not in name:
                half = torch.float16 in {weight.dtype for weight in self._module.parameters()}
                advice = "it overflows in float16; load the base model in bfloat16 or float32"
                return DivergedError(
                    f"the loss is not finite at step 1, {where}. The learning rate has no part in it, for no step was "
                    f"made: {advice if half else 'look at the base model, and at this batch'}."
                )
            return self._diverged("the loss", where)
        return self._diverged("the loss", "though all weights and activations are: look at this batch's labels")

    def _diverged(self, what: str, where: str, step: int | None = None) -> DivergedError:
        rates = f"learning_rate {self.args.learning_rate}"
        if self.posterior is not None:
            name = "std_learning_rate" if self.args.optimizer_style == "joint" else "kl_learning_rate"
            if isinstance(rate := getattr(self.args, name), (int, float)):
                rates += f" or {name} {rate}"
            rates += f" is too high, or init_std {self.posterior.start_std():.3g}"
        return DivergedError(
            f"{what} is not finite at step {step or self.state.global_step + 1}, {where}. Likely cause: {rates} is too "
            f"high; halve it and resume from the last checkpoint in {self.args.output_dir}."
        )

    def _check_weights(self) -> None:
        if (name := first_bad_weight(self._module)) is not None:
            raise self._diverged("a weight", f"first in {name}", self.state.global_step)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer asks whether it is done only after a step: resumed at its end, it would make one more.
        if self.state.global_step >= self.state.max_steps or self._out_of_patience():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()  # before older, good checkpoints are deleted in favour of this one
        self.state.stateful_callbacks[KEPT] = self._kept_logs()  # type: ignore[index, call-overload]
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # A folder of an earlier run that is written again must not look complete meanwhile.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            with naming(folder), as_os_error(folder):
                super()._save_checkpoint(model, trial)
        except OSError:
            if self.args.should_save and not (folder / TRAINER_STATE_NAME).is_file():
                shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the space
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.class_means is not None and self.args.should_save:
            self.class_means.write(Path(output_dir))
        # What makes a checkpoint complete is written next, by one process: not before all have saved their generators.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.stateful_callbacks[KEPT]["sha256"] = tensor_files_sha256(output_dir)  # type: ignore[index, call-overload]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _restoring("generators", checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _restoring("optimizer or scheduler", checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.class_means is not None:
            self.class_means.freeze()  # PEFT takes what is loaded to be trained
        self._load_posterior(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if isinstance(self.model, PeftModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._load_from_checkpoint(best)  # which finds an adapter also in a folder of its name
            return
        super()._load_best_model()
        self._load_posterior(best)

    def _out_of_patience(self) -> bool:
        """Whether the checkpoint that a training goes on from is the one at which it was stopped early."""
        if not (self.state.global_step and self.args.restore_callback_states_from_checkpoint):
            return False  # a counter is then of another training of this trainer
        stoppers = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stoppers)

    def _load_posterior(self, checkpoint: str) -> None:
        if self.posterior is not None:
            name = self.posterior.adapter_name
            load_posterior(self.posterior.model, adapter_folder(checkpoint, name), name)


class BlobTrainer(BlobTrainerMixin, Trainer):
    """`transformers.Trainer` that trains a Bayesian LoRA on the ELBO, and a plain one on the NLL.

    Everything of the Trainer stays: accelerate, mixed precision, trackers, resume. See `BlobTrainingArguments` for the
    objective, and `BlobTrainerMixin` for what it takes, logs and raises.
    """

    args: BlobTrainingArguments


def _weights_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


@contextmanager
def _restoring(what: str, checkpoint: str | None) -> Iterator[None]:
    """Raise a ValueError where a checkpoint's file is another training's: torch has many errors for that."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{checkpoint}: its {what} can't be restored: {shortened(f'{type(error).__name__}: {error}')}; remove the "
            "folder to go on from an earlier checkpoint, or from the start"
        ) from error


class _LengthGroupedSampler(LengthGroupedSampler):
    """The Trainer's, with an order that its seed and the epoch decide, so that a resumed training finds its place."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()

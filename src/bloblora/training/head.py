"""What a trainer makes of its data beside steps: a head of class means, and a temperature."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..adapter import Posterior
from ..adapter.head import trained_head
from ..contexts import eval_mode
from ..models import names_head
from ..posterior import separate_noise
from ..prediction.states import with_states
from ..tasks.likelihood import Categorical, likelihood_of
from .arguments import AUTO, CLASS_MEANS, TRAINED, automatic_head
from .class_means import FILE, ClassMeans, Read, keys_of
from .kinds import TrainingTask, base_of, classes, classifies, has_classes

_log = logging.getLogger("bloblora")

if TYPE_CHECKING:
    _Host = Trainer
else:
    _Host = object


class HeadMixin(_Host):
    """The part of `BlobTrainerMixin` that chooses the head, makes one that isn't trained, and fits the temperature."""

    args: Any
    class_means: ClassMeans | None = None
    class_means_found: dict[str, float]
    posterior: Posterior | None
    task: TrainingTask | None
    _module: nn.Module
    _resumed_from: str | None = None
    _trainers_loss: bool

    def _has_own_loss(self) -> bool:
        """Whether a subclass computes the loss."""
        raise NotImplementedError

    def _temperature_data(self) -> list[Any]:
        """Of several evaluation data sets the one of ``metric_for_best_model``, or all where that names none."""
        data: Any = self.eval_dataset
        if not isinstance(data, Mapping):
            return [] if data is None else [data]
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        named = [name for name in data if metric.startswith(f"{name}_")]
        return [data[max(named, key=len)]] if named else [*data.values()]

    def _eval_batches(self, parts: Sequence[Any]) -> DataLoader[Any]:
        """All of the evaluation data in each process, as the model takes it."""
        kept = [
            self._remove_unused_columns(data, description="evaluation") if hasattr(data, "column_names") else data
            for data in parts
        ]
        collator = self.data_collator
        if not all(hasattr(data, "column_names") for data in parts):
            collator = self._get_collator_with_removed_columns(collator, description="evaluation")
        data = kept[0] if len(kept) == 1 else ConcatDataset(kept)
        return DataLoader(data, self.args.per_device_eval_batch_size, collate_fn=collator)

    def _logits(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Of a batch."""
        if self.task is not None:
            return self.task.logits(model, inputs)
        return model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits

    @property
    def _knows_likelihood(self) -> bool:
        """Whether the loss is the NLL of the task's likelihood, or without a task of classes."""
        if self.compute_loss_func is not None:
            return False
        return self.task is not None or (self._trainers_loss and classifies(self._module))

    def _set_temperature(self, posterior: Posterior) -> None:
        """Fit a temperature on the evaluation data; warn where a Gaussian head, which needs one, gets none."""
        from ..prediction.temperature import FEWEST_FOR_TEMPERATURE, set_temperature

        parts = self._temperature_data()
        sized = all(isinstance(part, Sized) for part in parts)
        count = sum(map(len, parts)) if sized else 0
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not split and count >= FEWEST_FOR_TEMPERATURE:
            inputs = self._eval_batches(parts) if self.task is None else [example for part in parts for example in part]
            options: Any = {"task": self.task, "batch_size": self.args.per_device_eval_batch_size}
            try:
                set_temperature(self._module, inputs, **options)
            except ValueError as error:  # which must not cost a training
                warnings.warn(f"eval_dataset: no temperature was fitted on it: {error}", stacklevel=3)
        elif posterior.head is not None:
            advice = f"give an eval_dataset of {FEWEST_FOR_TEMPERATURE} examples or more that aren't trained on, "
            if split:
                why, advice = "FSDP or DeepSpeed splits the model", ""
            elif not parts:
                why = "there is no eval_dataset"
            else:
                why = f"eval_dataset has {count} examples" if sized else "eval_dataset has no length"
            warnings.warn(
                "no temperature was fitted, and the probabilities of a Gaussian head are far too unsure without one. "
                f"The reason: {why}; {advice}call bloblora.set_temperature(model, …), or set temperature_scaling=False "
                "where the order of the labels is all that counts",
                stacklevel=3,
            )

    def join_eval_dataset(self) -> dict[str, float]:
        """Let the records of ``eval_dataset`` join the head's class means, after ``train``, once they have served.

        More records tell a class's mean better, and nothing was trained on these. Each is left out in turn to choose
        shrinkage and scale anew, so that the mean needs no temperature any more; that of draws stays what it was beside
        the mean's. Nothing may be measured on them afterwards.

        Returns:
            ``shrinkage`` and ``scale``, and the ``nll`` of these records, each left out, nats; nothing where the head
            is trained, or there are no such records, and then nothing changes.
        """
        found = {} if self.class_means is None else self.class_means.join()
        if found:
            self.class_means_found = found
            if self.posterior is not None and (before := self.posterior.temperatures):
                self.posterior.temperatures = before[0] / before[1], 1.0
        return found

    def begin_class_means(self) -> None:
        """Read the training records, or what a checkpoint holds of them."""
        if self.class_means is None:
            return
        if self._resumed_from:
            self.class_means.restore(Path(self._resumed_from))
        else:
            self.class_means.begin(self._read(self.train_dataset))

    def _finish_class_means(self) -> None:
        """Set the head, by the evaluation data where there are any."""
        assert self.class_means is not None
        held_out = chain.from_iterable(map(self._read, self._temperature_data()))
        self.class_means_found = self.class_means.finish(self._read(self.train_dataset), held_out)
        self.class_means.freeze(False)

    @contextmanager
    def _head_given_back(self) -> Iterator[None]:
        """A head that isn't trained takes gradients again afterwards, also where an error ends the training."""
        try:
            yield
        finally:
            if self.class_means is not None:
                self.class_means.freeze(False)

    @property
    def _head(self) -> str:
        return getattr(self.args, "head", TRAINED)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._choose_head()  # of the model that is there by now, before its optimizer is made
        return super()._inner_training_loop(*args, **kwargs)

    def _choose_head(self) -> None:
        """Decide what ``head`` leaves open; raise a ValueError where class means can't be known in this training."""
        if self._head != CLASS_MEANS:
            before, self.class_means = self.class_means, None
            if before is not None:
                before.freeze(False)
            if self._head == AUTO and self._takes_class_means(before):
                self._make_class_means()
                _log.info(f"no head is trained: it is made of the means of the classes (head={TRAINED!r} trains one)")
        if self.class_means is not None and (wrong := self._against_class_means()):
            raise ValueError(f"head {CLASS_MEANS!r} {wrong}; set it to {TRAINED!r}")

    def _takes_class_means(self, before: ClassMeans | None) -> bool:
        """Whether ``auto`` is class means: as a checkpoint has it, or a training before; or else for a fresh head."""
        if self._resumed_from:
            return (Path(self._resumed_from) / FILE).is_file()
        if self.posterior is None or self.posterior.head is not None:
            return False
        if (head := self._linear_head()) is None or self._against_class_means():
            return False
        trained = not self.posterior.is_fresh or names_head(
            getattr(base_of(self._module).config, "architectures", None)
        )
        if trained and not (before is not None and before.head is head):
            return False
        if self._has_own_loss() or automatic_head([len(self.train_dataset)]) == TRAINED:  # type: ignore[arg-type]
            return False
        return automatic_head(self._label_counts()) == CLASS_MEANS

    def _label_counts(self) -> list[int]:
        """Distinct training records of each label; none where one has no class, or isn't the same in each pass."""
        found = []
        for _ in range(2):
            labels: dict[int, int] = {}
            with separate_noise(self.args.device):
                for batch in self._eval_batches([self.train_dataset]):
                    if not has_classes(batch):
                        return []
                    known = classes(batch["labels"])
                    labels |= zip(keys_of(batch, known).tolist(), known.tolist(), strict=True)
            found.append(labels)
        return [*Counter(found[0].values()).values()] if found[0] == found[1] else []

    def _linear_head(self) -> nn.Linear | None:
        """The layer that gives the logits of classes, trained with the adapter; None where there is none."""
        if not isinstance(self._module, PeftModel) or not classifies(self._module):
            return None
        found = trained_head(self._module, self._module.active_adapter)
        return None if found is None else found[1]

    def _make_class_means(self) -> None:
        """Take the head of the model from what is trained.

        Raises:
            ValueError: it has none that gives classes, or a Gaussian one.
        """
        if self.posterior is not None and self.posterior.head is not None:
            raise ValueError(
                f"head {CLASS_MEANS!r} isn't trained, and BlobConfig.head_prior_std says how it is: set that to 'none'"
            )
        if (head := self._linear_head()) is None:
            raise ValueError(
                f"head must be {TRAINED!r} for a {type(base_of(self._module)).__name__} without an adapter whose "
                f"modules_to_save have a linear head of two labels or more, got {CLASS_MEANS!r}"
            )
        likelihood = likelihood_of(self.task)
        weights = likelihood.weights if isinstance(likelihood, Categorical) else ()
        self.class_means = ClassMeans(head, weights, self.accelerator.gather)

    def _against_class_means(self) -> str:
        """Why class means can't be known in this training; empty where they can."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "isn't offered under FSDP or DeepSpeed, which split the model"
        if self.args.n_gpu > 1:
            return "isn't offered under DataParallel, which splits batches: start one process for each GPU by torchrun"
        if self.args.torch_compile:
            return "isn't offered with torch_compile"
        if not self._knows_likelihood:
            return "needs the NLL of classes as the loss, and there is a loss of its own"
        if not isinstance(self.train_dataset, Sized):
            return "needs training data with a length, of which all are read before the first step"
        return ""

    def _read(self, data: Any) -> Iterator[Read]:
        """What the head reads of each batch of data, under the mean and without dropout."""
        from ..prediction.prediction import order_of

        assert self.class_means is not None
        task: Any = self.task
        if task is not None and (order := order_of(data, task)):
            data = Subset(data, order)
        with separate_noise(self.args.device), eval_mode(self._module):
            for batch in self._eval_batches([data]):
                inputs: Any = self._prepare_inputs(batch)
                labels = classes(inputs["labels"])
                with self.compute_loss_context_manager():
                    states = with_states(self.class_means.head, partial(self._logits, self._module, inputs))[1]
                assert states is not None
                yield Read(states.float(), labels, keys_of(inputs, labels))

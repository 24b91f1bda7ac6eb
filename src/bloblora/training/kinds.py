"""What kind of answers a model or a batch has, where no task says it."""

from collections.abc import Mapping
from typing import Any, Protocol

from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)


class TrainingTask(Protocol):
    """What the trainer needs of a task."""

    def length(self, example: Any) -> int:
        """Tokens that an encoded example takes in a batch."""

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (b, C) of a batch."""

    # and, where it isn't `tasks.CATEGORICAL`, ``likelihood``: how probable labels are, given logits


def classes(labels: Tensor) -> Tensor:
    """Class indices (b,) as transformers' loss of classes takes them; a ValueError where they are none."""
    if labels.is_floating_point():
        raise ValueError(
            f"labels: {labels.dtype} of shape {tuple(labels.shape)} are no classes: transformers would train several "
            "labels at once, or a value; set config.problem_type to 'multi_label_classification' or 'regression' "
            "before bayesianize, or give whole numbers"
        )
    return labels.reshape(-1)


def has_classes(batch: Mapping[str, Any]) -> bool:
    """Whether a batch of tokens has one class for each text."""
    labels = batch.get("labels")
    if "input_ids" not in batch or not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return labels.numel() == len(labels) and bool((labels >= 0).all())


def classifies(model: nn.Module) -> bool:
    """Whether a model's logits are those of classes that exclude each other, (b, C)."""
    base = base_of(model)
    if not is_of(model, ("SEQ_CLS",), MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        return False
    return base.config.num_labels > 1 and base.config.problem_type in (None, "single_label_classification")


def writes(model: nn.Module) -> bool:
    """Whether a model's own loss is a mean over tokens."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return is_of(model, ("CAUSAL_LM", "SEQ_2_SEQ_LM"), names)


def is_of(model: nn.Module, task_types: tuple[str, ...], names: Mapping[str, str]) -> bool:
    """Whether the adapter was made for one of these, or else the base is one of transformers' classes."""
    task_type = model.peft_config[model.active_adapter].task_type if isinstance(model, PeftModel) else None
    return task_type in task_types if task_type else type(base_of(model)).__name__ in names.values()


def base_of(model: nn.Module) -> Any:
    """The model below an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model

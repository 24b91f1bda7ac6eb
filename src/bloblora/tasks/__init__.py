"""Tasks: records become token ids, and a model's output becomes one logit per label or choice."""

from .choice_letter import ChoiceLetter, label_logits
from .choice_text import Blank, ChoiceText
from .classification import Classification
from .generation import TextGeneration
from .likelihood import CATEGORICAL, Bernoulli, BradleyTerry, Categorical, Gaussian, Likelihood, Tags
from .multi_label import MultiLabel
from .regression import Regression
from .reward import Reward
from .task import TASKS, Task, TaskError, build_task, encode_all, encode_each, guess_task, task_from_dict, tasks_with
from .token_classification import TokenClassification

__all__ = [
    "CATEGORICAL",
    "TASKS",
    "Bernoulli",
    "Blank",
    "BradleyTerry",
    "Categorical",
    "ChoiceLetter",
    "ChoiceText",
    "Classification",
    "Gaussian",
    "Likelihood",
    "MultiLabel",
    "Regression",
    "Reward",
    "Tags",
    "Task",
    "TaskError",
    "TextGeneration",
    "TokenClassification",
    "build_task",
    "encode_all",
    "encode_each",
    "guess_task",
    "label_logits",
    "task_from_dict",
    "tasks_with",
]

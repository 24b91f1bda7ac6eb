"""Tasks: records become token ids, and a model's output becomes one logit per label or choice."""

from bloblora.tasks.blank import Blank
from bloblora.tasks.build import TASKS, build_task, encode_all, encode_each, guess_task, task_from_dict
from bloblora.tasks.choice_letter import ChoiceLetter
from bloblora.tasks.choice_text import ChoiceText
from bloblora.tasks.classification import Classification
from bloblora.tasks.generation import TextGeneration
from bloblora.tasks.head import label_logits
from bloblora.tasks.task import Task, TaskError, check_options

__all__ = [
    "TASKS",
    "Blank",
    "ChoiceLetter",
    "ChoiceText",
    "Classification",
    "Task",
    "TaskError",
    "TextGeneration",
    "build_task",
    "check_options",
    "encode_all",
    "encode_each",
    "guess_task",
    "label_logits",
    "task_from_dict",
]

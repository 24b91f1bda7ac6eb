"""Decisions that keep a promise: answer or abstain, a set of labels, out of scope; and how likely a text is right.

Each decision is fitted on held-out labelled records, and says what it promises on data like them, whatever the model
and however few the records.
"""

from .answering import Answering, fit_answering
from .conformal import LabelSets, PromiseError, Scope, fit_label_sets, fit_scope
from .correctness import MAPS, Correctness, CorrectnessError, fit_correctness
from .decision import Decided, Decision, check_promises, fit_decision

__all__ = [
    "MAPS",
    "Answering",
    "Correctness",
    "CorrectnessError",
    "Decided",
    "Decision",
    "LabelSets",
    "PromiseError",
    "Scope",
    "check_promises",
    "fit_answering",
    "fit_correctness",
    "fit_decision",
    "fit_label_sets",
    "fit_scope",
]

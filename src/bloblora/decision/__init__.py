"""Decisions that keep a promise: answer or abstain, a set of labels, out of scope or not.

Each rule is fitted on held-out labelled records, and says what it promises on data like them, whatever the model and
however few the records. A file a rule: the function that fits it, and what was fitted.
"""

from .answering import Answering, fit_answering
from .decision import Decided, Decision, calibrate, check_promises
from .label_sets import LabelSets, fit_label_sets
from .scope import Scope, fit_scope

__all__ = [
    "Answering",
    "Decided",
    "Decision",
    "LabelSets",
    "Scope",
    "calibrate",
    "check_promises",
    "fit_answering",
    "fit_label_sets",
    "fit_scope",
]

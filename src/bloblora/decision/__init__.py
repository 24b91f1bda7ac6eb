"""Decisions that keep a promise: answer or abstain, a set of labels, out of scope; and how likely a text is right.

Each decision is fitted on held-out labelled records, and says what it promises on data like them, whatever the model
and however few the records.
"""

from .answering import Answering, fit_answering, fit_answering_by
from .conformal import (
    AnswerSets,
    Intervals,
    LabelSets,
    LabelThresholds,
    PromiseError,
    Scope,
    TagSets,
    fit_answer_sets,
    fit_intervals,
    fit_label_sets,
    fit_label_thresholds,
    fit_scope,
    fit_tag_sets,
)
from .correctness import MAPS, Correctness, CorrectnessError, confidence_of, fit_correctness
from .decision import Decided, Decision, changed, check_promises, check_text_promises, fit_decision, fit_text_decision

__all__ = [
    "MAPS",
    "AnswerSets",
    "Answering",
    "Correctness",
    "CorrectnessError",
    "Decided",
    "Decision",
    "Intervals",
    "LabelSets",
    "LabelThresholds",
    "PromiseError",
    "Scope",
    "TagSets",
    "changed",
    "check_promises",
    "check_text_promises",
    "confidence_of",
    "fit_answer_sets",
    "fit_answering",
    "fit_answering_by",
    "fit_correctness",
    "fit_decision",
    "fit_intervals",
    "fit_label_sets",
    "fit_label_thresholds",
    "fit_scope",
    "fit_tag_sets",
    "fit_text_decision",
]

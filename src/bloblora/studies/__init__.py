"""Comparisons of methods: what is run, how it is run and resumed, and what is written of it."""

from .compare import Outcome, compare, plan
from .job import Result, read_result, read_results
from .report import report
from .study import DataSet, EvalSet, Job, Study, read_study
from .tune import Trial, pareto_front, tune

__all__ = [
    "DataSet",
    "EvalSet",
    "Job",
    "Outcome",
    "Result",
    "Study",
    "Trial",
    "compare",
    "pareto_front",
    "plan",
    "read_result",
    "read_results",
    "read_study",
    "report",
    "tune",
]

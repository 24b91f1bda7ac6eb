"""Comparisons of methods: what is run, how it is run and resumed, and what is written of it."""

from .compare import compare
from .job import is_done
from .report import report
from .result import Result, read_result, read_results
from .study import DataSet, EvalSet, Job, Study, read_study
from .tune import Trial, pareto_front, tune

__all__ = [
    "DataSet",
    "EvalSet",
    "Job",
    "Result",
    "Study",
    "Trial",
    "compare",
    "is_done",
    "pareto_front",
    "read_result",
    "read_results",
    "read_study",
    "report",
    "tune",
]

"""Do the probabilities mean what they say? Metrics, comparisons of methods, tables, pictures."""

from .bootstrap import Interval, Metric, paired_bootstrap
from .calibration import brier_parts, classwise_ece, equal_mass_ece
from .metrics import example_scores, metrics
from .ood import ood_metrics
from .plots import (
    lines_figure,
    pareto_figure,
    pareto_front,
    reliability_diagram,
    reliability_figure,
    risk_coverage_figure,
    save_figure,
    to_svg,
)
from .reliability import ReliabilityBins, confidence_bins, reliability
from .selective import RiskCoverage, risk_coverage
from .summary import UNCERTAINTIES, summary, uncertainty
from .tables import markdown_table, rich_table, table_cells

__all__ = [
    "UNCERTAINTIES",
    "Interval",
    "Metric",
    "ReliabilityBins",
    "RiskCoverage",
    "brier_parts",
    "classwise_ece",
    "confidence_bins",
    "equal_mass_ece",
    "example_scores",
    "lines_figure",
    "markdown_table",
    "metrics",
    "ood_metrics",
    "paired_bootstrap",
    "pareto_figure",
    "pareto_front",
    "reliability",
    "reliability_diagram",
    "reliability_figure",
    "rich_table",
    "risk_coverage",
    "risk_coverage_figure",
    "save_figure",
    "summary",
    "table_cells",
    "to_svg",
    "uncertainty",
]

"""Do the probabilities mean what they say? Metrics, comparisons of methods, tables, pictures."""

from .calibration import (
    BinGaps,
    ReliabilityBins,
    brier_parts,
    classwise_ece,
    confidence_bins,
    confidence_floor,
    ece_floor,
    equal_mass_ece,
    reliability,
)
from .comparison import (
    Interval,
    markdown_table,
    metric_number,
    paired_bootstrap,
    rich_table,
    short_number,
    table_cells,
)
from .distance import DISTANCES, Distance
from .metrics import METRICS, Metric, example_scores, metric_names, metrics, summary, uncertainty
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
from .ranking import RiskCoverage, ood_metrics, risk_coverage

__all__ = [
    "DISTANCES",
    "METRICS",
    "BinGaps",
    "Distance",
    "Interval",
    "Metric",
    "ReliabilityBins",
    "RiskCoverage",
    "brier_parts",
    "classwise_ece",
    "confidence_bins",
    "confidence_floor",
    "ece_floor",
    "equal_mass_ece",
    "example_scores",
    "lines_figure",
    "markdown_table",
    "metric_names",
    "metric_number",
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
    "short_number",
    "summary",
    "table_cells",
    "to_svg",
    "uncertainty",
]

"""Do the probabilities mean what they say? Metrics, reliability, tables."""

from .metrics import metrics, ood_metrics
from .reliability import ReliabilityBins, reliability, reliability_diagram
from .tables import markdown_table, rich_table

__all__ = [
    "ReliabilityBins",
    "markdown_table",
    "metrics",
    "ood_metrics",
    "reliability",
    "reliability_diagram",
    "rich_table",
]

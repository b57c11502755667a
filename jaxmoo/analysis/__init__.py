"""What a run did: plots and a page that shows them."""

from jaxmoo.analysis.plots import before_after, conflict_heatmap, language_cosines, loss_curves
from jaxmoo.analysis.report import write_report

__all__ = [
    "before_after",
    "conflict_heatmap",
    "language_cosines",
    "loss_curves",
    "write_report",
]

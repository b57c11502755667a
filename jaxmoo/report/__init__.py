"""Plots of a run, and a page that shows them."""

from jaxmoo.report.plots import (
    before_after,
    conflict_heatmap,
    held_out_curves,
    language_cosines,
    loss_curves,
)
from jaxmoo.report.run_report import write_report
from jaxmoo.report.style import check_drawing

__all__ = [
    "before_after",
    "check_drawing",
    "conflict_heatmap",
    "held_out_curves",
    "language_cosines",
    "loss_curves",
    "write_report",
]

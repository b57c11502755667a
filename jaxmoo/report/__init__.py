"""Plots of a training run, and a page that shows them.

Every plot writes one image and returns its :class:`matplotlib.figure.Figure`. Rows are those of
``metrics.jsonl`` (see :mod:`jaxmoo.train.metrics`); languages are shown by their codes.
"""

from jaxmoo.report.conflict_plots import conflict_heatmap, language_cosines
from jaxmoo.report.loss_plot import loss_curves
from jaxmoo.report.run_report import write_report
from jaxmoo.report.score_plots import before_after, held_out_curves
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

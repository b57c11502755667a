"""The plot of a study: what each arm gains over the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoo.analysis.style import FAINT, INK, SEEN, UNSEEN, canvas, title
from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.study.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["forest"]

_GROUPS = {"seen": (SEEN, "o", -0.16), "unseen": (UNSEEN, "s", 0.16)}


def forest(
    differences: Mapping[tuple[str, str], Mapping[str, Estimate]],
    measures: Sequence[str],
    baseline: str,
    path: Path,
) -> Figure:
    """Plot paired differences to the baseline with their intervals, a panel per measure.

    Args:
      differences: per measure and group of languages (``seen``, ``unseen``), by arm.
      measures: which ones, of `jaxmoo.evaluate.measures.MEASURES`.
      baseline: the arm that stands at 0.
      path: the image to write.
    """
    arms = list(dict.fromkeys(arm for found in differences.values() for arm in found))
    with canvas(path, 3.0 + 2.6 * len(measures), 1.7 + 0.36 * max(len(arms), 2)) as figure:
        title(
            figure,
            f"Difference to {baseline}, paired by seed",
            "mean and 95 % t-interval; small strokes: single seeds",
        )
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            axes.axvline(0, color=INK, linewidth=0.9)
            for group, look in _GROUPS.items():
                found = differences.get((measure, group), {})
                _points(axes, [found.get(arm) for arm in arms], group, look)
            better = "right" if MEASURES[measure].higher_is_better else "left"
            axes.set_title(MEASURES[measure].label, fontweight="bold")
            axes.set_xlabel(f"better: {better}", color=FAINT)
            axes.grid(axis="x")
            axes.locator_params(axis="x", nbins=4)
        panels[0].set_yticks(range(len(arms)), arms)
        panels[0].set_ylim(len(arms) - 0.5, -0.5)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower right", ncols=len(labels))
        return figure


def _points(
    axes: Axes, estimates: Sequence[Estimate | None], group: str, look: tuple[str, str, float]
) -> None:
    colour, marker, shift = look
    label: str | None = f"{group} languages"
    for row, estimate in enumerate(estimates):
        if estimate is None:
            continue
        y = row + shift
        if math.isfinite(estimate.half):
            ends = [estimate.mean - estimate.half, estimate.mean + estimate.half]
            axes.plot(ends, [y, y], color=colour, linewidth=1.6, solid_capstyle="round")
        count = len(estimate.values)
        axes.plot(estimate.values, [y] * count, "|", color=colour, markersize=7, alpha=0.7)
        axes.plot([estimate.mean], [y], marker, color=colour, markersize=5.5, label=label)
        label = None  # one entry of the legend per group

"""The plots of a study: what each arm gains over the baseline, by group and by language."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.report.style import FAINT, INK, SEEN, UNSEEN, canvas, title
from jaxmoo.study.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["forest", "language_map"]

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


def language_map(
    differences: Mapping[str, Mapping[str, Estimate]],
    seen: Sequence[str],
    unseen: Sequence[str],
    measure: str,
    baseline: str,
    path: Path,
) -> Figure:
    """Plot every language's paired difference to the baseline, by arm, as a table of colours.

    Args:
      differences: per arm, by language.
      seen: the languages trained on.
      unseen: the others.
      measure: what differs, of `jaxmoo.evaluate.measures.MEASURES`.
      baseline: the arm that is subtracted.
      path: the image to write.
    """
    languages = [*seen, *unseen]
    means = np.array([[of[code].mean for code in languages] for of in differences.values()])
    # One arm that is far off would leave the others without colour.
    limit = max(float(np.quantile(np.abs(means), 0.9)), 1e-6)
    look = MEASURES[measure]
    with canvas(path, 2.6 + 0.62 * len(languages), 1.9 + 0.3 * len(differences)) as figure:
        title(
            figure,
            f"{look.label} of every language: difference to {baseline}, paired by seed",
            "mean over seeds, blue: better; framed: the 95 % t-interval, of this language and arm "
            "alone, leaves out 0",
        )
        axes = figure.subplots()
        sign = 1 if look.higher_is_better else -1
        axes.imshow(sign * means, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for row, of in enumerate(differences.values()):
            for column, code in enumerate(languages):
                one = of[code]
                colour = "white" if abs(one.mean) > 0.65 * limit else INK
                axes.text(column, row, f"{one.mean:+.2f}", color=colour, ha="center", va="center")
                if abs(one.mean) > one.half:
                    _frame(axes, row, column)
        axes.set_xticks(range(len(languages)), languages, rotation=45, ha="right")
        axes.set_yticks(range(len(differences)), list(differences))
        if seen and unseen:
            axes.axvline(len(seen) - 0.5, color="white", linewidth=4)
            for start, codes, name in ((0, seen, "seen"), (len(seen), unseen, "unseen")):
                middle = start + (len(codes) - 1) / 2
                axes.text(middle, -0.6, name, ha="center", va="bottom", color=FAINT)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return figure


def _frame(axes: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.46, row - 0.44)
    axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=INK, linewidth=1.4))

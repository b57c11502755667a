"""The plots of a study: what each arm gains over the baseline, by group and by language."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.report.style import FAINT, INK, canvas, title
from jaxmoo.study.answer import GROUP_NAMES, headline
from jaxmoo.study.effects import Verdict
from jaxmoo.study.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["forest", "language_map", "reading_of_forest"]

_LOOKS = {
    "better": ("#009E73", "o", "#009E73"),
    "equivalent": ("#0072B2", "s", "#0072B2"),
    "undecided": ("#8A8A8A", "o", "white"),
    "not better": ("#CC79A7", "v", "#CC79A7"),
    "worse": ("#D55E00", "X", "#D55E00"),
}


def forest(
    found: Mapping[str, Mapping[str, Verdict]],
    measure: str,
    baseline: str,
    smallest: float | None,
    path: Path,
    *,
    narrow: bool = False,
) -> Figure:
    """Plot differences to the baseline with their intervals, a panel per group of languages.

    Args:
      found: per group of languages (`jaxmoo.study.answer.GROUP_NAMES`), the verdict on every arm.
      measure: what differs, of `jaxmoo.evaluate.measures.MEASURES`.
      baseline: the arm that stands at 0.
      smallest: the smallest effect worth having, shown as a band; None where none is set.
      path: the image to write.
      narrow: for a small screen: panels below each other, without a title.
    """
    main = found["seen"]
    higher = MEASURES[measure].higher_is_better
    arms = sorted(main, key=lambda name: main[name].estimate.mean, reverse=higher)
    height = 0.3 * max(len(arms), 2)
    across = (2.4 + 2.7 * len(found), 1.9 + height)
    below = (4.2, 0.7 + (1.0 + height) * len(found))
    with canvas(path, *(below if narrow else across)) as figure:
        if not narrow:
            title(
                figure,
                f"{MEASURES[measure].label}: {headline(main, baseline)}",
                reading_of_forest(baseline, smallest),
            )
        count = (len(found), 1) if narrow else (1, len(found))
        panels = figure.subplots(*count, sharex=True, sharey=True, squeeze=False).flat
        limit = max(_limit(list(verdicts.values()), smallest or 0.0) for verdicts in found.values())
        side = "right" if narrow else "left"  # where there is room for it
        for axes, (group, verdicts) in zip(panels, found.items(), strict=True):
            if smallest is not None:
                axes.axvspan(-smallest, smallest, color="#E9E9E9", zorder=0)
            axes.axvline(0, color=INK, linewidth=0.9)
            _points(axes, [verdicts[name] for name in arms], limit)
            axes.set_title(GROUP_NAMES[group], loc=side, fontweight="bold")
            axes.set_xlabel("better →" if higher else "← better", color=FAINT)
            axes.grid(axis="x")
            axes.locator_params(axis="x", nbins=4)
        panels[0].set_yticks(range(len(arms)), arms)
        panels[0].set_ylim(len(arms) - 0.5, -0.5)
        shown = {one.kind for verdicts in found.values() for one in verdicts.values()}
        handles = [_handle(kind) for kind in _LOOKS if kind in shown]
        columns = min(len(handles), 3) if narrow else len(handles)
        figure.legend(handles=handles, loc="outside lower right", ncols=columns)
        return figure


def reading_of_forest(baseline: str, smallest: float | None) -> str:
    """Say how `forest` is read."""
    what = f", grey: less than {smallest:g}, not worth having" if smallest is not None else ""
    return f"difference to {baseline} and its 95 % interval{what}"


def _limit(verdicts: Sequence[Verdict], smallest: float) -> float:
    """Where a panel ends. An arm that is far off would press the others together."""
    estimates = [one.estimate for one in verdicts if math.isfinite(one.estimate.half)]
    ends = [max(abs(one.low), abs(one.high)) for one in estimates] or [0.0]
    return max(1.25 * smallest, 1.05 * min(max(ends), 2.5 * float(np.median(ends))), 1e-6)


def _points(axes: Axes, verdicts: Sequence[Verdict], limit: float) -> None:
    estimates = [one.estimate for one in verdicts]
    for y, (one, verdict) in enumerate(zip(estimates, verdicts, strict=True)):
        colour, marker, fill = _LOOKS[verdict.kind]
        if abs(one.mean) > 0.95 * limit:
            side = math.copysign(1, one.mean)
            axes.annotate(
                f"{one.mean:+.2f}", (side * limit, y), (side * 0.72 * limit, y), va="center",
                ha="center", color=colour, arrowprops={"arrowstyle": "->", "color": colour},
            )  # fmt: skip
            continue
        if math.isfinite(one.half):
            low, high = max(one.low, -limit), min(one.high, limit)
            axes.plot([low, high], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
        axes.plot([one.mean], [y], marker, color=colour, markerfacecolor=fill, markersize=6.5)
    axes.set_xlim(-limit, limit)


def _handle(kind: str) -> Line2D:
    from matplotlib.lines import Line2D

    colour, marker, fill = _LOOKS[kind]
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=fill, label=kind)


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
            "mean over seeds, blue: better; framed: the 95 % interval, of this language and arm "
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

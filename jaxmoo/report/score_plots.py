"""Plots of held-out scores: before and after training, and over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from jaxmoo.errors import DataError
from jaxmoo.report.style import FAINT, INK, SEEN, UNSEEN, canvas, title, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Score", "before_after", "held_out_curves"]


class Score(Protocol):
    """What the plots need to know of a held-out score."""

    @property
    def nll(self) -> float:
        """Nats per token."""
        ...

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        ...


def before_after(
    before: Mapping[str, Score],
    after: Mapping[str, Score],
    seen: Sequence[str],
    unseen: Sequence[str],
    path: str | Path,
) -> Figure:
    """Plot held-out scores before and after training, per language.

    Args:
      before: scores before training; anything with ``nll`` and ``bits_per_byte``.
      after: scores after it.
      seen: languages trained on.
      unseen: languages only evaluated.
      path: the image to write.

    Raises:
      DataError: a language has no score.
    """
    groups = [
        ("trained on", SEEN, list(seen)),
        ("not trained on", UNSEEN, list(unseen)),
    ]
    groups = [group for group in groups if group[2]]
    missing = [c for _, _, codes in groups for c in codes if c not in before or c not in after]
    if missing or not groups:
        raise DataError(f"There are no scores before and after of {', '.join(missing) or 'any'}.")
    measures = [("nll", "nats per token"), ("bits_per_byte", "bits per byte")]
    sizes = [len(codes) + 1 for _, _, codes in groups]
    with canvas(path, 10, 1.5 + 0.5 * len(groups) + 0.27 * sum(sizes)) as figure:
        title(
            figure,
            "Held-out replies, before and after",
            "negative log-likelihood of the reference reply: lower is better",
        )
        grid = figure.subplots(
            len(groups), 2, sharex="col", squeeze=False, height_ratios=[n + 0.6 for n in sizes]
        )
        for line, (name, colour, codes) in zip(grid, groups, strict=True):
            codes = sorted(codes, key=lambda code: -before[code].nll)
            for axes, (measure, _) in zip(line, measures, strict=True):
                pairs = [(getattr(before[c], measure), getattr(after[c], measure)) for c in codes]
                pairs.append(tuple(np.mean(pairs, axis=0)))
                _dumbbells(axes, [*codes, "mean"], pairs, colour)
            line[0].set_title(f"languages {name}", color=colour, fontweight="bold")
            line[1].tick_params(labelleft=False)
        for column, (_, unit) in enumerate(measures):
            grid[-1][column].set_xlabel(unit)
            low, high = grid[-1][column].get_xlim()
            # Room for the numbers beside the outermost dots.
            grid[-1][column].set_xlim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        _dumbbell_legend(figure, grid[0][1])
        return figure


def _dumbbells(
    axes: Axes, names: Sequence[str], pairs: Sequence[tuple[float, float]], colour: str
) -> None:
    from matplotlib.colors import to_rgb

    pale = tuple(0.55 + 0.45 * part for part in to_rgb(colour))
    for y, (name, (old, new)) in enumerate(zip(names, pairs, strict=True)):
        marker, size = ("D", 34) if name == "mean" else ("o", 40)
        axes.plot([old, new], [y, y], color=pale, linewidth=2.6, zorder=1, solid_capstyle="butt")
        axes.scatter(
            old, y, size, "white", marker=marker, edgecolors=colour, linewidths=1.4, zorder=2
        )
        axes.scatter(
            new, y, size, colour, marker=marker, edgecolors=colour, linewidths=1.4, zorder=3
        )
        for value, other, bold in ((old, new, False), (new, old, True)):
            right = value > other or (value == other and not bold)
            axes.annotate(
                f"{value:.2f}",
                (value, y),
                xytext=(7 if right else -7, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                fontsize=8,
                color=INK if bold else FAINT,
                fontweight="bold" if bold else "normal",
            )
    axes.axhline(len(names) - 1.5, color="#BBBBBB", linewidth=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _dumbbell_legend(figure: Figure, axes: Axes) -> None:
    from matplotlib.lines import Line2D

    common = {"marker": "o", "linestyle": "", "color": "#444444", "markersize": 6}
    figure.legend(
        handles=[
            Line2D([], [], markerfacecolor="white", markeredgewidth=1.4, label="before", **common),
            Line2D([], [], label="after", **common),
        ],
        loc="upper right",
        ncols=2,
        handletextpad=0.1,
        columnspacing=1.0,
    )


def held_out_curves(
    evaluations: Mapping[int, Mapping[str, Score]],
    seen: Sequence[str],
    unseen: Sequence[str],
    path: str | Path,
) -> Figure:
    """Plot the held-out loss over the steps: every language, the means, and the worst.

    Args:
      evaluations: by step, the scores of every language.
      seen: languages trained on.
      unseen: languages only evaluated.
      path: the image to write.

    Raises:
      DataError: there are no scores.
    """
    if not evaluations:
        raise DataError("There are no held-out scores to plot.")
    steps = sorted(evaluations)
    groups = [("trained on", SEEN, seen), ("not trained on", UNSEEN, unseen)]
    groups = [group for group in groups if group[2]]
    with canvas(path, 8.5, 4.4) as figure:
        title(
            figure,
            "Held-out replies over the steps",
            "negative log-likelihood; thick: mean of a group, dotted: its worst language",
        )
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (name, colour, codes) in zip(panels, groups, strict=True):
            values = np.array([[evaluations[s][c].nll for c in codes] for s in steps])
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, values.max(1), color=INK, linewidth=1.2, linestyle=":")
            axes.plot(steps, values.mean(1), color=colour, linewidth=2.2, marker="o", markersize=4)
            for code, end in zip(codes, values[-1], strict=True):
                axes.annotate(
                    code, (steps[-1], end), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=7, color=FAINT,
                )  # fmt: skip
            axes.set_title(f"languages {name}", color=colour, fontweight="bold")
            axes.set_xlabel("training step")
            axes.xaxis.set_major_locator(whole_numbers(6))
            axes.grid(axis="y")
        panels[0].set_ylabel("loss [nats per token]")
        return figure

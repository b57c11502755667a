"""Names in plots: at the ends of lines, along the sides of a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxmoo.report.style import line_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["label_ends", "matrix_axes"]


def label_ends(axes: Axes, x: float, ends: Mapping[str, float]) -> None:
    """Write names behind the ends of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = {name: y for name, y in ends.items() if math.isfinite(y)}
    heights = _spread([(y - low) / (high - low) for y in ends.values()], gap=0.05)
    for (name, y), height, line in zip(ends.items(), heights, line_styles(), strict=False):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.035, height),
            textcoords="axes fraction",
            color=line["color"],
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line["color"],
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move points on a line as little as needed for neighbours to be ``gap`` apart.

    Example:
      >>> _spread([0.5, 0.1, 0.5], gap=0.2)
      [0.4, 0.1, 0.6]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    # Groups of touching points: (sum of their heights less their offsets, members).
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        total, members = heights[index], [index]
        while groups and _start(groups[-1], gap) + gap * len(groups[-1][1]) > _start(
            (total, members), gap
        ):
            before, others = groups.pop()
            total, members = before + total, others + members
        groups.append((total, members))
    placed = [0.0] * len(heights)
    for group in groups:
        for rank, index in enumerate(group[1]):
            placed[index] = round(_start(group, gap) + gap * rank, 6)
    return placed


def _start(group: tuple[float, list[int]], gap: float) -> float:
    total, members = group
    return total / len(members) - gap * (len(members) - 1) / 2


def matrix_axes(axes: Axes, languages: Sequence[str], cell: float) -> None:
    """Label a matrix whose cells are ``cell`` points wide."""
    size = min(9, 0.75 * cell)
    axes.set_xticks(range(len(languages)), languages, fontsize=size)
    axes.set_yticks(range(len(languages)), languages, fontsize=size)
    if 0.7 * size * max(map(len, languages)) > cell:
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0)
    axes.set_facecolor("#F2F2F2")
    for spine in axes.spines.values():
        spine.set_visible(False)

"""Plots of gradient conflict: per block over the steps, and between languages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoo.errors import DataError
from jaxmoo.report.labels import matrix_axes
from jaxmoo.report.style import INK, canvas, title, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["conflict_heatmap", "language_cosines"]


def conflict_heatmap(
    rows: Sequence[Mapping[str, Any]], path: str | Path, *, max_columns: int = 120
) -> Figure:
    """Plot the share of conflicting language pairs per block over the steps.

    Args:
      rows: metrics, some with ``blocks``: name -> ``conflict_share``.
      path: the image to write.
      max_columns: steps are averaged into at most so many columns.

    Raises:
      DataError: no row tells the blocks apart.
    """
    used = [row for row in rows if row.get("blocks")]
    if not used:
        raise DataError("There are no rows with metrics of single blocks to plot.")
    names = list(used[0]["blocks"])
    steps = np.array([row["step"] for row in used], float)
    shares = np.array(
        [[row["blocks"].get(n, {}).get("conflict_share") for n in names] for row in used], float
    ).T
    if len(used) > max_columns:
        parts = np.array_split(np.arange(len(used)), max_columns)
        steps = np.array([steps[part].mean() for part in parts])
        shares = np.stack([_mean(shares[:, part], axis=1) for part in parts], axis=1)
    with canvas(path, 8.5, min(1.9 + 0.24 * max(len(names), 4), 10)) as figure:
        title(
            figure,
            "Gradient conflict per block",
            "share of language pairs whose gradients oppose each other (negative inner product)",
        )
        axes = figure.subplots()
        axes.set_facecolor("#EEEEEE")
        top = float(np.nanmax(shares)) if np.isfinite(shares).any() else 0
        image = axes.pcolormesh(
            _edges(steps),
            np.arange(len(names) + 1),
            np.ma.masked_invalid(shares),
            cmap="magma_r",
            vmin=0,
            # The next multiple of a tenth, so that runs are comparable and colours are used.
            vmax=min(max(math.ceil(10 * top - 1e-9) / 10, 0.1), 1),
        )
        from matplotlib.ticker import PercentFormatter

        every = math.ceil(len(names) / 40)
        shown = range(0, len(names), every)
        axes.set_yticks([i + 0.5 for i in shown], [names[i] for i in shown])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel("training step")
        axes.set_ylabel("block")
        axes.xaxis.set_major_locator(whole_numbers(8))
        bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=25)
        bar.set_label("conflicting language pairs")
        bar.formatter = PercentFormatter(1, decimals=0)
        bar.outline.set_visible(False)
        return figure


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders of columns around their centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the known values; nan where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def language_cosines(
    rows: Sequence[Mapping[str, Any]], languages: Sequence[str], path: str | Path
) -> Figure:
    """Plot the cosines between languages' gradients at the start and at the end of the run.

    Args:
      rows: metrics with ``cosine`` [K, K], the mean over blocks; the first and the last tenth of
        them are averaged.
      languages: the K languages, in the order of the matrix.
      path: the image to write.

    Raises:
      DataError: no row has a matrix of that size.
    """
    count = len(languages)
    shape = (count, count)
    used = [row for row in rows if "cosine" in row and np.shape(row["cosine"]) == shape]
    if not used or count < 2:
        raise DataError(f"There are no rows with cosines between {count} languages to plot.")
    window = max(1, len(used) // 10)
    windows = [used[:window]] if len(used) == 1 else [used[:window], used[-window:]]
    means = [_mean(np.array([row["cosine"] for row in part], float), axis=0) for part in windows]
    off_diagonal = ~np.eye(count, dtype=bool)
    values = np.abs([mean[off_diagonal] for mean in means])
    limit = max(0.1, math.ceil(10 * float(np.nanmax(values, initial=0)) - 1e-9) / 10)
    side = min(max(0.42 * count, 2.6), 6.5)
    with canvas(path, len(means) * side + 1.7, side + 1.25) as figure:
        title(
            figure,
            "Agreement of the languages' gradients",
            "cosine between the gradients of two languages, mean over blocks",
        )
        grid = figure.subplots(1, len(means), sharey=True, squeeze=False)[0]
        images = []  # of one colour scale
        for axes, mean, part in zip(grid, means, windows, strict=True):
            shown = np.ma.masked_where(~off_diagonal | ~np.isfinite(mean), mean)
            images.append(axes.imshow(shown, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto"))
            matrix_axes(axes, languages, cell=72 * side / count)
            first, last = part[0]["step"], part[-1]["step"]
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            overall = f"{_mean(mean[off_diagonal], axis=0):+.2f}".replace("-", "\N{MINUS SIGN}")
            axes.set_title(f"{steps} (mean {overall})")
            if count <= 16:
                _annotate(axes, mean, limit)
        bar = figure.colorbar(images[-1], ax=list(grid), pad=0.015, aspect=22)
        bar.set_label("cosine (red: conflict)")
        bar.outline.set_visible(False)
        return figure


def _annotate(axes: Axes, mean: np.ndarray, limit: float) -> None:
    for (i, j), value in np.ndenumerate(mean):
        if i != j and math.isfinite(value):
            text = f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}").replace("0.", ".")
            dark = abs(value) > 0.62 * limit
            axes.text(
                j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK
            )

"""A plot of the training loss of every language."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoo.errors import DataError
from jaxmoo.report.labels import label_ends
from jaxmoo.report.style import SEEN, canvas, line_styles, title, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["loss_curves"]


def loss_curves(
    rows: Sequence[Mapping[str, Any]], languages: Sequence[str], path: str | Path
) -> Figure:
    """Plot every language's training loss over the steps.

    Up to 12 languages share one panel, with their codes at the ends of the lines; more get a
    small panel each, with the others faint behind.

    Args:
      rows: metrics with ``loss``, each of some or all of the languages.
      languages: which languages, in the order of their colours.
      path: the image to write.

    Raises:
      DataError: of some language no row has the loss.
    """
    used = {code: [row for row in rows if code in (row.get("loss") or {})] for code in languages}
    if not used or not all(used.values()):
        raise DataError("There are no rows with the loss of every language to plot.")
    steps = {code: np.array([row["step"] for row in mine]) for code, mine in used.items()}
    losses = {
        code: np.array([row["loss"][code] for row in mine], float) for code, mine in used.items()
    }
    smooth = {code: _smooth(values) for code, values in losses.items()}
    explanation = "mean negative log-likelihood per reply token"
    if any(smooth[code] is not losses[code] for code in languages):
        explanation += "; thin: each step, thick: smoothed"
    if len(languages) > 12:
        return _loss_panels(steps, losses, smooth, explanation, path)
    with canvas(path, 8.5, 4.8) as figure:
        title(figure, "Training loss per language", explanation)
        axes = figure.subplots()
        for (code, values), style in zip(losses.items(), line_styles(), strict=False):
            axes.plot(steps[code], values, color=style["color"], linewidth=0.7, alpha=0.28)
            axes.plot(steps[code], smooth[code], linewidth=1.9, label=code, **style)
        _loss_axes(axes, steps, losses, smooth)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss [nats per token]")
        label_ends(axes, axes.get_xlim()[1], {c: _last(smooth[c]) for c in languages})
        return figure


def _loss_panels(
    steps: Mapping[str, np.ndarray],
    losses: Mapping[str, np.ndarray],
    smooth: Mapping[str, np.ndarray],
    explanation: str,
    path: str | Path,
) -> Figure:
    columns = min(8, math.ceil(math.sqrt(1.6 * len(losses))))
    lines = math.ceil(len(losses) / columns)
    with canvas(path, 10, 1.0 + 1.25 * lines) as figure:
        title(figure, "Training loss per language", explanation + "; grey: the other languages")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(losses) :]:
            axes.set_visible(False)
        for axes, code in zip(grid.flat, losses, strict=False):
            for other in losses:
                axes.plot(steps[other], smooth[other], color="#D9D9D9", linewidth=0.6)
            axes.plot(steps[code], losses[code], color=SEEN, linewidth=0.6, alpha=0.3)
            axes.plot(steps[code], smooth[code], color=SEEN, linewidth=1.8, label=code)
            axes.set_title(code, fontweight="bold", pad=2)
            _loss_axes(axes, steps, losses, smooth)
            axes.xaxis.set_major_locator(whole_numbers(3))
        figure.supxlabel("training step", fontsize=9)
        figure.supylabel("loss [nats per token]", fontsize=9)
        return figure


def _loss_axes(
    axes: Axes,
    steps: Mapping[str, np.ndarray],
    losses: Mapping[str, np.ndarray],
    smooth: Mapping[str, np.ndarray],
) -> None:
    # Single steps may leave the picture, so that one outlier does not flatten everything else.
    raw = np.concatenate([v[np.isfinite(v)] for v in losses.values()])
    kept = np.concatenate([v[np.isfinite(v)] for v in smooth.values()])
    if raw.size:
        low = min(kept.min(), np.quantile(raw, 0.005))
        high = max(kept.max(), np.quantile(raw, 0.995))
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    first, last = min(s[0] for s in steps.values()), max(s[-1] for s in steps.values())
    if last > first:
        axes.set_xlim(first, last)
    axes.xaxis.set_major_locator(whole_numbers(7))
    axes.grid(axis="y")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average with a Gaussian window of about a thirtieth of the run; gaps stay gaps."""
    width = len(values) / 30
    if width < 0.5:
        return values
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), kernel)[reach:-reach]
    weight = np.convolve(known.astype(float), kernel)[reach:-reach]
    return np.where(known, total / np.maximum(weight, 1e-12), np.nan)


def _last(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan

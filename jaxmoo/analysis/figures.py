"""Figures of an analysis: conflict maps, stationarity, neurons, separability, interference.

Every function writes one image and returns its :class:`matplotlib.figure.Figure`. Languages are
shown by their codes, models by names such as "base" and "step 24".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxmoo.analysis.interference import Interference
from jaxmoo.analysis.separability import METRICS, Separability
from jaxmoo.analysis.stationarity import Stationarity
from jaxmoo.report.labels import label_ends, matrix_axes
from jaxmoo.report.style import (
    COLOURS,
    FAINT,
    INK,
    SEEN,
    UNSEEN,
    canvas,
    line_styles,
    title,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "agreement",
    "cosine_maps",
    "interference_bars",
    "neuron_counts",
    "neuron_layers",
    "separability_curves",
    "stationarity_dots",
]


def cosine_maps(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    languages: Sequence[str],
    path: str | Path,
    *,
    heading: str,
    halves: tuple[str, str],
) -> Figure:
    """Plot matrices of cosines side by side, two in each panel.

    Args:
      panels: per title two matrices [K, K]: one is shown above the diagonal, one below.
      languages: the K languages.
      path: the image to write.
      heading: what is shown.
      halves: what is shown above the diagonal and what below.
    """
    count, k = len(panels), len(languages)
    columns = min(count, max(2, min(5, round(30 / k))))
    lines = math.ceil(count / columns)
    side = min(max(0.21 * k, 1.7), 4.0)
    joined = {
        name: np.triu(upper, 1) + np.tril(lower, -1) for name, (upper, lower) in panels.items()
    }
    values = np.abs([m[~np.eye(k, dtype=bool)] for m in joined.values()])
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    limit = min(max(math.ceil(10 * top - 1e-9) / 10, 0.1), 1.0)
    with canvas(
        path, max(columns * (side + 0.25) + 1.0, 5.5), lines * (side + 0.45) + 1.0
    ) as figure:
        title(figure, heading, f"above the diagonal: {halves[0]}; below: {halves[1]}")
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[count:]:
            axes.set_visible(False)
        images = []  # of one colour scale
        for axes, (name, matrix) in zip(grid.flat, joined.items(), strict=False):
            hidden = np.eye(k, dtype=bool) | ~np.isfinite(matrix)
            shown = np.ma.masked_where(hidden, matrix)
            images.append(axes.imshow(shown, cmap="RdBu", vmin=-limit, vmax=limit))
            matrix_axes(axes, languages, cell=72 * side / k)
            axes.set_title(name, fontsize=9, pad=3)
        bar = figure.colorbar(images[-1], ax=list(grid.flat), pad=0.02, aspect=18, shrink=0.9)
        bar.set_label("cosine (red: conflict)")
        bar.outline.set_visible(False)
        return figure


def agreement(
    steps: Sequence[int], cosines: np.ndarray, languages: Sequence[str], path: str | Path
) -> Figure:
    """Plot how well each language's gradient agrees with the others', over the steps.

    Args:
      steps: of the records [T].
      cosines: mean cosine of a language with each other one [T, K].
      languages: the K languages.
      path: the image to write.
    """
    with canvas(path, 8.5, 4.4) as figure:
        title(
            figure,
            "Who agrees with the others",
            "mean cosine of a language's gradient with those of the others, mean over blocks",
        )
        axes = figure.subplots()
        marker = "o" if len(steps) < 12 else None
        for code, values, style in zip(languages, cosines.T, line_styles(), strict=False):
            axes.plot(
                steps, values, label=code, linewidth=1.7, marker=marker, markersize=4, **style
            )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.grid(axis="y")
        if len(steps) > 1:
            axes.set_xlim(min(steps), max(steps))
        axes.xaxis.set_major_locator(whole_numbers(8))
        axes.set_xlabel("training step")
        axes.set_ylabel("mean cosine")
        ends = {code: _last(values) for code, values in zip(languages, cosines.T, strict=True)}
        label_ends(axes, steps[-1], ends)
        return figure


def _last(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan


def stationarity_dots(found: Mapping[str, Mapping[str, Stationarity]], path: str | Path) -> Figure:
    """Plot the minimal over the mean norm, of the whole model and of every block.

    Args:
      found: per model, per block; the whole model is called "whole".
      path: the image to write.
    """
    blocks = list(next(iter(found.values())))
    with canvas(path, 8.5, 1.7 + 0.27 * (len(blocks) + 1)) as figure:
        title(
            figure,
            "Distance from Pareto stationarity",
            "shortest combination of the languages' gradients over their mean; 0: stationary",
        )
        axes = figure.subplots()
        places = {b: i + (i > 0) * 0.5 for i, b in enumerate(blocks)}
        offsets = np.linspace(-0.22, 0.22, len(found)) if len(found) > 1 else [0.0]
        colours = _model_colours(found)
        for (name, of_blocks), offset in zip(found.items(), offsets, strict=True):
            y = [places[b] + offset for b in blocks]
            one = [
                s.one_batch[0] / s.one_batch[1] if s.one_batch[1] else np.nan
                for s in of_blocks.values()
            ]
            without = [s.ratio_across for s in of_blocks.values()]
            for a, b, at in zip(one, without, y, strict=True):
                axes.plot([a, b], [at, at], color=colours[name], linewidth=1, alpha=0.4, zorder=1)
            common = {"s": 30, "edgecolors": colours[name], "linewidths": 1.3, "clip_on": False}
            axes.scatter(one, y, c="white", zorder=2, **common)
            axes.scatter(without, y, c=colours[name], zorder=3, label=name, **common)
        axes.scatter([], [], c="white", edgecolors=INK, label="one batch (noise included)")
        axes.scatter([], [], c=INK, edgecolors=INK, label="two-batch estimate")
        axes.axhline(0.75, color="#BBBBBB", linewidth=0.7)
        axes.set_yticks(list(places.values()), blocks)
        axes.get_yticklabels()[0].set_fontweight("bold")
        axes.set_ylim(max(places.values()) + 0.6, -0.6)
        axes.set_xlim(0, max(1.03, axes.get_xlim()[1]))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel("minimal norm / norm of the mean gradient")
        figure.legend(loc="outside lower left", ncols=5, fontsize=8.5)
        return figure


def neuron_counts(
    counts: Mapping[str, Sequence[int]],
    languages: Sequence[str],
    unseen: Sequence[str],
    path: str | Path,
) -> Figure:
    """Plot how many neurons are specific to each language, in each model.

    Args:
      counts: per model a number per language.
      languages: the languages.
      unseen: those that were not trained on.
      path: the image to write.
    """
    with canvas(path, max(6.5, 0.55 * len(languages) + 2), 3.8) as figure:
        title(
            figure,
            "Language-specific neurons",
            "low activation entropy (LAPE), all models at the base model's thresholds",
        )
        axes = figure.subplots()
        width = 0.8 / len(counts)
        colours = _model_colours(counts)
        x = np.arange(len(languages))
        for i, (name, values) in enumerate(counts.items()):
            at = x + (i - (len(counts) - 1) / 2) * width
            axes.bar(at, values, width * 0.9, color=colours[name], label=name)
        axes.set_xticks(x, [f"{c}*" if c in unseen else c for c in languages])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("neurons")
        axes.yaxis.set_major_locator(whole_numbers(6))
        if any(c in unseen for c in languages):
            axes.set_xlabel("* not trained on")
        axes.grid(axis="y")
        figure.legend(loc="outside upper right", ncols=len(counts))
        return figure


def neuron_layers(
    counts: Mapping[str, np.ndarray], languages: Sequence[str], path: str | Path
) -> Figure:
    """Plot in which layers the language-specific neurons lie.

    Args:
      counts: per model the numbers [K, L].
      languages: the K languages.
      path: the image to write.
    """
    k, layers = next(iter(counts.values())).shape
    top = max(1, max(int(c.max()) for c in counts.values()))
    with canvas(path, 9.0, len(counts) * (0.55 + 0.17 * k) + 1.0) as figure:
        title(
            figure,
            "Where they lie",
            "number of language-specific neurons by layer of the model",
        )
        grid = figure.subplots(len(counts), 1, sharex=True, squeeze=False)[:, 0]
        images = []  # of one colour scale
        for axes, (name, values) in zip(grid, counts.items(), strict=True):
            shown = np.ma.masked_equal(values, 0)
            images.append(axes.imshow(shown, cmap="viridis_r", vmin=0, vmax=top, aspect="auto"))
            axes.set_facecolor("#F2F2F2")
            axes.set_yticks(range(k), languages, fontsize=min(8, 72 * 0.17 * 0.8))
            axes.tick_params(length=0)
            axes.set_title(name)
        grid[-1].xaxis.set_major_locator(whole_numbers(min(layers, 15)))
        grid[-1].set_xlabel("layer")
        bar = figure.colorbar(images[-1], ax=list(grid), pad=0.015, aspect=22)
        bar.set_label("neurons")
        bar.outline.set_visible(False)
        return figure


def separability_curves(
    found: Mapping[str, Sequence[Separability]], count: int, path: str | Path
) -> Figure:
    """Plot silhouettes and retrieval accuracy over the layers.

    Args:
      found: per model, per layer.
      count: number of sentences, which decides chance.
      path: the image to write.
    """
    with canvas(path, 10, 3.9) as figure:
        title(
            figure,
            "Separability of languages, and alignment of translations",
            "mean-pooled hidden states of parallel sentences; bands: 95 % bootstrap intervals",
        )
        panels = figure.subplots(1, 3)
        colours = _model_colours(found)
        for axes, metric in zip(panels, METRICS, strict=False):
            axes.set_title(f"silhouette by language, {metric}")
            axes.axhline(0, color=INK, linewidth=0.7)
            for name, layers in found.items():
                _band(axes, [layer.silhouette[metric] for layer in layers], colours[name], name)
        panels[2].set_title("translation retrieved (cosine)")
        panels[2].axhline(1 / count, color=FAINT, linewidth=0.8, linestyle=":")
        panels[2].annotate(
            "chance",
            (0, 1 / count),
            xytext=(2, 3),
            textcoords="offset points",
            color=FAINT,
            fontsize=8,
        )
        for name, layers in found.items():
            _band(panels[2], [layer.retrieval for layer in layers], colours[name], name)
        panels[2].set_ylim(0, 1)
        for axes in panels:
            axes.set_xlabel("layers passed")
            axes.xaxis.set_major_locator(whole_numbers(6))
            axes.grid(axis="y")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(found)
        )
        return figure


def _band(axes: Axes, layers: Sequence, colour: str, name: str) -> None:
    x = range(len(layers))
    axes.fill_between(
        x, [i.low for i in layers], [i.high for i in layers], color=colour, alpha=0.18, linewidth=0
    )
    axes.plot(x, [i.value for i in layers], color=colour, linewidth=1.7, label=name)


def interference_bars(found: Mapping[str, Interference], path: str | Path) -> Figure:
    """Plot every language's loss after joint training minus that after training on it alone.

    Args:
      found: per language.
      path: the image to write.
    """
    codes = sorted(found, key=lambda code: found[code].value)
    with canvas(path, 7.5, 1.5 + 0.32 * (len(codes) + 1)) as figure:
        title(
            figure,
            "Interference",
            "held-out loss after joint training, minus after training on the language alone",
        )
        axes = figure.subplots()
        values = [found[c].value for c in codes]
        names = [*codes, "mean"]
        values.append(float(np.mean(values)))
        colours = [UNSEEN if v > 0 else SEEN for v in values]
        axes.barh(range(len(names)), values, 0.66, color=colours)
        reach = max(*map(abs, values), 0.01)
        for y, value in enumerate(values):
            axes.annotate(
                f"{value:+.3f}".replace("-", "\N{MINUS SIGN}"),
                (value, y),
                xytext=(4 if value > 0 else -4, 0),
                textcoords="offset points",
                ha="left" if value > 0 else "right",
                va="center",
                fontsize=8,
            )
        axes.set_xlim(-1.3 * reach, 1.3 * reach)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.axhline(len(codes) - 0.5, color="#BBBBBB", linewidth=0.7)
        axes.set_yticks(range(len(names)), names)
        axes.get_yticklabels()[-1].set_fontweight("bold")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.invert_yaxis()
        axes.set_xlabel("nats per token (right: the others cost it something; left: they help)")
        return figure


def _model_colours(models: Mapping[str, object]) -> dict[str, str]:
    """Grey for the base model, then the common colours."""
    others = iter(COLOURS * (len(models) // len(COLOURS) + 1))
    return {name: "#8A8A8A" if name == "base" else next(others) for name in models}

"""Plots of a training run: what each language lost or gained, and where they conflicted.

Every function writes one image and returns its :class:`matplotlib.figure.Figure`. Rows are those
of ``metrics.jsonl`` (see :mod:`jaxmoo.train.metrics`); languages are shown by their codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxmoo.errors import DataError
from jaxmoo.report.style import (
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
    "Reply",
    "Score",
    "before_after",
    "conflict_heatmap",
    "held_out_curves",
    "label_ends",
    "language_cosines",
    "loss_curves",
    "matrix_axes",
]


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


class Reply(Protocol):
    """What a page needs to know of a model's reply."""

    @property
    def prompt(self) -> str:
        """The text before it."""
        ...

    @property
    def reference(self) -> str:
        """The reply in the data."""
        ...

    @property
    def reply(self) -> str:
        """The model's."""
        ...


# --- Training loss ---------------------------------------------------------------------------


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
    losses = {code: _numbers(row["loss"][code] for row in mine) for code, mine in used.items()}
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


def _numbers(values: Any) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], float)


# --- Conflict --------------------------------------------------------------------------------


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
        [_numbers(row["blocks"].get(n, {}).get("conflict_share") for n in names) for row in used]
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


def _annotate(axes: Axes, mean: np.ndarray, limit: float) -> None:
    for (i, j), value in np.ndenumerate(mean):
        if i != j and math.isfinite(value):
            text = f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}").replace("0.", ".")
            dark = abs(value) > 0.62 * limit
            axes.text(
                j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK
            )


# --- Before and after ------------------------------------------------------------------------


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

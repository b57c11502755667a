"""A plot of a run's data: how long each language's examples are, and what share it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoo.report.style import FAINT, INK, SEEN, UNSEEN, canvas, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["lengths_and_shares"]


def lengths_and_shares(description: Mapping[str, Any], path: str | Path) -> Figure:
    """Plot token lengths and shares of all languages.

    Args:
      description: from :func:`jaxmoo.data.inspect.describe`.
      path: the image to write.

    Returns:
      The figure.
    """
    languages = description["languages"]
    with canvas(path, 9.5, 1.6 + 0.3 * len(languages)) as figure:
        title(
            figure,
            "The data of the run",
            "left: tokens per example, with the middle half and 5 to 95 %; right: what a language "
            "has of all training tokens",
        )
        lengths, shares = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        _lengths(lengths, languages, description["sequence_length"])
        _shares(shares, languages)
        places = np.arange(len(languages))
        lengths.set_yticks(places, list(languages))
        for label, one in zip(lengths.get_yticklabels(), languages.values(), strict=True):
            label.set_color(SEEN if one["seen"] else UNSEEN)
            label.set_fontweight("bold")
        lengths.set_ylim(len(languages) - 0.4, -0.6)
        for axes in (lengths, shares):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        return figure


def _lengths(axes: Axes, languages: Mapping[str, Any], limit: int) -> None:
    for place, one in enumerate(languages.values()):
        colour = SEEN if one["seen"] else UNSEEN
        q = one["length_quantiles"]
        axes.plot([q["5"], q["95"]], [place, place], color=colour, linewidth=1.2)
        axes.plot([q["25"], q["75"]], [place, place], color=colour, linewidth=5, alpha=0.75)
        axes.plot(q["50"], place, "o", color="white", markeredgecolor=colour, markersize=5)
        axes.plot(q["100"], place, "|", color=FAINT, markersize=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.axvline(limit, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.annotate(
        f"cut at {limit} ",
        (limit, 1),
        xycoords=("data", "axes fraction"),
        va="bottom",
        ha="center",
        fontsize=8,
    )
    kinds = {one["seen"] for one in languages.values()}
    unseen = "; orange: only evaluated" if kinds == {True, False} else ""
    axes.set_xlabel(f"tokens per example (|: longest){unseen}")
    axes.grid(axis="x")


def _shares(axes: Axes, languages: Mapping[str, Any]) -> None:
    for place, one in enumerate(languages.values()):
        if "rows" not in one:
            continue
        corpus, run = 100 * one["share_of_corpus"], 100 * one["share_of_run"]
        axes.barh(place - 0.19, corpus, 0.32, color="#B9C7D3")
        axes.barh(place + 0.19, run, 0.32, color=SEEN)
        axes.text(
            max(corpus, run),
            place,
            f"  {one['epochs']:.2f} epochs",
            va="center",
            fontsize=8,
            color="#444444",
        )
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of tokens (grey: in the corpus, blue: in the run)")
    axes.grid(axis="x")

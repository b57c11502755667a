"""The look that all plots share."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

__all__ = [
    "COLOURS",
    "FAINT",
    "INK",
    "SEEN",
    "UNSEEN",
    "canvas",
    "check_drawing",
    "line_styles",
    "title",
    "whole_numbers",
]

# Okabe and Ito's colours, told apart with any common colour vision; their yellow, too pale for a
# line on white, is replaced by a dark wine red.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B2D43", "#6E6E6E")
_DASHES = ("-", (0, (4, 1.5)))
SEEN, UNSEEN = "#0072B2", "#D55E00"
INK, FAINT = "#222222", "#8A8A8A"

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "font.size": 9,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    # The same figure gives the same file.
    "svg.hashsalt": "jaxmoo",
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def check_drawing() -> None:
    """Raise ConfigError unless plots can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "Plots need matplotlib, which is not installed. Install 'jaxmoo[train]' or "
            "matplotlib, or set report=false."
        )


@contextlib.contextmanager
def canvas(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """Give a figure in the common style, and write it when the block is left."""
    check_drawing()
    import matplotlib
    from matplotlib.figure import Figure

    # No pyplot: a figure of its own needs no display and leaves no global state behind.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        yield figure
        path = typed_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.removeprefix(".") or None
        with path.open("wb") as stream:
            figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)


def title(figure: Figure, heading: str, explanation: str) -> None:
    """A title that says what is shown, over a line that says how to read it."""
    from matplotlib.text import Annotation

    # The title's own second line is the space of the explanation: layouts make room for a title
    # only, and a text has one weight.
    text = figure.suptitle(f"{heading}\n ", x=0.012, ha="left", fontsize=11, fontweight="bold")
    figure.add_artist(
        Annotation(explanation, (0, 0), xycoords=text, va="bottom", fontsize=9.5, color="#444444")
    )


def whole_numbers(count: int) -> MaxNLocator:
    """Return ticks of an axis at about so many whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)


def line_styles() -> Iterator[dict[str, Any]]:
    """Yield line styles that can be told apart, the first ones by colour alone."""
    for dash, colour in itertools.product(_DASHES, COLOURS):
        yield {"color": colour, "linestyle": dash}

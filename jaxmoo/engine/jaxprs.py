"""Walking through traced programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jax.extend import core

__all__ = ["inner_jaxprs", "source_line"]

# This package's directory.
_OWN = str(Path(__file__).parents[1])


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Yield the programs inside of an equation: bodies of loops, branches, called functions."""
    return _within(equation.params.values())


def _within(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _within(value)


def source_line(equation: Any) -> str:
    """Say which line of the user's program an equation comes from, as `` (FILE:LINE)``."""
    frames = getattr(equation.source_info.traceback, "frames", ())
    for frame in frames:
        if "site-packages" not in frame.file_name and not frame.file_name.startswith(_OWN):
            return f" ({frame.file_name}:{frame.line_num})"
    return ""

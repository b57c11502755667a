"""What an analysis says of one measure, and how it writes numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoo.report.page import image

__all__ = ["Section", "mean", "signed"]


@dataclasses.dataclass(frozen=True)
class Section:
    """One measure.

    Attributes:
      name: of the measure.
      heading: for a person.
      text: paragraphs, as HTML: what is measured, then its limits.
      images: files and what they show, in order.
      tables: as HTML.
      numbers: everything measured, as JSON holds it (NumPy arrays allowed).
    """

    name: str
    heading: str
    text: str
    images: Sequence[tuple[Path, str]]
    numbers: dict[str, Any]
    tables: Sequence[str] = ()

    def html(self) -> str:
        """Return the section as HTML."""
        shown = [f'<h2 id="{self.name}">{self.heading}</h2>', self.text, *self.tables]
        return "\n".join([*shown, *(image(path, alt) for path, alt in self.images)])


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of the known values; nan where there is none.

    Example:
      >>> mean(np.array([[1.0, np.nan], [3.0, np.nan]]), 0).tolist()
      [2.0, nan]
    """
    known = np.isfinite(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def signed(value: float, digits: int = 2) -> str:
    """Write a difference or a cosine; a dash where there is none.

    Example:
      >>> signed(0.125), signed(float("nan"))
      ('+0.12', '–')
    """
    if not np.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")

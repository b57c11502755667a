"""What a report is made of, as Markdown and as HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmoo.data.table import text_table
from jaxmoo.report.page import table

__all__ = ["Part", "Picture", "Table", "as_html", "as_markdown", "contents"]


class Table(NamedTuple):
    """A table.

    Attributes:
      header: the columns' names.
      rows: cells, the first one of a row its name, the others numbers or short words.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


class Picture(NamedTuple):
    """A picture.

    Attributes:
      file: its name, beside the report.
      says: what it shows, in a few words.
    """

    file: str
    says: str


# Texts are paragraphs or headings (###) in Markdown, with *emphasis* and nothing else.
Part = str | Table | Picture


def as_markdown(parts: Sequence[Part], width: float | None = math.inf) -> str:
    """Return parts as Markdown.

    Args:
      parts: of the report.
      width: of :func:`~jaxmoo.data.table.text_table`; what is written to a file does not depend on
        the terminal that is there at the time.

    Example:
      >>> print(as_markdown(["### Sizes", Table(["of", "n"], [["a", 12]])]))
      ### Sizes
      <BLANKLINE>
      | of |  n |
      |:---|---:|
      | a  | 12 |
    """
    return "\n\n".join(_markdown(part, width) for part in parts)


def _markdown(part: Part, width: float | None) -> str:
    if isinstance(part, Table):
        return text_table(part.header, part.rows, width)
    return f"![{part.says}]({part.file})" if isinstance(part, Picture) else part


def as_html(parts: Sequence[Part], images: Mapping[str, str]) -> str:
    """Return parts as HTML, headings with names that can be linked to.

    Args:
      parts: of the report.
      images: the elements to show for files of pictures.

    Example:
      >>> print(as_html(["### Sizes", "Of *a* < **b**."], {}))
      <h2 id="sizes">Sizes</h2>
      <p>Of <em>a</em> &lt; <strong>b</strong>.</p>
    """
    return "\n".join(_html(part, images) for part in parts)


def _html(part: Part, images: Mapping[str, str]) -> str:
    if isinstance(part, Table):
        return f'<div class="wide">{_marked(table(part.header, part.rows, "numbers"))}</div>'
    if isinstance(part, Picture):
        return images[part.file]
    if heading := _heading(part):
        return f'<h2 id="{_name(heading)}">{html.escape(heading)}</h2>'
    return f"<p>{_marked(html.escape(part))}</p>"


def contents(parts: Sequence[Part]) -> str:
    """Return links to the headings of parts, as HTML.

    Example:
      >>> contents(["### Of sizes", "text"])
      '<nav><a href="#of-sizes">Of sizes</a></nav>'
    """
    headings = [found for part in parts if isinstance(part, str) and (found := _heading(part))]
    links = [f'<a href="#{_name(one)}">{html.escape(one)}</a>' for one in headings]
    return f"<nav>{' '.join(links)}</nav>"


def _heading(text: str) -> str:
    return text.removeprefix("### ") if text.startswith("### ") else ""


def _name(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower()).strip("-")


def _marked(escaped: str) -> str:
    strong = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", strong)

"""HTML pages that are one file: text, tables, and images inside of them."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

__all__ = ["image", "page", "table"]

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{heading}</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1020px;
         margin: 2rem auto; padding: 0 1rem; }}
  h1 {{ font-size: 1.5rem; }}
  h2 {{ font-size: 1.2rem; margin-top: 3rem; border-bottom: 1px solid #ccc; }}
  p, ul {{ max-width: 46rem; }}
  p.limits {{ color: #555; font-size: .92em; }}
  nav a {{ display: inline-block; margin-right: 1.2rem; }}
  img {{ max-width: 100%; display: block; margin: 2rem 0; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }}
  th, td {{ padding: .2rem .9rem; text-align: right; }}
  th:first-child, td:first-child {{ text-align: left; }}
  thead th {{ border-bottom: 1px solid #999; }}
  table.settings td {{ text-align: left; vertical-align: top; overflow-wrap: anywhere; }}
  div.wide {{ overflow-x: auto; }}
  div.wide img {{ max-width: max(100%, 52rem); }}
  table.numbers th, table.numbers td {{ padding: .2rem .6rem; white-space: nowrap; }}
  table.words th, table.words td {{ padding: .2rem .6rem; text-align: left; }}
  table.words td {{ vertical-align: top; }}
  table.words td:not(:last-child), table.words th {{ white-space: nowrap; }}
  table.words td:last-child {{ min-width: 15rem; overflow-wrap: anywhere; }}
  .numbers tr > :first-child, .words tr > :first-child {{
    position: sticky; left: 0; background: #fff; }}
  table.texts td {{ text-align: start; vertical-align: top; min-width: 9rem; white-space: pre-wrap;
                   overflow-wrap: anywhere; border-bottom: 1px solid #ddd; }}
  table.texts td:first-child {{ min-width: 0; white-space: normal; }}
  table.texts th {{ text-align: left; }}
  tr.mean td {{ border-top: 1px solid #ccc; border-bottom: 1px solid #999; font-weight: 600; }}
  .better {{ color: #006b4f; }}
  .worse {{ color: #b23a00; }}
</style>
<h1>{heading}</h1>
{body}
</html>
"""


def page(heading: str, body: str) -> str:
    """Return a page.

    Args:
      heading: its title, as text.
      body: what follows, as HTML.

    Example:
      >>> "<h1>a &lt; b</h1>" in page("a < b", "<p>...</p>")
      True
    """
    return _PAGE.format(heading=html.escape(heading), body=body)


_KINDS = {".png": "image/png", ".svg": "image/svg+xml"}


def image(path: Path, alt: str | None = None, narrow: Path | None = None) -> str:
    """Return an element that holds an image, PNG or SVG.

    Args:
      path: the file.
      alt: what it shows; its name by default.
      narrow: another file to show instead on a small screen.
    """
    shown = f'<img alt="{html.escape(alt or path.stem)}" src="{_data(path)}">'
    if narrow is None:
        return shown
    small = f'<source media="(max-width: 600px)" srcset="{_data(narrow)}">'
    return f"<picture>{small}{shown}</picture>"


def _data(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:{_KINDS[path.suffix]};base64,{data}"


def table(header: Sequence[object], rows: Sequence[Sequence[object]], css: str = "") -> str:
    """Return a table of cells, which are text.

    Args:
      header: names of the columns; none for a table without.
      rows: the cells.
      css: class of the table.

    Example:
      >>> table([], [["K", 8]])
      '<table class=""><tbody>\\n<tr><td>K</td><td>8</td></tr>\\n</tbody></table>'
    """

    def line(cells: Sequence[object], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    body = "\n".join(line(row, "td") for row in rows)
    return f'<table class="{css}">{head}<tbody>\n{body}\n</tbody></table>'

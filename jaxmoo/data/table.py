"""Aligned text tables, readable in a terminal and valid Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows as an aligned Markdown table.

    Args:
      header: the columns' names.
      rows: cells, formatted by ``str``; the first column is aligned left, the others right.

    Returns:
      The table, without a newline at its end.

    Example:
      >>> print(text_table(["language", "n"], [["en", 12], ["fa", 7]]))
      | language |  n |
      |:---------|---:|
      | en       | 12 |
      | fa       |  7 |
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(2, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]) + " |"

    first, *rest = widths
    rule = "|:" + "-" * (first + 1) + "|" + "".join("-" * (width + 1) + ":|" for width in rest)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])

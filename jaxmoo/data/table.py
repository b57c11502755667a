"""Text tables, readable in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from jaxmoo.runtime.watching import terminal_width

__all__ = ["plain_table", "text_table"]


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], width: float | None = None
) -> str:
    """Format rows as an aligned Markdown table, or as several if a terminal is too narrow for one.

    Args:
      header: the columns' names.
      rows: cells, formatted by ``str``; the first column is aligned left, the others right.
      width: the most characters of a line, as far as two columns fit; by default the terminal's if
        standard output is one. What is wider is divided into tables that begin with the same
        column.

    Returns:
      The table, without a newline at its end.

    Example:
      >>> print(text_table(["language", "n"], [["en", 12], ["fa", 7]]))
      | language |  n |
      |:---------|---:|
      | en       | 12 |
      | fa       |  7 |
      >>> print(text_table(["language", "n", "NLL"], [["en", 12, 2.5]], width=18))
      | language |  n |
      |:---------|---:|
      | en       | 12 |
      <BLANKLINE>
      | language | NLL |
      |:---------|----:|
      | en       | 2.5 |
    """
    width = terminal_width() if width is None else width
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    sizes = [max(map(len, column)) + 3 for column in zip(*cells, strict=True)]
    parts: list[list[int]] = [[]]
    for column in range(1, len(header)):
        taken = 1 + sizes[0] + sum(sizes[other] for other in parts[-1])
        if width is not None and parts[-1] and taken + sizes[column] > width:
            parts.append([])
        parts[-1].append(column)
    tables = [_table([[row[n] for n in (0, *part)] for row in cells]) for part in parts]
    return "\n\n".join(tables)


def _table(cells: Sequence[Sequence[str]]) -> str:
    table = tabulate(
        cells,
        tablefmt="pipe",
        colalign=["left", *["right"] * (len(cells[0]) - 1)],
        disable_numparse=True,
    )
    # Given as one more row, the header is no wider than its text; then it is below the rule.
    rule, names, *others = table.splitlines()
    return "\n".join([names, rule, *others])


def plain_table(rows: Sequence[Sequence[str]], alignment: Sequence[str]) -> str:
    """Format rows as columns without lines.

    Args:
      rows: cells, shown as they are.
      alignment: of every column, ``"left"`` or ``"right"``.

    Returns:
      The table, without white space at its lines' ends.

    Example:
      >>> print(plain_table([["weights", "1.5 GB"], ["AdamW", "12 GB"]], ("left", "right")))
      weights  1.5 GB
      AdamW     12 GB
    """
    table = tabulate(rows, tablefmt="plain", colalign=alignment, disable_numparse=True)
    return "\n".join(line.rstrip() for line in table.splitlines())

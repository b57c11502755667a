"""Text tables, readable in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

__all__ = ["plain_table", "text_table"]


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
    table = tabulate(
        [[str(cell) for cell in row] for row in (header, *rows)],
        tablefmt="pipe",
        colalign=["left", *["right"] * (len(header) - 1)],
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

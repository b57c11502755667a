"""Text tables, readable in a terminal and valid Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

__all__ = ["text_table"]


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

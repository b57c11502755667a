"""Blocks as a table for a person to read."""

from __future__ import annotations

from typing import Any

from jaxmoo.blocks.partition import Partition, partition
from jaxmoo.blocks.piece import Rule
from jaxmoo.sizes import format_size


def describe(
    blocks: Rule | Partition,
    tree: Any = None,
    *,
    stacked: str | None = None,
    max_rows: int = 40,
) -> str:
    """Return a table of blocks with their sizes, for a person to read.

    Args:
      blocks: a rule (then ``tree`` is needed) or a partition.
      tree: the parameter tree.
      stacked: see :func:`partition`.
      max_rows: rows shown; the middle is left out beyond that.

    Example:
      >>> import numpy as np
      >>> params = {"w": np.zeros((8, 4), np.float32), "b": np.zeros(4, np.float32)}
      >>> print(describe("leaf", params))
      block  pieces  parameters  bytes
      b           1           4   16 B
      w           1          32  128 B
      total       2          36  144 B
    """
    part = blocks if isinstance(blocks, Partition) else partition(blocks, tree, stacked=stacked)
    columns = (part.names, part.pieces, part.sizes, part.nbytes)
    rows = [(n, f"{p}", f"{s:,}", format_size(b)) for n, p, s, b in zip(*columns, strict=True)]
    if len(rows) > max_rows:
        half = max_rows // 2
        rows[half:-half] = [(f"... {len(rows) - 2 * half} more", "", "", "")]
    total = (f"{sum(part.pieces)}", f"{sum(part.sizes):,}", format_size(sum(part.nbytes)))
    rows = [("block", "pieces", "parameters", "bytes"), *rows, ("total", *total)]
    widths = [max(len(row[c]) for row in rows) for c in range(4)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if c == 0 else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )

"""What blocks are made of, and the form of a rule that makes them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Piece:
    """One array of the parameter tree, or one slice of an array along its leading axes.

    Attributes:
      leaf: index of the array in the flattened tree.
      path: dotted path; for a stacked array with the number of this slice's layer in it.
      size: number of elements.
      nbytes: size in bytes.
      part: which of the equal parts, where a rule cuts an array along its leading axis.
      parts: how many of them there are.
    """

    leaf: int
    path: str
    size: int
    nbytes: int
    part: int = 0
    parts: int = 1


def _one_part(path: str, shape: tuple[int, ...], itemsize: int) -> int:
    del path, shape, itemsize
    return 1


def _not_sparse(piece: Piece) -> bool:
    del piece
    return False


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A rule that cuts a parameter tree into blocks.

    Attributes:
      spec: how the rule is written, e.g. ``"bytes:25MiB"``.
      label: maps the pieces of a tree, in tree order, to one label each.
      parts: into how many equal parts along its leading axis an array of this path, shape (of one
        layer) and item size is first cut; a divisor of that axis.
      sparse: whether an objective may have no part in a piece. Of a block of such pieces, those
        whose gradient is exactly zero are absent: it is solved as if they were not there.
    """

    spec: str
    label: Callable[[Sequence[Piece]], Sequence[Hashable]]
    parts: Callable[[str, tuple[int, ...], int], int] = _one_part
    sparse: Callable[[Piece], bool] = _not_sparse


# What users may give wherever blocks are asked for: see :func:`jaxmoo.blocks.get`.
Rule = str | Blocks | Callable[[str], Hashable]


def path_string(path: tuple[Any, ...]) -> str:
    """Return a dotted path for a key path of :mod:`jax.tree_util`.

    Flax NNX states end every path in the variable's own attribute; it is left out.

    Example:
      >>> tree = {"layers": [{"kernel": 1.0}]}
      >>> [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
      ['layers.0.kernel']
    """
    parts = []
    for key in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
        else:
            parts.append(str(key))
    if isinstance(path[-1] if path else None, jax.tree_util.GetAttrKey) and len(parts) > 1:
        parts = parts[:-1] if parts[-1] in ("value", "raw_value") else parts
    return ".".join(parts)


def natural_key(path: str) -> list[Any]:
    """Sort key that orders ``layers.2`` before ``layers.10``."""
    return [(0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)|\.", path) if t]

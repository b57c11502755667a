"""Blocks of one concrete parameter tree."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from jaxmoo.blocks.piece import Blocks, Piece, Rule, natural_key, path_string
from jaxmoo.blocks.rules import get
from jaxmoo.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Partition:
    """Blocks of one concrete tree.

    Attributes:
      names: name of every block [B], in the order blocks are numbered.
      labels: per array of the flattened tree, the block number of each of its S equal sections;
        the array reshaped to ``[S, size / S]`` has one section per row.
      sizes: number of parameters per block [B].
      nbytes: bytes per block [B], in the parameters' dtype.
      pieces: number of pieces per block [B].
      sparse: per block [B], whether objectives whose gradient is exactly zero in it are absent.
    """

    names: tuple[str, ...]
    labels: tuple[np.ndarray, ...]
    sizes: tuple[int, ...]
    nbytes: tuple[int, ...]
    pieces: tuple[int, ...]
    sparse: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def partition(blocks: Rule, tree: Any, *, stacked: str | None = None) -> Partition:
    """Cut a parameter tree into blocks.

    Args:
      blocks: the rule; see :func:`get`.
      tree: pytree of arrays, or of anything with ``shape`` and ``dtype``.
      stacked: regular expression. Arrays whose path matches (``re.search``) stack the layers of a
        scanned model along their first axis. Its group ``(\\d+)``, where it has one, captures
        the number of the first layer stacked there: ``r"^layers\\.(\\d+)\\."`` says that
        ``layers.22.mlp.up_proj.kernel`` of shape ``[8, ...]`` holds layers 22 to 29. Without a
        group layers count from 0 and the number is put behind the match.

    Returns:
      The partition; blocks are numbered in the natural order of their names (``layers.2`` before
      ``layers.10``).

    Example:
      >>> params = {"layers": {"w": np.zeros((3, 2)), "b": np.zeros((3, 1))}, "head": np.zeros(4)}
      >>> partition("layer", params, stacked=r"^layers").names
      ('head', 'layers.0', 'layers.1', 'layers.2')
      >>> partition("layer", params).names
      ('head', 'layers')
    """
    rule = get(blocks)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ConfigError("There are no parameters to cut into blocks: the tree has no arrays.")
    pieces: list[Piece] = []
    for index, (path, array) in enumerate(leaves):
        pieces.extend(_pieces(index, path_string(path), array, stacked, rule))
    if stacked is not None and not any(re.search(stacked, path_string(p)) for p, _ in leaves):
        raise ConfigError(
            f"stacked={stacked!r} matches no parameter path; the first paths are "
            f"{', '.join(path_string(p) for p, _ in leaves[:3])}."
        )
    labels = list(rule.label(pieces))
    distinct = sorted(dict.fromkeys(labels), key=lambda label: natural_key(str(label)))
    order = {label: i for i, label in enumerate(distinct)}
    numbers = np.array([order[label] for label in labels])
    totals = np.zeros((3, len(order)), np.int64)
    sparse = np.ones(len(order), bool)
    for number, piece in zip(numbers, pieces, strict=True):
        totals[:, number] += (piece.size, piece.nbytes, 1)
        sparse[number] &= rule.sparse(piece)
    owner = np.array([piece.leaf for piece in pieces])
    return Partition(
        names=tuple(map(str, order)),
        labels=tuple(numbers[owner == i] for i in range(len(leaves))),
        sizes=tuple(map(int, totals[0])),
        nbytes=tuple(map(int, totals[1])),
        pieces=tuple(map(int, totals[2])),
        sparse=tuple(map(bool, sparse)),
    )


def _pieces(index: int, path: str, array: Any, stacked: str | None, rule: Blocks) -> list[Piece]:
    shape, itemsize = tuple(array.shape), np.dtype(array.dtype).itemsize
    match = re.search(stacked, path) if stacked is not None else None
    paths = [path]
    if match is not None:
        if not shape:
            raise ConfigError(
                f"{path} matches stacked={stacked!r} but is a scalar: it has no layer axis."
            )
        paths, shape = _layer_paths(path, match, shape[0]), shape[1:]
    parts = rule.parts(path, shape, itemsize)
    size = math.prod(shape) // parts
    return [
        Piece(index, name, size, size * itemsize, part, parts)
        for name in paths
        for part in range(parts)
    ]


def _layer_paths(path: str, match: re.Match[str], count: int) -> list[str]:
    """Paths of the layers stacked in one array, with each layer's own number."""
    if match.re.groups:
        first, (start, stop) = int(match[1]), match.span(1)
        return [f"{path[:start]}{first + i}{path[stop:]}" for i in range(count)]
    head, tail = path[: match.end()].rstrip("."), path[match.end() :].lstrip(".")
    return [".".join(filter(None, (head, str(i), tail))) for i in range(count)]

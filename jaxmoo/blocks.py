"""How a parameter tree is cut into blocks.

A *block* is a set of parameters whose per-objective gradients are resolved together: one Gram
matrix, one solve, one weight per objective. Coarser blocks see more of each objective, finer ones
resolve conflicts where they happen.

The unit a block is made of is a *piece*: one array of the tree or, for an array that stacks the
layers of a scanned model, one layer's slice of it. Every kind of block is a rule that gives each
piece a label; pieces with equal labels form a block.

========================  =====================================================================
``whole``                 one block: every parameter (the classical methods)
``layer``                 one per layer; what lies outside the layers by its top-level name
``module``                one per sub-module of a layer (attention, MLP, each norm)
``leaf``                  one per array of each layer
``bytes:25MiB``           consecutive pieces in backward order up to a size, as DDP and ZeRO fill
                          their buckets; larger arrays are cut
``random:32``             a random partition into 32 blocks of pieces: the control experiment
========================  =====================================================================
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmoo.errors import ConfigError, did_you_mean

__all__ = [
    "Blocks",
    "Partition",
    "Piece",
    "by",
    "describe",
    "get",
    "layer",
    "leaf",
    "module",
    "names",
    "of_bytes",
    "partition",
    "path_string",
    "random",
    "whole",
]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One array of the parameter tree, or one slice of an array along its leading axes.

    Attributes:
      leaf: index of the array in the flattened tree.
      path: dotted path; for a stacked array with the number of this slice's layer in it.
      size: number of elements.
      nbytes: size in bytes.
    """

    leaf: int
    path: str
    size: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A rule that cuts a parameter tree into blocks.

    Attributes:
      spec: how the rule is written, e.g. ``"bytes:25MiB"``.
      label: maps the pieces of a tree, in tree order, to one label each.
      max_piece_bytes: arrays whose pieces are larger are first cut into equal parts no larger
        than this, if set.
    """

    spec: str
    label: Callable[[Sequence[Piece]], Sequence[Hashable]]
    max_piece_bytes: int | None = None


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
    """

    names: tuple[str, ...]
    labels: tuple[np.ndarray, ...]
    sizes: tuple[int, ...]
    nbytes: tuple[int, ...]
    pieces: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)


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


# --- Kinds of blocks -------------------------------------------------------------------------

# A path component that numbers a layer: "3", or Flax Linen's "Dense_3".
_NUMBERED = re.compile(r"(?:.*_)?\d+")


def _layer_depth(parts: Sequence[str]) -> int:
    """Number of leading components that name the layer; 1 when there is no numbered component."""
    return next((i + 1 for i, part in enumerate(parts) if _NUMBERED.fullmatch(part)), 1)


def _layer_of(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[: _layer_depth(parts)])


def _module_of(path: str) -> str:
    parts = path.split(".")
    depth = min(_layer_depth(parts) + 1, max(len(parts) - 1, 1))
    return ".".join(parts[: max(depth, _layer_depth(parts))])


def _natural(path: str) -> list[Any]:
    """Sort key that orders ``layers.2`` before ``layers.10``."""
    return [(0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)|\.", path) if t]


def by(fn: Callable[[str], Hashable], spec: str = "by") -> Blocks:
    """Blocks named by a function of the dotted parameter path.

    Args:
      fn: maps a path such as ``"layers.3.mlp.up_proj.kernel"`` to a block name.
      spec: name of the rule in reports.

    Example:
      >>> params = {"a": np.zeros(3), "b": np.zeros(2), "head": np.zeros(1)}
      >>> partition(by(lambda path: "head" if path == "head" else "trunk"), params).names
      ('head', 'trunk')
    """
    return Blocks(spec, lambda pieces: [fn(piece.path) for piece in pieces])


def whole() -> Blocks:
    """One block that holds every parameter."""
    return by(lambda path: "whole", "whole")


def layer() -> Blocks:
    """One block per numbered layer; other parameters by the first component of their path."""
    return by(_layer_of, "layer")


def module() -> Blocks:
    """One block per sub-module of a layer, e.g. ``layers.3.self_attn``."""
    return by(_module_of, "module")


def leaf() -> Blocks:
    """One block per parameter array of each layer."""
    return by(lambda path: path, "leaf")


def of_bytes(limit: int | str) -> Blocks:
    """Consecutive pieces, in backward order, up to a size: the buckets of DDP and ZeRO.

    Backward order is the reverse of the paths' natural order (numbers compared as numbers), so
    the last layer comes first. An array larger than the limit is cut along its leading axis into
    equal parts.

    Args:
      limit: bytes per block, or a text such as ``"25MiB"`` (also KB, MB, GB, KiB, GiB).

    Example:
      >>> params = {"layers": [{"w": np.zeros(4, np.float32)} for _ in range(4)]}
      >>> partition(of_bytes(32), params).pieces
      (2, 2)
    """
    size = _parse_bytes(limit)

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        backward = sorted(range(len(pieces)), key=lambda i: (_natural(pieces[i].path), i))[::-1]
        labels: list[Hashable] = [0] * len(pieces)
        block, filled = 0, 0
        for i in backward:
            if filled and filled + pieces[i].nbytes > size:
                block, filled = block + 1, 0
            labels[i] = f"bucket {block}"
            filled += pieces[i].nbytes
        return labels

    return Blocks(f"bytes:{limit}", label, max_piece_bytes=size)


def random(num_blocks: int, seed: int = 0) -> Blocks:
    """A random partition into ``num_blocks`` blocks with equally many pieces (to within one).

    The control for every claim about *where* blocks are cut: same number of blocks, no structure.

    Args:
      num_blocks: how many blocks; at most the number of pieces.
      seed: which partition; the same seed gives the same one everywhere.
    """
    if num_blocks < 1:
        raise ConfigError(f"random blocks: expected at least 1 block, found {num_blocks}.")

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        if num_blocks > len(pieces):
            raise ConfigError(
                f"random:{num_blocks} asks for more blocks than there are pieces "
                f"({len(pieces)}). Ask for at most {len(pieces)}."
            )
        order = np.random.default_rng(seed).permutation(len(pieces))
        labels = np.empty(len(pieces), int)
        labels[order] = np.arange(len(pieces)) % num_blocks
        return [f"random {i}" for i in labels]

    return Blocks(f"random:{num_blocks}" + (f":{seed}" if seed else ""), label)


_PLAIN = {"whole": whole, "layer": layer, "module": module, "leaf": leaf}
_FORMS = (*_PLAIN, "bytes:SIZE", "random:N")


def names() -> tuple[str, ...]:
    """Return the forms that :func:`get` understands."""
    return _FORMS


def get(spec: str | Blocks | Callable[[str], Hashable]) -> Blocks:
    """Return blocks from their written form, a function of the path, or :class:`Blocks`.

    Args:
      spec: ``"whole"``, ``"layer"``, ``"module"``, ``"leaf"``, ``"bytes:25MiB"``,
        ``"random:32"`` or ``"random:32:SEED"``; or a function path -> name.

    Raises:
      ConfigError: the form is unknown or its number cannot be read.

    Example:
      >>> get("bytes:25MiB").max_piece_bytes
      26214400
      >>> get("layers")
      Traceback (most recent call last):
      ...
      jaxmoo.errors.ConfigError: Unknown blocks 'layers'. Did you mean 'layer'? Expected one of
      whole, layer, module, leaf, bytes:SIZE, random:N, or a function from path to name.
    """
    if isinstance(spec, Blocks):
        return spec
    if callable(spec):
        return by(spec)
    kind, _, rest = str(spec).partition(":")
    if kind in _PLAIN and not rest:
        return _PLAIN[kind]()
    if kind == "bytes" and rest:
        return of_bytes(rest)
    if kind == "random" and re.fullmatch(r"\d+(:\d+)?", rest):
        return random(*map(int, rest.split(":")))
    raise ConfigError(
        f"Unknown blocks {spec!r}.{did_you_mean(kind, [*_PLAIN, 'bytes', 'random'])} Expected one "
        f"of {', '.join(_FORMS)}, or a function from path to name."
    )


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMG", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def _parse_bytes(text: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", str(text).strip())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(
            f"bytes:{text}: expected a positive size such as 25MiB, 100MB or 1048576."
        )
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


# --- Partitions ------------------------------------------------------------------------------


def partition(
    blocks: str | Blocks | Callable[[str], Hashable], tree: Any, *, stacked: str | None = None
) -> Partition:
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
        pieces.extend(_pieces(index, path_string(path), array, stacked, rule.max_piece_bytes))
    if stacked is not None and not any(re.search(stacked, path_string(p)) for p, _ in leaves):
        raise ConfigError(
            f"stacked={stacked!r} matches no parameter path; the first paths are "
            f"{', '.join(path_string(p) for p, _ in leaves[:3])}."
        )
    labels = list(rule.label(pieces))
    distinct = sorted(dict.fromkeys(labels), key=lambda label: _natural(str(label)))
    order = {label: i for i, label in enumerate(distinct)}
    numbers = np.array([order[label] for label in labels])
    totals = np.zeros((3, len(order)), np.int64)
    for number, piece in zip(numbers, pieces, strict=True):
        totals[:, number] += (piece.size, piece.nbytes, 1)
    owner = np.array([piece.leaf for piece in pieces])
    return Partition(
        names=tuple(map(str, order)),
        labels=tuple(numbers[owner == i] for i in range(len(leaves))),
        sizes=tuple(map(int, totals[0])),
        nbytes=tuple(map(int, totals[1])),
        pieces=tuple(map(int, totals[2])),
    )


def _pieces(
    index: int, path: str, array: Any, stacked: str | None, max_bytes: int | None
) -> list[Piece]:
    shape, itemsize = tuple(array.shape), np.dtype(array.dtype).itemsize
    match = re.search(stacked, path) if stacked is not None else None
    paths, rest = [path], shape
    if match is not None:
        if not shape:
            raise ConfigError(
                f"{path} matches stacked={stacked!r} but is a scalar: it has no layer axis."
            )
        paths, rest = _layer_paths(path, match, shape[0]), shape[1:]
    size = math.prod(rest)
    cuts = 1
    if max_bytes is not None and rest and size * itemsize > max_bytes:
        wanted = math.ceil(size * itemsize / max_bytes)
        cuts = next((d for d in range(min(wanted, rest[0]), rest[0]) if rest[0] % d == 0), rest[0])
    part = size // cuts
    suffixes = [""] if cuts == 1 else [f"[{i}/{cuts}]" for i in range(cuts)]
    return [Piece(index, p + s, part, part * itemsize) for p in paths for s in suffixes]


def _layer_paths(path: str, match: re.Match[str], count: int) -> list[str]:
    """Paths of the layers stacked in one array, with each layer's own number."""
    if match.re.groups:
        first, (start, stop) = int(match[1]), match.span(1)
        return [f"{path[:start]}{first + i}{path[stop:]}" for i in range(count)]
    head, tail = path[: match.end()].rstrip("."), path[match.end() :].lstrip(".")
    return [".".join(filter(None, (head, str(i), tail))) for i in range(count)]


def describe(
    blocks: str | Blocks | Callable[[str], Hashable] | Partition,
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
      >>> print(describe("leaf", {"w": np.zeros((8, 4), np.float32), "b": np.zeros(4, np.float32)}))
      block  pieces  parameters  bytes
      b           1           4   16 B
      w           1          32  128 B
      total       2          36  144 B
    """
    part = blocks if isinstance(blocks, Partition) else partition(blocks, tree, stacked=stacked)
    columns = (part.names, part.pieces, part.sizes, part.nbytes)
    rows = [(n, f"{p}", f"{s:,}", _format_bytes(b)) for n, p, s, b in zip(*columns, strict=True)]
    if len(rows) > max_rows:
        half = max_rows // 2
        rows[half:-half] = [(f"... {len(rows) - 2 * half} more", "", "", "")]
    total = (f"{sum(part.pieces)}", f"{sum(part.sizes):,}", _format_bytes(sum(part.nbytes)))
    rows = [("block", "pieces", "parameters", "bytes"), *rows, ("total", *total)]
    widths = [max(len(row[c]) for row in rows) for c in range(4)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if c == 0 else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _format_bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.1f} {' KMGT'[power]}iB"

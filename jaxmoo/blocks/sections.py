"""Sections: equal parts of an array's leading axis, each of which lies in one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Section",
    "alike",
    "cut",
    "join",
    "of_sections",
    "section_key",
    "section_place",
    "section_uniform",
    "sum_by_block",
    "uniform_sections",
]

# Numbers up to which sums by block go over all sections, block by block.
_FEW = 2**20
_JOINED = 2**20  # entries up to which arrays are joined


class Section(NamedTuple):
    """Per-objective gradients of one array, or of one device's piece of it, cut into sections.

    A section lies in one block. K objectives, S sections.
    """

    values: jax.Array  # [K, S, ...]
    labels: Any  # int [S]: the block each section belongs to
    # (key, labels' block numbers [S]) -> uniform numbers [S, ...] for coordinate-wise rules
    uniform: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    # 0 where another device holds the same values and counts them, else 1
    counted: jax.Array | float = 1.0
    places: Any = None  # int [S]: numbers that no other section of any array has, where asked for


def cut(x: jax.Array, count: int) -> jax.Array:
    """View [K, *shape] as [K, S, ...]; sections are equal parts of the leading axis."""
    if count == 1:
        return x[:, None]
    if x.ndim > 1 and x.shape[1] == count:
        return x
    return x.reshape(x.shape[0], count, -1)


def alike(arrays: Sequence[jax.Array]) -> list[list[int]]:
    """Find small arrays [K, S, ...] with sections of one size, to be joined.

    What is done to every array by itself is also compiled for every array by itself. A large array
    is not worth the copy.

    Returns:
      Numbers of arrays, a list for those to be joined.

    Example:
      >>> alike([jnp.ones((2, 1, 3)), jnp.ones((2, 1, 4)), jnp.ones((2, 5, 3))])
      [[0, 2], [1]]
    """
    found: list[list[int]] = []
    last: dict[Any, tuple[list[int], int]] = {}
    for number, x in enumerate(arrays):
        kind = (math.prod(x.shape[2:]), x.dtype)
        group, entries = last.get(kind, ([], _JOINED))
        if entries + x.size > _JOINED:
            group, entries = [], 0
            found.append(group)
        group.append(number)
        last[kind] = (group, entries + x.size)
    return found


def join(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays [K, S, ...] with sections of one size as one array [K, sum of S, size]."""
    if len(arrays) == 1:
        return arrays[0]
    # Section by section in memory, as batches of products are laid out.
    rows = [x.reshape(*x.shape[:2], -1).swapaxes(0, 1) for x in arrays]
    return jnp.concatenate(rows).swapaxes(0, 1)


@jax.named_scope("gram")
def sum_by_block(
    parts: Sequence[jax.Array], labels: Sequence[jax.Array], num_blocks: int
) -> jax.Array:
    """Sums [B, ...] of sections' quantities [S, P, ...] by the block each lies in, int [S]."""
    if num_blocks > 1 and sum(x.size for x in parts) * num_blocks > _FEW:
        parts = [x.sum(1, keepdims=True) for x in parts]
    every = jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in parts])
    if num_blocks == 1:
        return every.sum(0, keepdims=True)
    pairs = zip(parts, labels, strict=True)
    block = jnp.concatenate([jnp.repeat(n, x.shape[1]) for x, n in pairs])
    if every.size * num_blocks > _FEW:
        return jax.ops.segment_sum(every, block, num_blocks)
    # A scatter is slow on GPUs. What lies in other blocks is selected away: it may not be finite.
    mine = block == jnp.arange(num_blocks)[:, None]
    mine = mine.reshape(*mine.shape, *(1,) * (every.ndim - 1))
    return jnp.where(mine, every, 0).sum(1)


def of_sections(x: jax.Array, labels: jax.Array) -> jax.Array:
    """Quantities [S, ...] of the blocks [B, ...] that sections lie in."""
    return jnp.broadcast_to(x, (len(labels), *x.shape[1:])) if len(x) == 1 else x[labels]


def uniform_sections(
    index: int, shape: Sequence[int], count: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make the source of random numbers of one whole array.

    Args:
      index: number of the array; sections of one block draw independently.
      shape: the array's shape.
      count: S, sections.

    Returns:
      ``(key, block numbers [S]) -> float32 [S, size / S]``.
    """
    size = math.prod(shape) // count

    def uniform(key: jax.Array, numbers: jax.Array) -> jax.Array:
        return jax.vmap(lambda place, number: section_uniform(key, place, number, (size,)))(
            section_place(index, np.arange(count)), numbers
        )

    return uniform


def section_place(index: int, section: Any) -> Any:
    """Number that no other section of any array has."""
    return index * 65_536 + section


def section_key(key: jax.Array, place: Any, number: Any) -> jax.Array:
    """PRNG key of one section, from the step's key, its place and its block."""
    return jax.random.fold_in(jax.random.fold_in(key, place), number)


def section_uniform(key: jax.Array, place: Any, number: Any, shape: tuple[int, ...]) -> jax.Array:
    """Uniform random numbers of one section; see :func:`section_key`."""
    return jax.random.uniform(section_key(key, place, number), shape, jnp.float32)

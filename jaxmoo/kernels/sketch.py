"""Linear sketches of gradients: short vectors whose inner products estimate the gradients'.

An array of n entries is cut into rows of m / 2. Every column has a random sign; every row has a
random sign, a random offset by which it is rolled, and a random one of two sums to which it is
added. What is left has m entries, and of it

- the inner product of two gradients' sketches is, on average, that of the gradients, with a
  variance of about (|x|^2 |y|^2 + (x y)^2) / m, and never more than 6 |x|^2 |y|^2 / m;
- sketches add up as the gradients do: over arrays with draws of their own, over devices, over
  examples;
- one pass over the gradients makes it, without products and without a random number per entry.

This is a count sketch whose hash functions are the same along a row up to a shift. Within a row no
two entries meet. No entry is in both sums: what these have in common is as random as what is wrong
with the inner products, and tells its size. They are the even and the odd entries of the sketch.

TPUs cannot roll by any offset without copying. There whole rows of a matrix are folded as they lie,
with a random sign for every entry, and only what is left is rolled: also right on average, but
entries of one column meet each other. Where few columns hold most of a gradient, the variance is
larger, and has no bound.

References:
  Charikar, Chen and Farach-Colton, *Finding frequent items in data streams*, 2002; Weinberger et
  al., *Feature hashing for large scale multitask learning*,
  `arXiv:0902.2206 <https://arxiv.org/abs/0902.2206>`_.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from jaxmoo.dtypes import at_least_float32
from jaxmoo.platforms import like_tpu

__all__ = ["sketch_sections"]


class Draws(NamedTuple):
    """What is random in the sketches of one array's sections; R rows of h entries."""

    columns: jax.Array  # float32 [S, h]: signs
    rows: jax.Array  # float32 [S, R]: signs
    offsets: jax.Array  # int32 [S, R], below h
    sums: jax.Array  # int32 [S, R]: 0 or 1


def draws(
    keys: jax.Array, lengths: Sequence[int], sections: Sequence[int], size: int
) -> list[Draws]:
    """Draw what sketches need, for several arrays at once.

    Args:
      keys: PRNG keys of all sections of all arrays, one array's after another's.
      lengths: entries of a section, per array.
      sections: S, per array.
      size: h, entries of a row.
    """
    most = max(-(-n // size) for n in lengths)
    words = -(-size // 32)

    def of_section(pair: jax.Array) -> jax.Array:  # the same numbers however many there are
        count = jnp.arange(max(most, words), dtype=jnp.uint32)
        return threefry_2x32(pair, jnp.concatenate([count, jnp.zeros_like(count)])).reshape(2, -1)

    pairs = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    signs, rows = jnp.moveaxis(jax.vmap(of_section)(pairs), 1, 0)
    signs = signs[:, :words, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    columns = 1 - 2 * signs.reshape(len(keys), -1)[:, :size].astype(jnp.float32)
    row_signs = 1 - 2 * (rows >> 31).astype(jnp.float32)
    sums = (rows >> 30 & 1).astype(jnp.int32)
    offsets = ((rows & 0x3FFFFFFF) % size).astype(jnp.int32)
    found, first = [], 0
    for n, count in zip(lengths, sections, strict=True):
        here, rows_here = slice(first, first + count), -(-n // size)
        of_rows = (x[here, :rows_here] for x in (row_signs, offsets, sums))
        found.append(Draws(columns[here], *of_rows))
        first += count
    return found


@jax.named_scope("sketch")
def sketch_sections(
    arrays: Sequence[jax.Array], keys: jax.Array, size: int, *, platform: str | None = None
) -> list[jax.Array]:
    """Sketch every section of every objective's gradients; the objectives share the draws.

    Args:
      arrays: per-objective gradients, each [K, S, ...].
      keys: PRNG keys of all sections, one array's after another's.
      size: m, entries of a sketch; the last of an odd number is 0.
      platform: the kind of devices on which the gradients lie; see :mod:`jaxmoo.platforms`. By
        default it is decided when the program is lowered.

    Returns:
      [K, S, m] of each array, float32, or float64 of float64 gradients. An entry that is not finite
      makes one of its sketch's not finite.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 1, 100_000))
      >>> (z,) = sketch_sections([x], jax.random.split(jax.random.key(1), 1), 4096)
      >>> z.shape
      (2, 1, 4096)
      >>> bool(abs((z[0] * z[0]).sum() / (x[0] * x[0]).sum() - 1) < 0.05)
      True
    """
    sections = [x.shape[1] for x in arrays]
    if like_tpu(platform):
        ends = np.cumsum([0, *sections])
        words = jax.vmap(lambda key: jax.random.bits(key, (3,), jnp.uint32))(keys)
        bounds = itertools.pairwise(ends)
        return [
            _folded(x, words[first:last], size)
            for x, (first, last) in zip(arrays, bounds, strict=True)
        ]
    arrays = [x.reshape(*x.shape[:2], -1) for x in arrays]
    lengths = [x.shape[2] for x in arrays]
    drawn = draws(keys, lengths, sections, size // 2)

    def each(
        sketch: Callable[[jax.Array, Draws], jax.Array], arrays: Any, drawn: Any
    ) -> list[jax.Array]:
        return [sketch(x, mine) for x, mine in zip(arrays, drawn, strict=True)]

    row_by_row, at_once = (functools.partial(each, f) for f in (_row_by_row, _at_once))
    if platform is None:
        found = jax.lax.platform_dependent(arrays, drawn, cpu=row_by_row, default=at_once)
    else:
        found = (row_by_row if platform == "cpu" else at_once)(arrays, drawn)
    return [_as_one(x, size) for x in found]


def _as_one(sums: jax.Array, size: int) -> jax.Array:
    """Two sums [K, S, 2, h] as the even and the odd entries of a sketch [K, S, m]."""
    x = jnp.swapaxes(sums, 2, 3)
    x = x.reshape(*x.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2])))


def _row_by_row(x: jax.Array, draws: Draws) -> jax.Array:
    """Add one row after the other to what stays in a core's cache: [K, S, 2, h]."""
    k, sections, n = x.shape
    size = draws.columns.shape[1]
    wide = at_least_float32(x.dtype)
    full = n // size

    def of_section(s: jax.Array, mine: Draws) -> jax.Array:
        def piece(start: jax.Array | int, length: int) -> jax.Array:
            begin = (jnp.zeros_like(s), s, jnp.asarray(start, s.dtype))
            return jax.lax.dynamic_slice(x, begin, (k, 1, length))[:, 0]

        def add(total: jax.Array, row: jax.Array, r: jax.Array | int) -> jax.Array:
            sign = (mine.columns * mine.rows[r]).astype(wide)
            start = 2 * size * mine.sums[r] + mine.offsets[r]
            here = jax.lax.dynamic_slice_in_dim(total, start, size, 1)
            row = here + row.astype(wide) * sign
            return jax.lax.dynamic_update_slice_in_dim(total, row, start, 1)

        def one(r: jax.Array, total: jax.Array) -> jax.Array:
            return add(total, piece(r * size, size), r)

        total = jnp.zeros((k, 4 * size), wide)
        if full:
            total = jax.lax.fori_loop(0, full, one, total)
        if n % size:
            last = piece(full * size, n % size)
            total = add(total, jnp.pad(last, ((0, 0), (0, -n % size))), full)
        return total.reshape(k, 2, 2, size).sum(2)

    found = jax.lax.map(lambda xs: of_section(*xs), (jnp.arange(sections), draws))
    return jnp.moveaxis(found, 0, 1)


def _at_once(x: jax.Array, draws: Draws) -> jax.Array:
    """As sums over rows, of entries taken from where they were rolled from: [K, S, 2, h]."""
    k, sections, n = x.shape
    size, wide = draws.columns.shape[1], at_least_float32(x.dtype)
    rows = jnp.pad(x, ((0, 0), (0, 0), (0, -n % size))).reshape(k, sections, -1, size)
    origin = (jnp.arange(size) - draws.offsets[..., None]) % size  # [S, R, h]
    rolled = jnp.take_along_axis(rows, origin[None], axis=3, mode="promise_in_bounds")
    columns = jnp.take_along_axis(draws.columns[:, None], origin, axis=2, mode="promise_in_bounds")
    signed = rolled.astype(wide) * (columns * draws.rows[..., None]).astype(wide)
    # Selected, not multiplied: what is not finite must not reach the other sum.
    of_rows = [jnp.where((draws.sums == i)[..., None], signed, 0).sum(2) for i in range(2)]
    return jnp.stack(of_rows, 2)


def _folded(x: jax.Array, words: jax.Array, size: int) -> jax.Array:
    """Add up groups of rows of matrices, as they lie, with random signs [K, S, h, ...]."""
    k, sections = x.shape[:2]
    width = math.prod(x.shape[3:])
    if x.ndim < 4 or width > size // 2:  # a vector; or rows that are too long
        x = x.reshape(k, sections, -1)
        width = min(size // 2, x.shape[2])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % width)))
    x = x.reshape(k, sections, -1, width)
    group = min(x.shape[2] + x.shape[2] % 2, size // width)
    group -= group % (8 if group > 8 else 2)  # as many as registers hold
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % group), (0, 0)))
    x = x.reshape(k, sections, -1, group, width)
    signs = jax.vmap(functools.partial(_signs, shape=x.shape[2:]))(words)
    wide = at_least_float32(x.dtype)
    folded = (x.astype(wide) * signs.astype(wide)).sum(2)
    # Even rows of a group, and odd ones: entries of a column meet each other in both alike.
    sums = jnp.moveaxis(folded.reshape(k, sections, -1, 2, width), 3, 2)
    found = _as_one(sums.reshape(k, sections, 2, -1), size)
    # Arrays are heavy in the same channels, which must not meet at every step.
    offsets = (words[:, 2] % (size - size % 2)).astype(jnp.int32)
    even = found[..., : size - size % 2]
    rolled = jax.vmap(lambda x, by: jnp.roll(x, by, 1), (1, 0), 1)(even, offsets)
    return jnp.pad(rolled, ((0, 0), (0, 0), (0, size % 2)))


def _signs(pair: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A random sign for every entry, by its number and two random words; MurmurHash3's mixing."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    h = (place ^ pair[0]) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13) ^ pair[1]) * jnp.uint32(0xC2B2AE35)
    return 1 - 2 * ((h ^ (h >> 16)) >> 31).astype(jnp.float32)

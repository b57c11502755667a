"""Linear sketches of gradients: short vectors whose inner products estimate the gradients'.

An array of n entries is cut into rows of m. Every column has a random sign; every row has a random
sign and a random offset by which it is rolled; the rows are added up. What is left has m entries,
and of it

- the inner product of two gradients' sketches is, on average, that of the gradients, with a
  variance of about (|x|^2 |y|^2 + (x y)^2) / m, and never more than 6 |x|^2 |y|^2 / m;
- sketches add up as the gradients do: over arrays with draws of their own, over devices, over
  examples;
- one pass over the gradients makes it, without products and without a random number per entry.

This is a count sketch whose hash functions are the same along a row up to a shift. Within a row no
two entries meet.

References:
  Charikar, Chen and Farach-Colton, *Finding frequent items in data streams*, 2002; Weinberger et
  al., *Feature hashing for large scale multitask learning*,
  `arXiv:0902.2206 <https://arxiv.org/abs/0902.2206>`_.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.dtypes import at_least_float32

__all__ = ["sketch_sections"]


class _Draws(NamedTuple):
    """What is random in the sketch of one section; R rows."""

    columns: jax.Array  # float32 [m]: signs
    rows: jax.Array  # float32 [R]: signs
    offsets: jax.Array  # int32 [R], below m


def _draw(key: jax.Array, rows: int, size: int) -> _Draws:
    words = -(-size // 32)
    bits = jax.random.bits(key, (words + rows,), jnp.uint32)
    columns = (bits[:words, None] >> jnp.arange(32, dtype=jnp.uint32)).reshape(-1)[:size] & 1
    row = bits[words:]
    return _Draws(
        columns=1 - 2 * columns.astype(jnp.float32),
        rows=1 - 2 * (row >> 31).astype(jnp.float32),
        offsets=((row & 0x7FFFFFFF) % size).astype(jnp.int32),
    )


@jax.named_scope("sketch")
def sketch_sections(
    x: jax.Array, keys: jax.Array, size: int, *, platform: str | None = None
) -> jax.Array:
    """Sketch every section of every objective's gradients; the objectives share the draws.

    Args:
      x: per-objective gradients [K, S, ...].
      keys: PRNG keys [S], one per section.
      size: m, entries of a sketch.
      platform: the kind of devices on which the gradients lie; see :mod:`jaxmoo.platforms`. By
        default it is decided when the program is lowered.

    Returns:
      [K, S, m], float32, or float64 of float64 gradients. An entry that is not finite makes one of
      its sketch's not finite.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 1, 100_000))
      >>> z = sketch_sections(x, jax.random.split(jax.random.key(1), 1), 4096)
      >>> z.shape
      (2, 1, 4096)
      >>> bool(abs((z[0] * z[0]).sum() / (x[0] * x[0]).sum() - 1) < 0.05)
      True
    """
    k, sections = x.shape[:2]
    x = x.reshape(k, sections, -1)
    rows = -(-x.shape[2] // size)
    draws = jax.vmap(lambda key: _draw(key, rows, size))(keys)
    if platform == "cpu":
        return _row_by_row(x, draws)
    if platform is not None:
        return _at_once(x, draws)
    return jax.lax.platform_dependent(x, draws, cpu=_row_by_row, default=_at_once)


def _row_by_row(x: jax.Array, draws: _Draws) -> jax.Array:
    """Add one row after the other to what stays in a core's cache."""
    k, sections, n = x.shape
    size = draws.columns.shape[1]
    wide = at_least_float32(x.dtype)
    full = n // size

    def of_section(s: jax.Array, mine: _Draws) -> jax.Array:
        def add(total: jax.Array, row: jax.Array, r: jax.Array | int) -> jax.Array:
            sign = (mine.columns * mine.rows[r]).astype(wide)
            here = jax.lax.dynamic_slice(total, (0, mine.offsets[r]), (k, size))
            row = here + row.astype(wide) * sign
            return jax.lax.dynamic_update_slice(total, row, (0, mine.offsets[r]))

        def one(r: jax.Array, total: jax.Array) -> jax.Array:
            return add(total, jax.lax.dynamic_slice(x, (0, s, r * size), (k, 1, size))[:, 0], r)

        total = jnp.zeros((k, 2 * size), wide)
        if full:
            total = jax.lax.fori_loop(0, full, one, total)
        if n % size:
            last = jax.lax.dynamic_slice(x, (0, s, full * size), (k, 1, n % size))[:, 0]
            total = add(total, jnp.pad(last, ((0, 0), (0, -n % size))), full)
        return total[:, :size] + total[:, size:]

    found = jax.lax.map(lambda xs: of_section(*xs), (jnp.arange(sections), draws))
    return jnp.moveaxis(found, 0, 1)


def _at_once(x: jax.Array, draws: _Draws) -> jax.Array:
    """As one sum over rows, of entries that are taken from where they were rolled from."""
    k, sections, n = x.shape
    size, wide = draws.columns.shape[1], at_least_float32(x.dtype)
    rows = jnp.pad(x, ((0, 0), (0, 0), (0, -n % size))).reshape(k, sections, -1, size)
    origin = (jnp.arange(size) - draws.offsets[..., None]) % size  # [S, R, m]
    rolled = jnp.take_along_axis(rows, origin[None], axis=3, mode="promise_in_bounds")
    columns = jnp.take_along_axis(
        draws.columns[:, None], origin, axis=2, mode="promise_in_bounds"
    )
    signs = columns * draws.rows[..., None]
    return (rolled.astype(wide) * signs.astype(wide)).sum(2)

"""The two passes over per-objective gradients: Gram matrices and weighted sums.

Everything a Gram-based aggregator reads is K x K; these two functions are all that touches the
gradients themselves, so they are written to run at memory bandwidth and without copies.

Arrays have shape ``[K, S, n]``: K objectives, S sections (each belongs to one block), n elements.

Two forms of each exist because XLA needs them. On one device the passes read the array once, in
pieces that stay in cache. Arrays that the compiler partitions over several devices must instead
be contracted as a whole: slicing along a partitioned axis would make it gather the array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["section_cross_grams", "section_grams", "weighted_sum"]

# Entries of one slice of the Gram reduction, K rows of float32: it stays in a core's cache. Slices
# much narrower than that would cost more to start than to multiply.
_ENTRIES = 16_384
_FEWEST_COLUMNS = 512


def section_grams(x: jax.Array, *, partitioned: bool | None = None) -> jax.Array:
    """Gram matrix of every section, accumulated in float32.

    Args:
      x: per-objective gradients [K, S, ...].
      partitioned: whether the compiler partitions ``x`` over several devices. By default, whether
        there are several.

    Returns:
      Gram matrices [S, K, K], float32. A non-finite row makes its own row and column non-finite.

    Example:
      >>> section_grams(jnp.array([[[1.0, 2.0]], [[0.0, 3.0]]]))
      Array([[[5., 6.],
              [6., 9.]]], dtype=float32)
    """
    if partitioned is None:
        partitioned = jax.device_count() > 1
    if partitioned:
        return section_cross_grams(x, x)
    return jax.lax.platform_dependent(
        x, cpu=_gram_by_slices, default=lambda x: section_cross_grams(x, x)
    )


def section_cross_grams(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products between the gradients of two batches, per section, accumulated in float32.

    Args:
      x: per-objective gradients [K, S, ...] of one batch.
      y: those of another.

    Returns:
      float32 [S, K, K], entry [s, i, j] the product of ``x[i, s]`` and ``y[j, s]``.

    Example:
      >>> section_cross_grams(jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0, 4.0]]]))
      Array([[[11.]]], dtype=float32)
    """
    contracted = tuple(range(2, x.ndim))
    return jax.lax.dot_general(
        x,
        y,
        ((contracted, contracted), ((1,), (1,))),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _gram_by_slices(x: jax.Array) -> jax.Array:
    # XLA's CPU backend copies the operands of a wide, flat product; short slices avoid both the
    # copy and the trip to memory.
    k, s = x.shape[:2]
    dtype, x = x.dtype, x.reshape(k, s, -1)
    if dtype.itemsize == 2:
        # As integers, or the backend converts the whole array to float32 before the loop. It
        # still makes one copy, in 16 bits.
        x = jax.lax.bitcast_convert_type(x, jnp.uint16)
    columns = max(_FEWEST_COLUMNS, _ENTRIES // k)
    full, rest = divmod(x.shape[2], columns)

    def product(section: jax.Array, start: jax.Array | int, width: int) -> jax.Array:
        rows = jax.lax.dynamic_slice(x, (0, section, start), (k, 1, width))[:, 0]
        if dtype.itemsize == 2:
            rows = jax.lax.bitcast_convert_type(rows, dtype)
        rows = rows.astype(jnp.float32)
        return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)

    def gram(section: jax.Array) -> jax.Array:
        total = product(section, full * columns, rest)
        if not full:
            return total
        return jax.lax.fori_loop(
            0, full, lambda i, acc: acc + product(section, i * columns, columns), total
        )

    return jax.lax.map(gram, jnp.arange(s))


def weighted_sum(x: jax.Array, weights: jax.Array, *, partitioned: bool | None = None) -> jax.Array:
    """Combine the objectives of every section.

    An objective of weight 0 does not enter at all, so its values may be non-finite.

    Args:
      x: per-objective gradients [K, S, ...].
      weights: float32 [S, K].
      partitioned: as in :func:`section_grams`.

    Returns:
      Sums [S, ...] in the dtype of ``x``, accumulated in float32.

    Example:
      >>> x = jnp.array([[[1.0, 2.0]], [[jnp.nan, 3.0]]])
      >>> weighted_sum(x, jnp.array([[0.5, 0.0]]))
      Array([[0.5, 1. ]], dtype=float32)
    """
    if partitioned is None:
        partitioned = jax.device_count() > 1
    columns = weights.T.reshape(*weights.T.shape, *(1,) * (x.ndim - 2))  # [K, S, 1, ...]
    if partitioned:
        kept = jnp.where(columns != 0, x, 0)
        total = jax.lax.dot_general(
            weights,
            kept,
            (((1,), (0,)), ((0,), (1,))),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return total.astype(x.dtype)
    # One fused elementwise pass: every row is read once and nothing is copied.
    total = jnp.zeros(x.shape[1:], jnp.float32)
    for row, column in zip(x, columns, strict=True):
        total += jnp.where(column != 0, column * row.astype(jnp.float32), 0)
    return total.astype(x.dtype)

"""The two passes over per-objective gradients: Gram matrices and weighted sums.

Everything a Gram-based aggregator reads is K x K; these two functions are all that touches the
gradients themselves, so they are written to run at memory bandwidth and without copies.

Arrays have shape ``[K, S, n]``: K objectives, S sections (each belongs to one block), n elements.

Two forms of each exist because XLA needs them. On one device the passes read the array once, in
pieces that stay in cache. Arrays that the compiler partitions over several devices must instead
be contracted as a whole: slicing along a partitioned axis would make it gather the array.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmoo.cpu_grams import cross_grams, grams_by_slices

__all__ = ["cross_grams", "section_grams", "weighted_sum"]


def section_grams(
    arrays: Sequence[jax.Array], *, partitioned: bool | None = None
) -> list[jax.Array]:
    """Gram matrix of every section, accumulated in float32, or float64 for float64 gradients.

    Args:
      arrays: per-objective gradients, each [K, S, ...]. Given all at once they share the cores of
        a CPU.
      partitioned: whether the compiler partitions the arrays over several devices. By default,
        whether there are several.

    Returns:
      Gram matrices [S, K, K] of each array, float32 or float64. A non-finite row makes its own row
      and column non-finite.

    Example:
      >>> section_grams([jnp.array([[[1.0, 2.0]], [[0.0, 3.0]]])])
      [Array([[[5., 6.],
              [6., 9.]]], dtype=float32)]
    """

    def whole(arrays: list[jax.Array]) -> list[jax.Array]:
        return [cross_grams(x, x) for x in arrays]

    if partitioned is None:
        partitioned = jax.device_count() > 1
    if partitioned:
        return whole(list(arrays))
    return jax.lax.platform_dependent(list(arrays), cpu=grams_by_slices, default=whole)


def weighted_sum(x: jax.Array, weights: jax.Array, *, partitioned: bool | None = None) -> jax.Array:
    """Combine the objectives of every section.

    An objective of weight 0 does not enter at all, so its values may be non-finite.

    Args:
      x: per-objective gradients [K, S, ...].
      weights: [S, K].
      partitioned: as in :func:`section_grams`.

    Returns:
      Sums [S, ...] in the dtype of ``x``, accumulated in float32, or float64 where that is it.

    Example:
      >>> x = jnp.array([[[1.0, 2.0]], [[jnp.nan, 3.0]]])
      >>> weighted_sum(x, jnp.array([[0.5, 0.0]]))
      Array([[0.5, 1. ]], dtype=float32)
    """
    if partitioned is None:
        partitioned = jax.device_count() > 1
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = weights.astype(wide)
    columns = weights.T.reshape(*weights.T.shape, *(1,) * (x.ndim - 2))  # [K, S, 1, ...]
    if partitioned:
        kept = jnp.where(columns != 0, x, 0)
        total = jax.lax.dot_general(
            weights,
            kept,
            (((1,), (0,)), ((0,), (1,))),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=wide,
        )
        return total.astype(x.dtype)
    # One fused elementwise pass: every row is read once and nothing is copied.
    total = jnp.zeros(x.shape[1:], wide)
    for row, column in zip(x, columns, strict=True):
        total += jnp.where(column != 0, column * row.astype(wide), 0)
    return total.astype(x.dtype)

"""Weighted sums on XLA's CPU backend, in a form that is compiled quickly.

One elementwise pass over K rows reads each once, but where arrays are many the backend computes it
anew, K rows and all, in every kernel that uses the result, and takes long to compile each of them.
It never makes a product a part of another kernel. A product needs a copy of the rows, without those
that do not enter: one piece at a time, which stays in cache.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.dtypes import at_least_float32
from jaxmoo.sharding import varying

__all__ = ["sum_in_pieces"]

_AT_A_TIME = 2**20  # entries that are copied


def sum_in_pieces(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Combine the objectives of every section.

    Args:
      x: per-objective gradients [K, S, ...].
      weights: [S, K]; what is multiplied by 0 does not enter.

    Returns:
      Sums [S, ...] in the dtype of ``x``.

    Example:
      >>> sum_in_pieces(jnp.array([[[1.0, 2.0]], [[jnp.nan, 3.0]]]), jnp.array([[0.5, 0.0]]))
      Array([[0.5, 1. ]], dtype=float32)
    """
    wide = at_least_float32(x.dtype)
    weights = weights.astype(wide)
    enters = (weights != 0)[..., None]
    flat = x.reshape(*x.shape[:2], -1)

    def combine(x: jax.Array) -> jax.Array:
        rows = jnp.where(enters, x.swapaxes(0, 1).astype(wide), 0)  # [S, K, columns]
        along = (((1,), (1,)), ((0,), (0,)))
        return lax.dot_general(weights, rows, along, lax.Precision.HIGHEST).astype(x.dtype)

    if x.size <= _AT_A_TIME:
        return combine(flat).reshape(x.shape[1:])
    k, sections, n = flat.shape
    columns = min(n, max(128, _AT_A_TIME // (k * sections)))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        start = jnp.minimum(i * columns, n - columns)  # the last piece may overlap the one before
        piece = lax.dynamic_slice_in_dim(flat, start, columns, 2)
        return lax.dynamic_update_slice_in_dim(total, combine(piece), start, 1)

    first = varying(jnp.zeros((sections, n), x.dtype), x, weights)
    return lax.fori_loop(0, math.ceil(n / columns), add, first).reshape(x.shape[1:])

"""The contraction that the passes over gradients stand for, as any compiler takes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.dtypes import at_least_float32

__all__ = ["cross_grams"]


def cross_grams(x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of the rows of two arrays of gradients, per section, in one contraction.

    Args:
      x: [K, S, ...].
      y: [K, S, ...].

    Returns:
      [S, K, K], float32 or, of float64 gradients, float64.

    Example:
      >>> cross_grams(jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0, 4.0]]]))
      Array([[[11.]]], dtype=float32)
    """
    contracted = tuple(range(2, x.ndim))
    return lax.dot_general(
        x,
        y,
        ((contracted, contracted), ((1,), (1,))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=at_least_float32(jnp.result_type(x, y)),
    )

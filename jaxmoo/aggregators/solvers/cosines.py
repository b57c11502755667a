"""Cosines and norms of gradients, from their Gram matrix.

What decides how hard a problem is: in the cosines no row is small, however unequal the gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.kernels.linear import diagonal, dot, identity, matvec


class Equilibrated(NamedTuple):
    """A Gram matrix split into cosines and norms."""

    cosine: jax.Array  # [K, K] unit diagonal, zero between active and inactive
    norm: jax.Array  # [K] gradient norms; 1 where inactive


def equilibrate(gram: jax.Array, active: jax.Array) -> Equilibrated:
    """Split a Gram matrix into the cosines between gradients and their norms.

    Args:
      gram: ``[K, K]`` with a positive diagonal on active rows and zeros elsewhere.
      active: ``[K]`` bool.

    Returns:
      Cosines and norms; an inactive row becomes a unit gradient orthogonal to all others.

    Example:
      >>> import jax.numpy as jnp
      >>> cosine, norm = equilibrate(jnp.array([[4.0, 0.0], [0.0, 0.0]]), jnp.array([True, False]))
      >>> cosine.tolist(), norm.tolist()
      ([[1.0, 0.0], [0.0, 1.0]], [2.0, 1.0])
    """
    norm = jnp.sqrt(jnp.where(active, diagonal(gram), 1.0))
    cosine = gram / norm[:, None] / norm[None, :]
    units = identity(gram.shape[-1], bool)
    # Rounding leaves cosines a little above 1, which would make C indefinite.
    return Equilibrated(jnp.where(units, 1.0, jnp.clip(cosine, -1.0, 1.0)), norm)


def mean_norm(gram: jax.Array, preference: jax.Array) -> jax.Array:
    """Norm of the mean gradient ``J^T p``.

    Args:
      gram: ``[K, K]``.
      preference: ``[K]``.

    Returns:
      The norm, a scalar.
    """
    return jnp.sqrt(jnp.maximum(dot(preference, matvec(gram, preference)), 0.0))

"""One projected step of weights kept on the simplex, for methods that track their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from optax import projections

from jaxmoo.kernels.linear import matvec


def start(num_objectives: int) -> jax.Array:
    """Equal weights.

    Args:
      num_objectives: K.

    Returns:
      ``[K]``, each ``1/K``.
    """
    return jnp.full(num_objectives, 1.0 / num_objectives)


def restrict(weights: jax.Array, active: jax.Array) -> jax.Array:
    """Weights of the objectives at hand, summing to one.

    Args:
      weights: ``[K]``, non-negative.
      active: ``[K]`` bool.

    Returns:
      ``[K]``, zero on inactive rows; equal weights when no active objective has any.
    """
    here = jnp.where(active, weights, 0.0)
    total = jnp.sum(here)
    equal = active / jnp.maximum(jnp.sum(active), 1)
    return jnp.where(total > 0, here / jnp.where(total > 0, total, 1.0), equal)


def relative(gram: jax.Array) -> jax.Array:
    """The (cross-)Gram matrix divided by its largest entry, which step sizes then refer to.

    Args:
      gram: ``[K, K]``.

    Returns:
      ``[K, K]`` with a largest absolute entry of 1, or zeros.
    """
    largest = jnp.max(jnp.abs(gram))
    return gram / jnp.where(largest > 0, largest, 1.0)


def project(weights: jax.Array, active: jax.Array) -> jax.Array:
    """Nearest point of the simplex over the active objectives.

    Args:
      weights: ``[K]``.
      active: ``[K]`` bool.

    Returns:
      ``[K]``, non-negative, summing to 1, zero on inactive rows.

    Example:
      >>> import jax.numpy as jnp
      >>> w = project(jnp.array([0.8, 0.6, 5.0]), jnp.array([True, True, False]))
      >>> [round(float(x), 4) for x in w]
      [0.6, 0.4, 0.0]
    """
    # Far below any active weight, so the projection sets it to zero.
    low = jnp.min(jnp.where(active, weights, jnp.inf)) - 2.0
    low = jnp.where(jnp.any(active), low, 0.0)
    return projections.projection_simplex(jnp.where(active, weights, low))


def merge(weights: jax.Array, new: jax.Array, active: jax.Array) -> jax.Array:
    """Put new weights of the objectives at hand back among all.

    Args:
      weights: ``[K]`` on the simplex.
      new: ``[K]`` on the simplex over active.
      active: ``[K]`` bool; the others keep their weight.

    Returns:
      ``[K]`` on the simplex.
    """
    mass = jnp.sum(jnp.where(active, weights, 0.0))
    return jnp.where(active, new * mass, weights)


def tracked_weights(gamma: float | jax.Array, rho: float | jax.Array) -> Callable[..., Any]:
    """The rule of MoCo and MoDo: one projected gradient step on the weights per step.

    Args:
      gamma: step size.
      rho: regularisation towards equal weights.

    Returns:
      The ``weigh`` of an aggregator whose state is the weights ``[K]``.
    """

    def weigh(gram, active, preference, state, key):
        gain = preference * jnp.sum(active)
        weights = restrict(state, active)
        slope = gain * matvec(relative(gram), gain * weights) + rho * weights
        weights = project(weights - gamma * slope, active)
        state = merge(state, weights, active)
        return restrict(gain * weights, active), state

    return weigh

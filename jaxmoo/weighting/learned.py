"""Weights learned by descent together with the model, which two papers arrive at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmoo.parameters import check_number
from jaxmoo.weighting.weighting import Weighting, present, unit_mean


class LearnedState(NamedTuple):
    """State of :func:`~jaxmoo.weighting.uw` and :func:`~jaxmoo.weighting.imtl_l`."""

    logs: jax.Array  # [K] logarithms of the weights
    optimizer: Any


def learned(name: str, learning_rate: float, normalise: bool) -> Weighting:
    """Weights ``exp(s)`` for the s at which ``sum_k exp(s_k) L_k - s_k`` is least, by Adam.

    Args:
      name: the weighting's name, for messages.
      learning_rate: Adam's, at least 0.
      normalise: whether to scale the weights to mean 1.

    Returns:
      The weighting.

    Raises:
      ConfigError: if the learning rate is out of range.
    """
    check_number(name, "learning_rate", learning_rate, low=0)
    adam = optax.adam(learning_rate)
    scale: Callable[..., jax.Array] = unit_mean if normalise else _masked

    def init(num_objectives):
        logs = jnp.zeros(num_objectives, jnp.float32)
        return LearnedState(logs, adam.init(logs))

    def update(losses, state, active=None):
        losses, active = present(losses, active)
        slope = jnp.where(active, jnp.exp(state.logs) * losses - 1.0, 0.0)
        step, optimizer = adam.update(slope, state.optimizer, state.logs)
        logs = jnp.where(active, state.logs + step, state.logs)
        return scale(jnp.exp(logs), active), LearnedState(logs, optimizer)

    return Weighting(init, update)


def _masked(weights: jax.Array, active: jax.Array) -> jax.Array:
    return jnp.where(active, weights, 0.0)

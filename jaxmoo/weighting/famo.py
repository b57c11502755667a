"""FAMO: all losses fall at the same relative rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmoo.parameters import check_number
from jaxmoo.weighting.weighting import Weighting, present, register, unit_mean

_SMALL = 1e-8


class FamoState(NamedTuple):
    """State of :func:`famo`."""

    logits: jax.Array  # [K]
    previous: jax.Array  # [K] last loss of every objective
    seen: jax.Array  # [K] bool: whether there is one
    optimizer: Any


@register
def famo(
    learning_rate: float = 0.025, *, gamma: float = 1e-3, lower_bound: float = 0.0
) -> Weighting:
    """Fast adaptive multitask optimisation.

    With ``z = softmax(logits)`` the weights are proportional to ``z_k / (L_k - lower_bound)``, so
    that the step descends ``sum_k z_k log L_k``; after it, Adam moves the logits towards the
    objectives whose log-loss fell least.

    Departures: the effect of a step is read off the next call's losses (another batch) and not
    off the same batch evaluated twice, which would cost a second forward pass. Weights have mean
    1 and not sum 1.

    Args:
      learning_rate: Adam's learning rate of the logits.
      gamma: decay of the logits, added to their gradient.
      lower_bound: a value all losses stay above.

    Returns:
      The weighting. It keeps K logits with Adam's state and the last losses.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Liu et al., *FAMO: Fast Adaptive Multitask Optimization*, NeurIPS 2023,
      `arXiv:2306.03792 <https://arxiv.org/abs/2306.03792>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> weighting = famo()
      >>> weights, state = weighting.update(jnp.array([1.0, 3.0]), weighting.init(2))
      >>> weights.tolist()
      [1.5, 0.5]
      >>> weights, state = weighting.update(jnp.array([1.0, 1.0]), state)
      >>> bool(weights[0] > weights[1])  # the first did not improve
      True
    """
    check_number("famo", "learning_rate", learning_rate, low=0)
    check_number("famo", "gamma", gamma, low=0)
    check_number("famo", "lower_bound", lower_bound)
    adam = optax.chain(optax.add_decayed_weights(gamma), optax.adam(learning_rate))

    def init(num_objectives):
        logits = jnp.zeros(num_objectives, jnp.float32)
        return FamoState(
            logits=logits,
            previous=jnp.ones(num_objectives, jnp.float32),
            seen=jnp.zeros(num_objectives, bool),
            optimizer=adam.init(logits),
        )

    def update(losses, state, active=None):
        losses, active = present(losses, active)
        height = jnp.maximum(losses - lower_bound, _SMALL)
        compared = active & state.seen
        fall = jnp.where(compared, jnp.log(state.previous) - jnp.log(height), 0.0)
        _, pull = jax.vjp(jax.nn.softmax, state.logits)
        step, optimizer = adam.update(pull(fall)[0], state.optimizer, state.logits)
        # Nothing is known about the first step's effect.
        known = jnp.any(compared)
        logits = jnp.where(known, state.logits + step, state.logits)
        optimizer = jax.tree.map(
            lambda new, old: jnp.where(known, new, old), optimizer, state.optimizer
        )
        weights = unit_mean(jax.nn.softmax(logits) / height, active)
        previous = jnp.where(active, height, state.previous)
        return weights, FamoState(logits, previous, state.seen | active, optimizer)

    return Weighting(init, update)

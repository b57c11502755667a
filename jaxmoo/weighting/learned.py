"""Weights learned by descent together with the model: uncertainty weighting and IMTL-L."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmoo.aggregators.parameters import check_number
from jaxmoo.weighting.base import Weighting, present, unit_mean


class LearnedState(NamedTuple):
    """State of :func:`uw` and :func:`imtl_l`."""

    logs: jax.Array  # [K] logarithms of the weights
    optimizer: Any


def uw(learning_rate: float = 0.01, *, normalise: bool = True) -> Weighting:
    """Uncertainty weighting.

    Adam minimises ``sum_k L_k exp(-s_k) + s_k`` over the log-variances s; the weights are
    ``exp(-s_k)`` and tend to ``1 / L_k``.

    Departures: the paper trains s with the model's optimiser, here it has its own; weights are
    scaled to mean 1, so that the learning rate carries over, unless ``normalise`` is False.

    Args:
      learning_rate: Adam's learning rate of s.
      normalise: whether to scale the weights to mean 1.

    Returns:
      The weighting. It keeps K numbers with Adam's state.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Kendall, Gal and Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
      Geometry and Semantics*, CVPR 2018, `arXiv:1705.07115 <https://arxiv.org/abs/1705.07115>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> weighting = uw()
      >>> state = weighting.init(2)
      >>> for _ in range(400):
      ...     weights, state = weighting.update(jnp.array([1.0, 3.0]), state)
      >>> [round(float(w), 2) for w in weights]
      [1.5, 0.5]
    """
    # In logs = -s the objective is exp(logs) L - logs, which is IMTL-L's.
    return _learned("uw", learning_rate, normalise)


def imtl_l(learning_rate: float = 0.01, *, normalise: bool = True) -> Weighting:
    """Impartial multi-task learning, loss balance.

    Adam minimises ``sum_k exp(s_k) L_k - s_k``; the weights are ``exp(s_k)``, under which all
    weighted losses tend to 1.

    Departures: the paper trains s with the model's optimiser, here it has its own; weights are
    scaled to mean 1, so that the learning rate carries over, unless ``normalise`` is False.

    Args:
      learning_rate: Adam's learning rate of s.
      normalise: whether to scale the weights to mean 1.

    Returns:
      The weighting. It keeps K numbers with Adam's state.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021,
      `OpenReview <https://openreview.net/forum?id=IMPnRXEWpvr>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> weighting = imtl_l(normalise=False)
      >>> state = weighting.init(2)
      >>> for _ in range(400):
      ...     weights, state = weighting.update(jnp.array([1.0, 2.0]), state)
      >>> [round(float(w), 2) for w in weights]
      [1.0, 0.5]
    """
    return _learned("imtl_l", learning_rate, normalise)


def _learned(name: str, learning_rate: float, normalise: bool) -> Weighting:
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

"""What a loss weighting is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.registry import Registry


class Weighting(NamedTuple):
    """Weights of the objectives' *losses*, as a pair of pure functions.

    Attributes:
      init: ``num_objectives -> state``.
      update: ``(losses [K], state, active=None) -> (weights [K] float32, state)``. ``active`` is
        ``[K]`` bool, False for an objective absent from this step; a non-finite loss counts as
        absent. An absent objective gets weight 0 and leaves the state as it is.
    """

    init: Callable[[int], Any]
    update: Callable[..., tuple[jax.Array, Any]]


_registry = Registry("weighting", Weighting)
register = _registry.register


def names() -> tuple[str, ...]:
    """Names of all weightings.

    Returns:
      The names :func:`get` takes.

    Example:
      >>> "famo" in names()
      True
    """
    return _registry.names


def get(name: str | Weighting, **options: Any) -> Weighting:
    """A weighting by name.

    Args:
      name: one of :func:`names`, or a weighting, which is returned as it is.
      **options: parameters of its factory.

    Returns:
      The weighting.

    Raises:
      ConfigError: if the name or an option is unknown, or an option is out of range.

    Example:
      >>> get("fano")
      Traceback (most recent call last):
      jaxmoo.errors.ConfigError: Unknown weighting 'fano'. Did you mean 'famo'? ...
    """
    return _registry.get(name, **options)


def present(losses: jax.Array, active: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Losses in float32 with a harmless value where absent, and which are present.

    Args:
      losses: ``[K]``.
      active: ``[K]`` bool or None.

    Returns:
      ``(losses [K] float32, active [K] bool)``.
    """
    losses = jax.lax.stop_gradient(jnp.asarray(losses, jnp.float32))
    finite = jnp.isfinite(losses)
    active = finite if active is None else finite & active
    return jnp.where(active, losses, 1.0), active


def unit_mean(weights: jax.Array, active: jax.Array) -> jax.Array:
    """Scale weights to a mean of 1 over the objectives present.

    Args:
      weights: ``[K]``, non-negative.
      active: ``[K]`` bool.

    Returns:
      ``[K]``, 0 where absent.

    Example:
      >>> import jax.numpy as jnp
      >>> unit_mean(jnp.array([1.0, 3.0, 7.0]), jnp.array([True, True, False])).tolist()
      [0.5, 1.5, 0.0]
    """
    weights = jnp.where(active, weights, 0.0)
    total = jnp.sum(weights)
    return weights * jnp.sum(active) / jnp.where(total > 0, total, 1.0)


def initial_weights(weighting: Weighting, num_objectives: int) -> jax.Array:
    """Weights of a step before which no losses are known: those for equal losses.

    Args:
      weighting: the weighting.
      num_objectives: K.

    Returns:
      ``[K]`` float32.

    Example:
      >>> from jaxmoo.weighting import static
      >>> initial_weights(static([1.0, 3.0]), 2).tolist()
      [0.5, 1.5]
    """
    return weighting.update(jnp.ones(num_objectives), weighting.init(num_objectives))[0]

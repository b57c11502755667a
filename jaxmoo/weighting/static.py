"""Weights that do not depend on the losses."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxmoo.errors import ConfigError
from jaxmoo.parameters import check_number
from jaxmoo.weighting.weighting import Weighting, present, register, unit_mean


@register
def static(weights: Sequence[float]) -> Weighting:
    """Fixed weights, scaled to a mean of 1 over the objectives present.

    Args:
      weights: K numbers, at least 0 and not all 0.

    Returns:
      The weighting; it keeps no state.

    Raises:
      ConfigError: if the weights are not as described.

    Example:
      >>> import jax.numpy as jnp
      >>> weighting = static([1.0, 3.0])
      >>> weighting.update(jnp.array([2.0, 2.0]), weighting.init(2))[0].tolist()
      [0.5, 1.5]
    """
    return _fixed("static", weights)


@register
def temperature(sizes: Sequence[float], temperature: float = 1.0) -> Weighting:
    """Weights by data size, flattened by a temperature.

    ``w_k`` proportional to ``n_k^(1/T)``: what sampling languages in that proportion would give in
    expectation. ``T = 1`` is proportional to the data, a large T equal.

    Args:
      sizes: size of every objective's data, at least 0 and not all 0.
      temperature: T, positive.

    Returns:
      The weighting; it keeps no state.

    Raises:
      ConfigError: if a number is out of range.

    References:
      Arivazhagan et al., *Massively Multilingual Neural Machine Translation in the Wild*,
      `arXiv:1907.05019 <https://arxiv.org/abs/1907.05019>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> weighting = temperature([100, 900], temperature=2.0)
      >>> weighting.update(jnp.ones(2), ())[0].tolist()
      [0.5, 1.5]
    """
    check_number("temperature", "temperature", temperature, low=0, open_low=True)
    given = np.asarray(sizes, np.float64)
    top = given.max(initial=0.0)
    return _fixed("temperature", given / top if top > 0 else given, power=1 / float(temperature))


def _fixed(name: str, weights: Sequence[float] | np.ndarray, power: float = 1.0) -> Weighting:
    given = np.asarray(weights, np.float64)
    if given.ndim != 1 or not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
        raise ConfigError(
            f"{name}: expected numbers >= 0, one per objective and not all 0, found {weights!r}."
        )
    fixed = np.where(given > 0, given**power, 0.0)

    def init(num_objectives):
        if num_objectives != given.size:
            raise ConfigError(
                f"{name}: {given.size} weights were given for {num_objectives} objectives."
            )
        return ()

    def update(losses, state, active=None):
        _, active = present(losses, active)
        return unit_mean(jnp.asarray(fixed, jnp.float32), active), state

    return Weighting(init, update)

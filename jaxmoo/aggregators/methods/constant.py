"""Fixed weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.errors import ConfigError


@register
def constant(weights: Sequence[float]) -> Aggregator:
    """Weighted sum of the gradients with given weights (linear scalarisation).

    ``w`` as given. When objectives are absent the others take over their weight in proportion, so
    the total stays the same; preferences multiply the weights and leave the total as it is.

    Keeps: degree 1 in the gradients; blocks make no difference. K equal gradients g give g if the
    weights sum to 1. Does not keep non-conflict.

    Args:
      weights: K numbers, at least 0 and not all 0.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if they are not.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> aggregate(constant([0.25, 0.75]), jnp.array([[2.0, 0.0], [0.0, 4.0]])).tolist()
      [0.5, 3.0]
    """
    given = np.asarray(weights, np.float64)
    if given.ndim != 1 or not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
        raise ConfigError(
            f"constant: expected weights >= 0, one per objective and not all 0, found {weights!r}."
        )
    total = float(given.sum())

    def weigh(gram, active, preference, state, key):
        return total * preference, state

    return Aggregator(
        "constant",
        weigh,
        reads_gram=False,
        unit_scale=False,
        importance=tuple(map(float, given)),
    )

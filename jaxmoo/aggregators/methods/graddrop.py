"""GradDrop: per coordinate, keep only the gradients of one sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.errors import ConfigError
from jaxmoo.parameters import check_choice, check_number


@register
def graddrop(
    leak: float | Sequence[float] | jax.Array = 0.0, *, reduction: Literal["mean", "sum"] = "mean"
) -> Aggregator:
    """Gradient sign dropout.

    At every coordinate the positive sign wins with probability
    ``P = (1 + sum_i p_i g_i / sum_i p_i |g_i|) / 2``, and the gradients of the losing sign are
    multiplied by ``leak``; ``d = sum_i p_i (kept g_i)``.

    Acts on coordinates: it is no function of the Gram matrix, and needs nothing but the rows of
    any piece of the gradients.

    Keeps: degree 1 in the gradients; permutation equivariance in distribution; in expectation
    every coordinate has the sign of the mean. Promises no non-conflict.

    Departures: published code sums; ``reduction="sum"`` is that. The paper multiplies activations'
    gradients by the input's sign; here, as in all code for parameters, it does not. Preferences
    weight the gradients.

    Args:
      leak: share of a dropped gradient that passes, from 0 to 1; one number, or one per objective
        ``[K]``. May be traced.
      reduction: ``"mean"``, or ``"sum"`` for the published scale.

    Returns:
      The aggregator. It needs a key.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Chen et al., *Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout*,
      NeurIPS 2020, `arXiv:2010.06808 <https://arxiv.org/abs/2010.06808>`_.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> aggregate(graddrop(), jnp.array([[2.0, 2.0], [4.0, 0.0]]), key=jax.random.key(0)).tolist()
      [3.0, 1.0]
    """
    shares: Any = [leak] if np.ndim(leak) == 0 else leak
    for share in shares:
        check_number("graddrop", "leak", share, low=0, high=1)
    check_choice("graddrop", "reduction", reduction, ("mean", "sum"))

    def combine(jacobian, active, preference, uniform):
        passes = jnp.asarray(leak, jacobian.dtype)
        if passes.shape not in ((), active.shape):
            raise ConfigError(
                f"graddrop: expected a leak for each of the {len(active)} objectives, or one for "
                f"all; found an array of shape {passes.shape}."
            )
        passes = jnp.broadcast_to(passes, active.shape)[:, None]
        pulls = preference[:, None] * jacobian
        total = jnp.sum(jnp.abs(pulls), axis=0)
        purity = jnp.sum(pulls, axis=0) / jnp.where(total > 0, total, 1.0)
        positive = uniform < (1 + purity) / 2
        kept = jnp.where(positive, pulls > 0, pulls < 0)
        return jnp.sum(jnp.where(kept, pulls, passes * pulls), axis=0)

    def weigh(gram, active, preference, state, key):
        return preference, state

    return Aggregator(
        "graddrop", weigh, combine=combine, stochastic=True, summed=reduction == "sum"
    )

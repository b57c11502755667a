"""DWA: more weight where a loss falls more slowly."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.parameters import check_number
from jaxmoo.weighting.weighting import Weighting, present, register, unit_mean


class DwaState(NamedTuple):
    """State of :func:`dwa`."""

    step: jax.Array  # int32 []
    total: jax.Array  # [K] sum of the losses of the current period
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # [K] losses in it
    last: jax.Array  # [K] mean loss of the period before; NaN when there is none
    earlier: jax.Array  # [K] mean loss of the period before that


@register
def dwa(temperature: float = 2.0, *, period: int = 1) -> Weighting:
    """Dynamic weight average.

    Weights ``K softmax(r / T)`` with ``r_k = L_k(t-1) / L_k(t-2)``, the ratio of the objective's
    mean losses over the last two periods; 1 until there are two.

    Args:
      temperature: T, positive; larger is more even.
      period: calls to average over. The paper's period is an epoch; single steps are noisy.

    Returns:
      The weighting. It keeps 4 K numbers.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Liu, Johns and Davison, *End-to-End Multi-Task Learning with Attention*, CVPR 2019,
      `arXiv:1803.10704 <https://arxiv.org/abs/1803.10704>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> weighting = dwa(temperature=2.0)
      >>> state = weighting.init(2)
      >>> for losses in ([2.0, 2.0], [1.0, 2.0], [1.0, 2.0]):
      ...     weights, state = weighting.update(jnp.array(losses), state)
      >>> [round(float(w), 3) for w in weights]  # softmax([0.5, 1] / 2) * 2
      [0.876, 1.124]
    """
    check_number("dwa", "temperature", temperature, low=0, open_low=True)
    check_number("dwa", "period", period, low=1, whole=True)

    def init(num_objectives):
        zeros = jnp.zeros(num_objectives, jnp.float32)
        none = jnp.full(num_objectives, jnp.nan, jnp.float32)
        return DwaState(jnp.zeros((), jnp.int32), zeros, zeros, none, none)

    def update(losses, state, active=None):
        losses, active = present(losses, active)
        ratio = state.last / state.earlier
        ratio = jnp.where(jnp.isfinite(ratio), ratio, 1.0)
        weights = unit_mean(jax.nn.softmax(ratio / temperature), active)

        total = state.total + jnp.where(active, losses, 0.0)
        count = state.count + active
        step = state.step + 1
        ends = step % period == 0
        # An objective absent for a whole period keeps the means it has.
        moves = ends & (count > 0)
        mean = total / jnp.maximum(count, 1)
        return weights, DwaState(
            step=step,
            total=jnp.where(ends, 0.0, total),
            count=jnp.where(ends, 0.0, count),
            last=jnp.where(moves, mean, state.last),
            earlier=jnp.where(moves, state.last, state.earlier),
        )

    return Weighting(init, update)

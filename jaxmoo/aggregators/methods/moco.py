"""MoCo: tracked gradients and tracked weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import simplex_step
from jaxmoo.dtypes import at_least_float32
from jaxmoo.parameters import check_number


@register
def moco(*, gamma: float | jax.Array = 0.1, rho: float | jax.Array = 0.0) -> Aggregator:
    """Multi-objective gradient correction: its weights.

    MoCo keeps a running estimate Y of every objective's gradient and moves the weights by one
    projected gradient step per step: ``w <- P(w - gamma (Y Y^T + rho I) w)``, update ``Y^T w``,
    ``P`` the projection on the simplex. This aggregator keeps the weights. **It needs the tracked
    gradients**: put :func:`track_gradients` before the resolver,

        optax.chain(track_gradients(num_objectives=K), resolve_conflicts("moco", ...), ...)

    which costs K copies of the parameters in memory. Without it the method is a stochastic MGDA
    with tracked weights.

    Keeps: degree 1 in the gradients; permutation equivariance (with the state permuted). Converges
    to MGDA's weights while the gradients stay the same. Promises no non-conflict at any one step.

    Departures: gamma and rho are relative to the block's largest squared gradient norm, so that the
    method does not depend on the gradients' scale; gamma does not fall by itself (schedule it). The
    authors' code scales every gradient to its loss and uses a softmax for the projection.
    Preferences, which the paper does not have, weight the losses: the steps see ``p_i g_i``.

    Args:
      gamma: step size of the weights, at least 0. May be traced.
      rho: regularisation towards equal weights, at least 0. May be traced.

    Returns:
      The aggregator. It keeps K weights per block.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Fernando et al., *Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent
      Approach*, ICLR 2023, `OpenReview <https://openreview.net/forum?id=dLAYGdKTi2>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import gram, weigh_block
      >>> G = gram(jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> method, state = moco(gamma=0.5), None
      >>> for _ in range(30):
      ...     w, state = weigh_block(method, G, state=state)
      >>> [round(float(x), 3) for x in w]  # mgda's
      [0.6, 0.4]
    """
    check_number("moco", "gamma", gamma, low=0)
    check_number("moco", "rho", rho, low=0)

    return Aggregator("moco", simplex_step.tracked_weights(gamma, rho), init=simplex_step.start)


class TrackGradientsState(NamedTuple):
    """State of :func:`track_gradients`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # int32 []: updates
    tracked: Any  # the running estimates: a tree of [K, ...] arrays


def track_gradients(
    num_objectives: int, *, beta: float | jax.Array = 0.5, decay: float | jax.Array = 0.5
) -> optax.GradientTransformation:
    """Running estimate of every objective's gradient, MoCo's variance reduction.

    ``Y <- Y - beta_t (Y - J)`` with ``beta_t = beta / t^decay``, for stacked gradients J whose
    arrays carry a leading objective axis ``[K, ...]``. Place it before ``resolve_conflicts``. It
    keeps K copies of the parameters.

    Departures from the paper: Y starts at the first gradients and not at zero.

    Args:
      num_objectives: K.
      beta: weight of a new gradient, from 0 to 1. May be traced.
      decay: power of the step by which beta falls, at least 0. May be traced.

    Returns:
      An ``optax.GradientTransformation`` from stacked gradients to stacked gradients.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      As for :func:`moco`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = track_gradients(2, beta=0.5, decay=0.0)
      >>> state = tx.init({"w": jnp.zeros(1)})
      >>> for g in (4.0, 0.0):
      ...     updates, state = tx.update({"w": jnp.full((2, 1), g)}, state)
      >>> updates["w"].tolist()
      [[2.0], [2.0]]
    """
    check_number("track_gradients", "num_objectives", num_objectives, low=1, whole=True)
    check_number("track_gradients", "beta", beta, low=0, high=1)
    check_number("track_gradients", "decay", decay, low=0)

    def init(params):
        stacked = jax.tree.map(lambda p: jnp.zeros((num_objectives, *p.shape), p.dtype), params)
        return TrackGradientsState(jnp.zeros((), jnp.int32), stacked)

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        rate = jnp.where(count == 1, 1.0, beta / count.astype(float) ** decay)

        def track(old, new):
            wide = at_least_float32(old.dtype)
            step = rate.astype(wide) * (new.astype(wide) - old.astype(wide))
            # One bad batch must not stay in the estimate for ever.
            return jnp.where(jnp.isfinite(step), old + step, old).astype(old.dtype)

        tracked = jax.tree.map(track, state.tracked, updates)
        return tracked, TrackGradientsState(count, tracked)

    return optax.GradientTransformation(init, update)

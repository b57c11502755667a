"""CR-MOGM: weights smoothed over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmoo.aggregators.aggregator import Aggregator, get, register
from jaxmoo.errors import ConfigError
from jaxmoo.parameters import check_number


class CrMogmState(NamedTuple):
    """State of one block."""

    inner: Any  # state of the smoothed method
    average: jax.Array  # [K] running mean of the weights, started at 0 unless weights are given
    remaining: jax.Array  # [K] weight of that 0 in the mean, as in Adam's debiasing
    total: jax.Array  # [] running mean of the weights' sum
    total_remaining: jax.Array  # [] likewise


@register
def cr_mogm(
    aggregator: str | Aggregator = "mgda",
    *,
    momentum: float | jax.Array = 0.9,
    initial: Sequence[float] | None = None,
) -> Aggregator:
    """Correlation-reduced stochastic multi-objective gradients: smooth any method's weights.

    ``w_t = momentum * w_(t-1) + (1 - momentum) * w(G_t)``: weights computed from one batch and
    applied to the same batch are correlated with its noise, which biases the update; a running
    mean reduces that.

    Keeps: permutation equivariance and degree of the inner method. A running mean of weights need
    not keep its non-conflict.

    Departures: unless it starts from ``initial`` weights, the mean is debiased as in Adam, so the
    first step uses the inner method's weights and not an arbitrary start. An absent objective's
    mean stays as it is, and the others take over its weight in proportion.

    Args:
      aggregator: the method whose weights are smoothed; a name, or an aggregator that is a function
        of the Gram matrix and has degree 0 in it.
      momentum: weight of the past, from 0 to 1. May be traced.
      initial: ``[K]`` weights, at least 0, that the mean starts from; None: it has no past.

    Returns:
      The aggregator. It keeps ``2 K + 2`` numbers per block besides the inner state.

    Raises:
      ConfigError: if the inner method cannot be smoothed, or the momentum or the initial weights
        are out of range.

    References:
      Zhou et al., *On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
      Beyond*, NeurIPS 2022,
      `OpenReview <https://openreview.net/forum?id=ScwfQ7hdwyP>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import gram, weigh_block
      >>> method = cr_mogm("mgda", momentum=0.5)
      >>> w, state = weigh_block(method, gram(jnp.diag(jnp.array([1.0, 1.0]))))
      >>> [round(float(x), 3) for x in w]
      [0.5, 0.5]
      >>> w, state = weigh_block(method, gram(jnp.diag(jnp.array([1.0, 3.0]))), state=state)
      >>> [round(float(x), 3) for x in w]  # mgda alone gives [0.9, 0.1]
      [0.767, 0.233]
    """
    inner = get(aggregator)
    check_number("cr_mogm", "momentum", momentum, low=0, high=1, open_high=True)
    scaled = isinstance(inner.gram_degree, Tracer) or inner.gram_degree != 0
    if inner.combine is not None or scaled:
        raise ConfigError(
            f"cr_mogm: {inner.name!r} cannot be smoothed: expected a method whose weights are a "
            "function of the Gram matrix and do not change with its scale."
        )

    given = None if initial is None else np.asarray(initial, np.float64)
    if given is not None and (
        given.ndim != 1 or not np.isfinite(given).all() or (given < 0).any() or not given.any()
    ):
        raise ConfigError(
            "cr_mogm: expected initial weights >= 0, one per objective and not all 0, found "
            f"{initial!r}."
        )

    def init(num_objectives):
        start = np.zeros(num_objectives) if given is None else given
        remaining = float(given is None)
        return CrMogmState(
            inner=inner.init(num_objectives),
            average=jnp.asarray(start, float),
            remaining=jnp.full(len(start), remaining, float),
            total=jnp.asarray(start.sum(), float),
            total_remaining=jnp.full((), remaining, float),
        )

    def weigh(gram, active, preference, state, key):
        if state.average.shape != active.shape:
            raise ConfigError(
                f"cr_mogm was given {len(state.average)} initial weights, but there are "
                f"{len(active)} objectives."
            )
        weights, inner_state = inner.weigh(gram, active, preference, state.inner, key)
        weights = jnp.where(active, weights, 0.0)

        def follow(old, new, moves):
            return jnp.where(moves, momentum * old + (1 - momentum) * new, old)

        state = CrMogmState(
            inner=inner_state,
            average=follow(state.average, weights, active),
            remaining=follow(state.remaining, 0.0, active),
            total=follow(state.total, jnp.sum(weights), jnp.any(active)),
            total_remaining=follow(state.total_remaining, 0.0, jnp.any(active)),
        )

        def debiased(average, remaining):  # 0/0 for what was never seen so far
            return average / jnp.where(remaining < 1, 1 - remaining, 1.0)

        mean = jnp.where(active, debiased(state.average, state.remaining), 0.0)
        # Without the absent objectives the others make up the usual sum.
        total, here = debiased(state.total, state.total_remaining), jnp.sum(mean)
        return mean * jnp.where(here > 0, total / jnp.where(here > 0, here, 1.0), 1.0), state

    return Aggregator(
        "cr_mogm",
        weigh,
        init=init,
        compares_steps=inner.compares_steps,
        stochastic=inner.stochastic,
        draw=inner.draw,
        cross_gram=inner.cross_gram,
        unit_scale=inner.unit_scale,
        summed=inner.summed,
        importance=inner.importance,
    )

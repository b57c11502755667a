"""FairGrad: alpha-fair shares of the improvement."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import fair_weights, mean_norm
from jaxmoo.parameters import check_choice, check_number


@register
def fairgrad(
    alpha: float | jax.Array = 1.0,
    *,
    scale: Literal["mean", "published"] = "mean",
    iterations: int | None = None,
) -> Aggregator:
    """Fair resource allocation in multi-task learning.

    Maximises the alpha-fair utility of the objectives' improvements ``<g_i, d>`` in a ball:
    ``G w = w^(-1/alpha)``, ``w > 0``, solved exactly. ``alpha = 1`` is proportional fairness (Nash
    bargaining), larger values come nearer to max-min fairness.

    Keeps: non-conflict, strictly, where the hull of the gradients does not reach the origin
    (``(G w)_i > 0``); descent; permutation equivariance; degree 1 in the gradients by default.

    Departures: the published update has degree ``(1 - alpha) / (1 + alpha)``: with ``alpha = 1``
    every block would get the same norm whatever its gradients. By default the update's norm is
    restored to that of the block's mean gradient; ``scale="published"`` keeps the published one.
    Preferences, which the paper does not have, weight the utilities.

    Args:
      alpha: fairness exponent, from 0.5 to 5: beyond, weights differ by more than a float32 solve
        can hold. Smaller ones would tend to ``dualproj``, larger ones to the best worst case. May
        be traced.
      scale: ``"mean"`` or ``"published"``.
      iterations: most Newton steps; None: enough for alpha, 30 up to 2 and 100 above. About 8 are
        needed where the hull of the gradients does not reach the origin.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Ban and Ji, *Fair Resource Allocation in Multi-Task Learning*, ICML 2024,
      `arXiv:2402.15638 <https://arxiv.org/abs/2402.15638>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> [round(float(x), 4) for x in aggregate(fairgrad(scale="published"), J)]
      [0.0766, 0.9985, 0.9985]
    """
    check_number("fairgrad", "alpha", alpha, low=0.5, high=5)
    check_choice("fairgrad", "scale", scale, ("mean", "published"))
    if iterations is None:
        iterations = 30 if not isinstance(alpha, Tracer) and alpha <= 2 else 100
    check_number("fairgrad", "iterations", iterations, low=1, whole=True)

    def weigh(gram, active, preference, state, key):
        power = jnp.asarray(alpha, gram.dtype)
        weights, length = fair_weights(gram, active, preference, power, iterations=iterations)
        if scale == "mean":
            weights = weights * mean_norm(gram, preference) / length
        return weights, state

    published = scale == "published"
    degree = -alpha / (1 + alpha) if published else 0.0
    return Aggregator(
        "fairgrad",
        weigh,
        unit_scale=not published,
        gram_degree=degree,
        elementary=isinstance(alpha, int | float),
    )

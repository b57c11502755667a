"""Nash-MTL: the bargaining solution between the objectives."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import fair_weights, mean_norm
from jaxmoo.parameters import check_choice, check_number


@register
def nash_mtl(
    *,
    max_norm: float | jax.Array = 1.0,
    iterations: int = 20,
    scale: Literal["mean", "published"] = "mean",
) -> Aggregator:
    """Nash bargaining between the objectives.

    ``G a = 1 / a``, ``a > 0``, solved exactly: the direction that maximises the product of the
    improvements.

    Keeps: non-conflict, strictly, where the hull of the gradients does not reach the origin;
    invariance of the direction to the scale of every single gradient; permutation equivariance;
    degree 1 in the gradients by default.

    Departures: published code approximates the solution by up to 20 convex programs from the
    previous step's weights; the problem is convex as it stands and a few Newton steps from scratch
    solve it, so no state is kept. The published update has norm ``min(sqrt(K), max_norm)``
    whatever the gradients. By default the norm is restored to that of the block's mean gradient and
    ``max_norm`` is not used; ``scale="published"`` keeps the published norm. Preferences, which
    the paper does not have, are bargaining powers.

    Args:
      max_norm: largest norm of the published update, positive. May be traced.
      iterations: most Newton steps; about 8 are needed.
      scale: ``"mean"`` or ``"published"``.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Navon et al., *Multi-Task Learning as a Bargaining Game*, ICML 2022,
      `arXiv:2202.01017 <https://arxiv.org/abs/2202.01017>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> d = aggregate(nash_mtl(scale="published"), J)
      >>> [round(float(x), 4) for x in d], round(float(jnp.linalg.norm(d)), 4)
      ([0.0542, 0.7061, 0.7061], 1.0)
    """
    check_number("nash_mtl", "max_norm", max_norm, low=0, open_low=True)
    check_number("nash_mtl", "iterations", iterations, low=1, whole=True)
    check_choice("nash_mtl", "scale", scale, ("mean", "published"))

    def weigh(gram, active, preference, state, key):
        weights, length = fair_weights(gram, active, preference, 1.0, iterations=iterations)
        if scale == "mean":
            weights = weights * mean_norm(gram, preference) / length
        else:
            weights = weights * jnp.minimum(1.0, max_norm / length)
        return weights, state

    published = scale == "published"
    degree = -0.5 if published else 0.0
    return Aggregator(
        "nash_mtl",
        weigh,
        unit_scale=not published,
        gram_degree=degree,
        elementary=isinstance(max_norm, int | float),
    )

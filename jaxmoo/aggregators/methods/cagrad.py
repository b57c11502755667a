"""CAGrad: the best worst case near the mean gradient."""

from __future__ import annotations

from typing import Literal

import jax

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import best_worst_case
from jaxmoo.parameters import check_choice, check_number


@register
def cagrad(
    c: float | jax.Array = 0.5, *, rescale: Literal["1+c", "1+c^2", "none"] = "1+c"
) -> Aggregator:
    """Conflict-averse gradient descent.

    Maximises the smallest improvement ``min_i <g_i, d>`` over the ball
    ``|d - g_0| <= c |g_0|`` around the mean gradient ``g_0 = J^T p``. With
    ``w* = argmin <g_w, g_0> + c |g_0| |g_w|`` over the simplex, solved exactly,
    ``d = g_0 + c |g_0| / |g_w*| g_w*``, divided by ``1 + c``.

    Keeps: descent of the mean loss for ``c < 1``; the ball; permutation equivariance; degree 1 in
    the gradients. Promises the best worst case, not non-conflict: with c small an objective may
    still be opposed. ``c = 0`` is the mean; as c grows the direction tends to MGDA's.

    Departures: the paper's own code divides by ``1 + c^2``, others by ``1 + c`` or nothing; only
    ``1 + c`` returns g when all gradients equal g. Where the convex hull of the gradients reaches
    the origin the formula is 0/0, and the update tends to the mean instead of vanishing.
    Preferences, which the paper does not have, weight the mean gradient.

    Args:
      c: radius of the ball relative to the mean gradient, at least 0; below 1 in the paper. May
        be traced.
      rescale: what the update is divided by.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if c is negative or the rescaling unknown.

    References:
      Liu et al., *Conflict-Averse Gradient Descent for Multi-task Learning*, NeurIPS 2021,
      `arXiv:2110.14048 <https://arxiv.org/abs/2110.14048>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> [round(float(x), 4) for x in aggregate(cagrad(c=0.5, rescale="none"), J)]
      [0.1835, 1.2041, 1.2041]
    """
    check_number("cagrad", "c", c, low=0)
    check_choice("cagrad", "rescale", rescale, ("1+c", "1+c^2", "none"))
    divisor = {"1+c": lambda: 1 + c, "1+c^2": lambda: 1 + c**2, "none": lambda: 1.0}[rescale]

    def weigh(gram, active, preference, state, key):
        weights = preference + best_worst_case(gram, active, preference, c)
        return weights / divisor(), state

    elementary = isinstance(c, int | float)
    return Aggregator("cagrad", weigh, unit_scale=rescale == "1+c", elementary=elementary)

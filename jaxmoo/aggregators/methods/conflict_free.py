"""ConFIG: the same positive cosine with every gradient."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import equilibrate, pseudo_solve
from jaxmoo.kernels.linear import dot, matvec
from jaxmoo.parameters import check_choice


@register
def config(*, reduction: Literal["mean", "sum"] = "mean") -> Aggregator:
    """Conflict-free inverse gradients.

    The direction ``k = J_u^+ 1`` for the matrix ``J_u`` of unit gradients, with cosines
    ``C = J_u J_u^T``: in weights ``D^-1/2 C^+ 1``. Its length is the mean of the gradients'
    projections on it, ``sum_i p_i <g_i, k/|k|>``.

    Keeps: equal positive cosines with all gradients, hence non-conflict and descent, while the
    gradients are independent; permutation equivariance; degree 1 in the gradients.

    Departures: the published length is the sum of the projections; ``reduction="sum"`` is that.
    Preferences are what the cosines are proportional to.

    Args:
      reduction: ``"mean"``, or ``"sum"`` for the published scale.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if the reduction is unknown.

    References:
      Liu, Chu and Thuerey, *ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks*, ICLR 2025, `arXiv:2408.11104 <https://arxiv.org/abs/2408.11104>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> [round(float(x), 4) for x in aggregate(config(reduction="sum"), J)]
      [0.1588, 2.0706, 2.0706]
    """
    check_choice("config", "reduction", reduction, ("mean", "sum"))

    def weigh(gram, active, preference, state, key):
        cosine, norm = equilibrate(gram, active)
        target = preference * jnp.sum(active)
        direction = pseudo_solve(cosine, target)
        projections = matvec(cosine, direction)
        square = dot(direction, projections)
        length = dot(preference * norm, projections)
        # Gradients that cancel exactly leave a direction of rounding only.
        rounding = 8 * float(jnp.finfo(gram.dtype).eps) * jnp.sum(jnp.abs(direction))
        exists = square > jnp.square(rounding)
        factor = jnp.where(exists, length / jnp.where(exists, square, 1.0), 0.0)
        return factor * direction / norm, state

    return Aggregator("config", weigh, summed=reduction == "sum", elementary=True)

"""Aligned-MTL: the gradients' principal components made equally long."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import eigh_graded
from jaxmoo.kernels.linear import matvec, vecmat
from jaxmoo.parameters import check_choice


@register
def aligned_mtl(*, scale: Literal["min", "median", "rmse"] = "min") -> Aggregator:
    """Independent component alignment.

    Replaces the gradients by the nearest orthogonal system with equally long axes and averages:
    ``w = sigma V Lambda^-1/2 V^T p`` with ``G = V Lambda V^T``.

    Keeps: permutation equivariance; degree 1 in the gradients; no gradient dominates. While the
    gradients are independent the aligned ones do not conflict with one another; the update may
    still oppose an original gradient.

    Departures: none where the gradients are independent. The rank is decided relative to the scale
    of the gradients involved, so weak objectives are not taken for rounding.

    Args:
      scale: length of the axes: ``"min"``, the shortest principal axis (the paper's); ``"median"``
        of the axes; or ``"rmse"``, their root mean square.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if the scale is unknown.

    References:
      Senushkin et al., *Independent Component Alignment for Multi-Task Learning*, CVPR 2023,
      `arXiv:2305.19000 <https://arxiv.org/abs/2305.19000>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> [round(float(x), 4) for x in aggregate(aligned_mtl(), J)]
      [0.2133, 0.9673, 0.9673]
    """
    check_choice("aligned_mtl", "scale", scale, ("min", "median", "rmse"))

    def weigh(gram, active, preference, state, key):
        values, vectors, significant = eigh_graded(gram)
        rank = jnp.sum(significant)
        if scale == "min":
            length = jnp.min(jnp.where(significant, values, jnp.inf))
        elif scale == "median":
            ascending = jnp.sort(jnp.where(significant, values, jnp.inf))
            length = ascending[jnp.maximum(rank - 1, 0) // 2]
        else:
            length = jnp.sum(jnp.where(significant, values, 0.0)) / jnp.maximum(rank, 1)
        length = jnp.where(rank > 0, length, 0.0)
        stretch = jnp.sqrt(length / jnp.where(significant, values, 1.0))
        along = jnp.where(significant, stretch * vecmat(preference, vectors), 0.0)
        return matvec(vectors, along), state

    return Aggregator("aligned_mtl", weigh, elementary=scale != "median")

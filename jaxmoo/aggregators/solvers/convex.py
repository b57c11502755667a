"""The small convex problems behind the methods, solved exactly.

All of them are one problem in equilibrated variables. Let ``C = D^-1/2 G D^-1/2`` hold the cosines
between the gradients, so that no row is small however unequal the gradients are, and look for
``z >= 0`` with

    s = C z - b >= 0,    z_i s_i = 0.

* The shortest vector of the convex hull (MGDA) is ``b_i = 1/|g_i|``: the shortest d with
  ``<g_i, d> >= 1``, rescaled to weights that sum to one.
* The projection of ``J^T u`` onto the dual cone (UPGrad, DualProj) is ``b = -D^-1/2 G u``.
* CAGrad is ``b = lambda b_1 - q`` with the multiplier ``lambda`` of a ball ``z^T C z = r^2``.

The first two are solved by :mod:`~jaxmoo.aggregators.solvers.pivoting` and, where gradients are
dependent, by the :mod:`~jaxmoo.aggregators.solvers.interior_point` method, which the third always
takes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoo.aggregators.solvers.cosines import equilibrate
from jaxmoo.aggregators.solvers.interior_point import Ball, interior_point
from jaxmoo.aggregators.solvers.pivoting import pivot
from jaxmoo.kernels.launch import in_one_launch
from jaxmoo.kernels.linear import any_of, dot, in_kernel, matvec


@in_one_launch
def min_norm(gram: jax.Array, active: jax.Array) -> jax.Array:
    """Weights of the shortest vector in the convex hull of the gradients.

    Solves ``min_w w^T G w`` over the simplex.

    Args:
      gram: ``[K, K]`` with a positive diagonal on active rows and zeros elsewhere.
      active: ``[K]`` bool.

    Returns:
      ``[K]`` weights, non-negative, summing to 1, zero on inactive rows.

    Example:
      >>> import jax.numpy as jnp
      >>> w = min_norm(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), jnp.array([True, True]))
      >>> [round(float(x), 5) for x in w]
      [0.6, 0.4]
    """
    cosine, norm = equilibrate(gram, active)
    inverse = jnp.where(active, 1.0 / norm, 0.0)
    inverse = inverse / jnp.maximum(jnp.max(inverse), 1e-30)
    # On the simplex, adding t 1 1^T to G adds a constant. It bounds the solution when the hull
    # contains the origin, where the constraints <g_i, d> >= 1 have none.
    unit = inverse / jnp.maximum(jnp.sqrt(dot(inverse, inverse)), 1e-30)
    cosine = cosine + unit[:, None] * unit[None, :]
    lower = jnp.where(active, inverse, -1.0)
    weights = _solve(cosine, lower, magnitude=0.0) * inverse
    return weights / jnp.maximum(jnp.sum(weights), 1e-30)


@in_one_launch
def project_on_dual_cone(cosine: jax.Array, active: jax.Array, target: jax.Array) -> jax.Array:
    """Smallest change of a combination that stops it opposing any gradient.

    With unit gradients ``g_i``, projects ``d = sum_i target_i g_i`` onto
    ``{d : <g_i, d> >= 0 for all i}``: solves ``min_z |d + sum_i z_i g_i|`` over ``z >= 0``.

    Args:
      cosine: ``[K, K]`` cosines between the gradients, see :func:`equilibrate`.
      active: ``[K]`` bool.
      target: ``[K]`` coefficients, of size about 1.

    Returns:
      ``[K]`` corrections z >= 0, zero on inactive rows.

    Example:
      >>> import jax.numpy as jnp
      >>> cosine = jnp.array([[1.0, -0.5], [-0.5, 1.0]])
      >>> z = project_on_dual_cone(cosine, jnp.array([True, True]), jnp.array([1.0, 0.0]))
      >>> [round(float(x), 5) for x in z]
      [0.0, 0.5]
    """
    lower = jnp.where(active, -matvec(cosine, target), -1.0)
    return jnp.where(active, _solve(cosine, lower), 0.0)


def _solve(cosine: jax.Array, lower: jax.Array, magnitude: float = 1.0) -> jax.Array:
    """Pivoting for the many problems that are regular, the interior point for the others."""
    # In a kernel every problem is a program of its own, which waits for no other's last step.
    found = None if in_kernel() else pivot(cosine, lower, magnitude)
    return interior_point(cosine, lower, magnitude=magnitude, known=found)


@in_one_launch
def best_worst_case(
    gram: jax.Array, active: jax.Array, centre: jax.Array, radius: jax.Array
) -> jax.Array:
    """Best worst-case improvement within a ball around a combination of gradients (CAGrad).

    With ``g_0 = J^T centre``, solves ``max_d min_i <g_i, d>`` over ``|d - g_0| <= radius |g_0|``
    through its dual ``min_w <g_w, g_0> + radius |g_0| |g_w|`` over the simplex.

    Args:
      gram: ``[K, K]`` with a positive diagonal on active rows and zeros elsewhere.
      active: ``[K]`` bool.
      centre: ``[K]`` coefficients of the ball's centre.
      radius: radius relative to the centre's norm.

    Returns:
      ``[K]`` y >= 0 with ``d = J^T (centre + y)``; ``y`` is parallel to the dual solution w. Where
      the hull of the gradients reaches the origin, the direction of ``g_w`` is undefined and d
      tends to ``g_0``.

    Example:
      >>> import jax.numpy as jnp
      >>> y = best_worst_case(
      ...     jnp.array([[18.0, -22.0], [-22.0, 38.0]]), jnp.ones(2, bool), jnp.full(2, 0.5), 0.5
      ... )
      >>> [round(float(x), 4) for x in y]
      [0.2041, 0.0]
    """
    cosine, norm = equilibrate(gram, active)
    centre = centre * norm
    towards = matvec(cosine, centre)
    # The centre's norm cannot be told from zero below the rounding of its own terms.
    square = jnp.maximum(dot(centre, towards), 0.0)
    floor = jnp.finfo(gram.dtype).eps * jnp.square(jnp.sum(jnp.abs(centre)))
    length = jnp.sqrt(jnp.maximum(square, jnp.where(floor > 0, floor, 1.0)))
    inverse = jnp.where(active, 1.0 / norm, 0.0)
    lower = inverse / jnp.maximum(jnp.max(inverse), 1e-30)
    shift = jnp.where(active, towards / length, 1.0)
    # The largest multiplier for which z = 0 is admissible.
    multiplier = jnp.min(jnp.where(active, shift / jnp.where(active, lower, 1.0), jnp.inf))
    multiplier = jnp.where(any_of(active), multiplier, 0.0)
    ball = Ball(jnp.where(any_of(active), radius, 0.0).astype(gram.dtype), multiplier)
    magnitude = jnp.maximum(jnp.sum(jnp.abs(centre)) / length, 1.0)
    z = interior_point(cosine, lower, shift=shift, ball=ball, magnitude=magnitude)
    return jnp.where(active, z * jnp.sqrt(square) / norm, 0.0)

"""Exact small quadratic programs: one interior-point method for every method that needs one.

All of them are one problem in equilibrated variables. Let ``C = D^-1/2 G D^-1/2`` hold the cosines
between the gradients, so that no row is small however unequal the gradients are, and look for
``z >= 0`` with

    s = C z - b >= 0,    z_i s_i = 0.

* The shortest vector of the convex hull (MGDA) is ``b_i = 1/|g_i|``: the shortest d with
  ``<g_i, d> >= 1``, rescaled to weights that sum to one.
* The projection of ``J^T u`` onto the dual cone (UPGrad, DualProj) is ``b = -D^-1/2 G u``.
* CAGrad is ``b = lambda b_1 - q`` with the multiplier ``lambda`` of a ball ``z^T C z = r^2``.

The method is Mehrotra's predictor-corrector, which takes 4 to 12 steps whatever K and however
degenerate the problem (duplicated, opposed, rank-deficient gradients), where active-set methods
cycle. Two terms make it safe in float32. The step is damped (a ridge on the step, not on the
solution, so the fixed point is exact), because the Newton matrix of duplicated gradients is
singular. And the solution carries a ridge of two units in the last place of C, below what a
float32 Gram matrix can tell apart, which bounds it where there are many.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

MAX_STEPS = 20
_RIDGE = 2.4e-7  # two float32 units in the last place, on the solution
_ROUNDING = 3e-7  # on the residual s - (C z - b), relative to the solution's size
_COMPLEMENTARITY = 3e-8  # on min(z_i, s_i), likewise; rounding sets it no limit
_FLOOR = 1e-14  # keeps iterates off the boundary, where s/z would be 0/0


def matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix times vector without the reduced precision accelerators default to."""
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)


def step_damping(size: int) -> float:
    """Ridge on the Newton matrix ``C + diag(...)`` of a step.

    The largest error of a float32 factorisation of a singular C grows with its size.

    Args:
      size: K.

    Returns:
      The ridge, relative to C's unit diagonal.
    """
    return 2e-6 * max(1.0, size / 16)


class Equilibrated(NamedTuple):
    """A Gram matrix split into cosines and norms."""

    cosine: jax.Array  # [K, K] unit diagonal, zero between active and inactive
    norm: jax.Array  # [K] gradient norms; 1 where inactive


def equilibrate(gram: jax.Array, active: jax.Array) -> Equilibrated:
    """Split a Gram matrix into the cosines between gradients and their norms.

    Args:
      gram: ``[K, K]`` with a positive diagonal on active rows and zeros elsewhere.
      active: ``[K]`` bool.

    Returns:
      Cosines and norms; an inactive row becomes a unit gradient orthogonal to all others.

    Example:
      >>> import jax.numpy as jnp
      >>> cosine, norm = equilibrate(jnp.array([[4.0, 0.0], [0.0, 0.0]]), jnp.array([True, False]))
      >>> cosine.tolist(), norm.tolist()
      ([[1.0, 0.0], [0.0, 1.0]], [2.0, 1.0])
    """
    norm = jnp.sqrt(jnp.where(active, jnp.diagonal(gram), 1.0))
    cosine = gram / norm[:, None] / norm[None, :]
    diagonal = jnp.eye(gram.shape[-1], dtype=bool)
    # Rounding leaves cosines a little above 1, which would make C indefinite.
    return Equilibrated(jnp.where(diagonal, 1.0, jnp.clip(cosine, -1.0, 1.0)), norm)


class _Iterate(NamedTuple):
    z: jax.Array  # [K] > 0
    s: jax.Array  # [K] > 0
    multiplier: jax.Array  # []
    steps: jax.Array  # []
    done: jax.Array  # [] bool


def _longest_step(x: jax.Array, dx: jax.Array) -> jax.Array:
    """The largest multiple of dx, up to any length, that keeps x >= 0."""
    return jnp.min(jnp.where(dx < 0, -x / jnp.where(dx < 0, dx, 1.0), jnp.inf))


def _interior_point(
    cosine: jax.Array,
    lower: jax.Array,
    shift: jax.Array,
    radius: jax.Array | None,
    start: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Solve ``0 <= z, 0 <= C z + shift - multiplier * lower``, complementary.

    With ``radius`` None the multiplier is fixed at its start; otherwise it is found such that
    ``z^T C z = radius^2``.
    """
    k = lower.shape[0]
    identity = jnp.eye(k, dtype=cosine.dtype)
    curvature = cosine + _RIDGE * identity
    damping = step_damping(k)

    def residual(z, s, multiplier):
        return matvec(curvature, z) + shift - multiplier * lower - s

    def step(it: _Iterate) -> _Iterate:
        z, s = it.z, it.s
        rest = residual(z, s, it.multiplier)
        gap = jnp.dot(z, s) / k
        ratio = s / z
        newton = cosine + jnp.diag(ratio + damping)
        factor = jnp.linalg.cholesky(newton, symmetrize_input=False)
        if radius is None:
            by_multiplier = jnp.zeros(k)
        else:
            by_multiplier = cho_solve((factor, True), lower)
            bent = matvec(curvature, by_multiplier)

        def direction(target):
            """Newton step towards ``z * s = target + z * s``."""
            dz = cho_solve((factor, True), target / z - rest)
            if radius is None:
                change = jnp.zeros(())
            else:
                # Move the multiplier so that the full step lands on the sphere: a quadratic
                # equation, or its closest approach when the sphere is out of reach.
                end = z + dz
                a = jnp.dot(by_multiplier, bent)
                b = jnp.dot(end, bent)
                c = jnp.dot(end, matvec(curvature, end)) - radius**2
                root = jnp.sqrt(jnp.maximum(b * b - a * c, 0.0))
                change = (root - b) / jnp.maximum(a, 1e-20)
                dz = dz + change * by_multiplier
            return dz, target / z - ratio * dz, change

        dz, ds, _ = direction(-z * s)
        reach = jnp.minimum(1.0, jnp.minimum(_longest_step(z, dz), _longest_step(s, ds)))
        ahead = jnp.dot(z + reach * dz, s + reach * ds) / k
        centring = (ahead / gap) ** 3
        dz, ds, change = direction(centring * gap - z * s - dz * ds)
        # Should rounding defeat even the damped factorisation, the last point stands.
        solved = jnp.all(jnp.isfinite(dz)) & jnp.all(jnp.isfinite(ds))
        dz, ds = jnp.where(solved, dz, 0.0), jnp.where(solved, ds, 0.0)
        change = jnp.where(solved, change, 0.0)
        reach = jnp.minimum(1.0, 0.99 * jnp.minimum(_longest_step(z, dz), _longest_step(s, ds)))
        z = jnp.maximum(z + reach * dz, _FLOOR)
        s = jnp.maximum(s + reach * ds, _FLOOR)
        multiplier = it.multiplier + reach * change
        size = 1.0 + jnp.sum(z)
        done = jnp.max(jnp.abs(residual(z, s, multiplier))) <= _ROUNDING * size
        done &= jnp.max(jnp.minimum(z, s)) <= _COMPLEMENTARITY * size
        return _Iterate(z, s, multiplier, it.steps + 1, done | ~solved)

    first = _Iterate(*start, steps=jnp.zeros((), jnp.int32), done=jnp.zeros((), bool))
    last = lax.while_loop(lambda it: ~it.done & (it.steps < MAX_STEPS), step, first)
    # A coordinate closer to its bound than to its constraint is at its bound.
    return jnp.where(last.z < last.s, 0.0, last.z), last.multiplier


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
    unit = inverse / jnp.maximum(jnp.linalg.norm(inverse), 1e-30)
    cosine = cosine + unit[:, None] * unit[None, :]
    lower = jnp.where(active, inverse, -1.0)
    k = lower.shape[0]
    z = jnp.full(k, k**-0.5)
    s = jnp.maximum(matvec(cosine, z) - lower, 1.0)
    z, _ = _interior_point(cosine, lower, jnp.zeros(k), None, (z, s, jnp.ones(())))
    weights = z * inverse
    return weights / jnp.maximum(jnp.sum(weights), 1e-30)


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
    k = lower.shape[0]
    z = jnp.full(k, k**-0.5)
    s = jnp.maximum(matvec(cosine, z) - lower, 1.0)
    z, _ = _interior_point(cosine, lower, jnp.zeros(k), None, (z, s, jnp.ones(())))
    return jnp.where(active, z, 0.0)


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
    square = jnp.maximum(jnp.dot(centre, towards), 0.0)
    floor = 1e-7 * jnp.square(jnp.sum(jnp.abs(centre)))
    length = jnp.sqrt(jnp.maximum(square, jnp.where(floor > 0, floor, 1.0)))
    inverse = jnp.where(active, 1.0 / norm, 0.0)
    lower = inverse / jnp.maximum(jnp.max(inverse), 1e-30)
    shift = jnp.where(active, towards / length, 1.0)
    k = lower.shape[0]
    # At the largest multiplier for which z = 0 is admissible, plus the start's own slack.
    multiplier = jnp.min(jnp.where(active, shift / jnp.where(active, lower, 1.0), jnp.inf))
    multiplier = jnp.where(jnp.any(active), multiplier, 0.0)
    radius = jnp.asarray(radius, jnp.float32)
    z = jnp.full(k, jnp.maximum(radius, 1e-6) * k**-0.5)
    s = jnp.maximum(matvec(cosine, z) + shift - multiplier * lower, jnp.maximum(radius, 1e-6))
    z, _ = _interior_point(cosine, lower, shift, radius, (z, s, multiplier))
    return jnp.where(active, z * jnp.sqrt(square) / norm, 0.0)

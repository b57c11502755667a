"""The interior-point method behind every quadratic program here.

Mehrotra's predictor-corrector for ``0 <= z``, ``0 <= s = C z - b``, ``z_i s_i = 0`` with a
positive semi-definite C of unit diagonal. It takes 4 to 12 steps whatever the size and however
degenerate the problem (duplicated, opposed, rank-deficient gradients), where active-set methods
cycle; a step is one factorisation of a ``K x K`` matrix, batched over blocks by ``vmap``.

Two terms make it safe in float32. The step is damped (a ridge on the step, not on the solution,
so the fixed point is exact), because the Newton matrix of duplicated gradients is singular. And
the solution carries a ridge of two units in the last place of C, below what a float32 Gram matrix
can tell apart, which bounds it where there are many.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

RIDGE = 2.4e-7  # two float32 units in the last place, on the solution
_MAX_STEPS = 20
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


class Solution(NamedTuple):
    """What :func:`interior_point` returns."""

    z: jax.Array  # [K] >= 0
    multiplier: jax.Array  # []
    converged: jax.Array  # [] bool


class _Iterate(NamedTuple):
    z: jax.Array  # [K] > 0
    s: jax.Array  # [K] > 0
    multiplier: jax.Array  # []
    steps: jax.Array  # []
    converged: jax.Array  # [] bool
    stuck: jax.Array  # [] bool


def _longest_step(x: jax.Array, dx: jax.Array) -> jax.Array:
    """The largest multiple of dx, up to any length, that keeps x >= 0."""
    return jnp.min(jnp.where(dx < 0, -x / jnp.where(dx < 0, dx, 1.0), jnp.inf))


def interior_point(
    cosine: jax.Array,
    lower: jax.Array,
    *,
    shift: jax.Array | None = None,
    radius: jax.Array | None = None,
    multiplier: jax.Array | None = None,
) -> Solution:
    """Solve ``0 <= z``, ``0 <= C z + shift - multiplier * lower``, complementary.

    Without a radius the multiplier is 1. With one it is found such that ``z^T C z = radius^2``;
    that problem is no longer a linear complementarity problem, and Newton's method on it converges
    in nearly all cases but without a guarantee: look at ``converged``.

    Args:
      cosine: ``[K, K]`` positive semi-definite with a diagonal of about 1.
      lower: ``[K]`` b.
      shift: ``[K]``; None: zero.
      radius: see above.
      multiplier: where to start when there is a radius.

    Returns:
      The :class:`Solution`.
    """
    k = lower.shape[0]
    identity = jnp.eye(k, dtype=cosine.dtype)
    curvature = cosine + RIDGE * identity
    damping = step_damping(k)
    shift = jnp.zeros(k, cosine.dtype) if shift is None else shift

    def residual(z, s, multiplier):
        return matvec(curvature, z) + shift - multiplier * lower - s

    def step(it: _Iterate) -> _Iterate:
        z, s = it.z, it.s
        rest = residual(z, s, it.multiplier)
        gap = jnp.dot(z, s) / k
        ratio = s / z
        newton = cosine + jnp.diag(ratio + damping)
        factor = jnp.linalg.cholesky(newton, symmetrize_input=False)
        if radius is not None:
            by_multiplier = cho_solve((factor, True), lower)
            bent = matvec(curvature, by_multiplier)

        def direction(target):
            """Newton step towards ``z * s = target + z * s``."""
            dz = cho_solve((factor, True), target / z - rest)
            change = jnp.zeros(())
            if radius is not None:
                # Move the multiplier so that the full step lands on the sphere: a quadratic
                # equation. No step needs to be longer than the sphere's radius.
                end = z + dz
                a = jnp.maximum(jnp.dot(by_multiplier, bent), 1e-20)
                b = jnp.dot(end, bent)
                c = jnp.dot(end, matvec(curvature, end)) - radius**2
                change = (jnp.sqrt(jnp.maximum(b * b - a * c, 0.0)) - b) / a
                limit = radius / jnp.sqrt(a)
                change = jnp.clip(change, -limit, limit)
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
        converged = jnp.max(jnp.abs(residual(z, s, multiplier))) <= _ROUNDING * size
        converged &= jnp.max(jnp.minimum(z, s)) <= _COMPLEMENTARITY * size
        if radius is not None:
            square = jnp.dot(z, matvec(curvature, z))
            converged &= jnp.abs(square - radius**2) <= 1e-5 * radius**2
        return _Iterate(z, s, multiplier, it.steps + 1, converged & solved, ~solved)

    z = jnp.ones(k, cosine.dtype)
    if radius is None:
        multiplier = jnp.ones((), cosine.dtype)
        z, slack = z * k**-0.5, 1.0
    else:
        slack = jnp.maximum(radius, 1e-6)
        z = z * slack / jnp.sqrt(jnp.dot(z, matvec(curvature, z)))
    first = _Iterate(
        z=z,
        s=jnp.maximum(matvec(cosine, z) + shift - multiplier * lower, slack),
        multiplier=multiplier,
        steps=jnp.zeros((), jnp.int32),
        converged=jnp.zeros((), bool),
        stuck=jnp.zeros((), bool),
    )

    def unfinished(it: _Iterate) -> jax.Array:
        return ~it.converged & ~it.stuck & (it.steps < _MAX_STEPS)

    last = lax.while_loop(unfinished, step, first)
    # A coordinate closer to its bound than to its constraint is at its bound.
    return Solution(jnp.where(last.z < last.s, 0.0, last.z), last.multiplier, last.converged)

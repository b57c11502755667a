"""The interior-point method, which solves every program here that pivoting leaves.

Mehrotra's predictor-corrector for ``0 <= z``, ``0 <= s = C z - b``, ``z_i s_i = 0`` with a
positive semi-definite C of unit diagonal. It takes 4 to 15 steps, seldom more, whatever the size
and however degenerate the problem (duplicated, opposed, rank-deficient gradients), where active-set
methods cycle; a step is one factorisation of a ``K x K`` matrix, batched over blocks by ``vmap``.

Three things make it safe in float32, and in float64 likewise. The step is damped (a ridge on the
step, not on the solution, so the fixed point is exact), because the Newton matrix of duplicated
gradients is singular. The solution carries a ridge of two units in the last place of C, below what
a Gram matrix can tell apart, which bounds it where there are many. And every step's point is judged
by how well it satisfies the optimality conditions themselves; the best is returned, because late
steps, whose systems are nearly singular, may lose what earlier ones had.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.kernels.linear import (
    all_finite,
    diagonal_matrix,
    dot,
    factorise,
    identity,
    matvec,
    solve,
)
from jaxmoo.sharding import varying


def ridge(dtype: Any) -> float:
    """Two units in the last place, on the solution."""
    return 2 * float(jnp.finfo(dtype).eps)


def tolerance(dtype: Any) -> float:
    """On the residual of the optimality conditions."""
    return 2.5 * float(jnp.finfo(dtype).eps)


class Ball(NamedTuple):
    """The condition that fixes the multiplier of :func:`interior_point`."""

    radius: jax.Array  # [] >= 0
    multiplier: jax.Array  # [] the largest for which z = 0 is admissible


class Found(NamedTuple):
    """A point and how well it satisfies the optimality conditions."""

    point: jax.Array  # [K] >= 0
    residual: jax.Array  # []


class _Iterate(NamedTuple):
    z: jax.Array  # [K] > 0
    s: jax.Array  # [K] > 0
    multiplier: jax.Array  # []
    highest: jax.Array  # [] upper bound on the multiplier
    best: Found  # so far
    steps: jax.Array  # []
    stuck: jax.Array  # [] bool


def _longest_step(x: jax.Array, dx: jax.Array) -> jax.Array:
    """The largest multiple of dx, up to any length, that keeps x >= 0."""
    return jnp.min(jnp.where(dx < 0, -x / jnp.where(dx < 0, dx, 1.0), jnp.inf))


def interior_point(
    cosine: jax.Array,
    lower: jax.Array,
    *,
    shift: jax.Array | None = None,
    ball: Ball | None = None,
    magnitude: float | jax.Array = 1.0,
    known: Found | None = None,
) -> jax.Array:
    """Solve ``0 <= z``, ``0 <= C z + shift - multiplier * lower``, complementary.

    Without a ball the multiplier is 1. With one it is found such that ``z^T C z = radius^2``;
    that problem is no longer a linear complementarity problem, and Newton's method on it converges
    because the multiplier is kept between a lower bound, from z = 0, and an upper one, the dual
    objective ``(shift^T z + radius |z|_C) / (lower^T z)`` of any z.

    Args:
      cosine: ``[K, K]`` positive semi-definite with a diagonal of about 1.
      lower: ``[K]`` b.
      shift: ``[K]``; None: zero.
      ball: see above.
      magnitude: sum of the absolute terms that ``lower`` and ``shift`` are made of. Residuals are
        relative to this plus the sum of z.
      known: a point that is returned unless a better one is found; if it is good enough, no step
        is made.

    Returns:
      ``[K]`` z >= 0.
    """
    k, dtype = lower.shape[0], cosine.dtype
    eps = float(jnp.finfo(dtype).eps)
    # A solution at the end of a long valley, as long as rounding lets it be, takes most in float64.
    most_steps = 30 if eps > 1e-10 else 120
    floor = eps**2  # keeps iterates off the boundary, where s/z would be 0/0
    curvature = cosine + ridge(dtype) * identity(k, dtype)
    shift = jnp.zeros(k, dtype) if shift is None else shift
    # Found by counting steps over random degenerate problems in float32 (1e-5 and 1e-6): a
    # factorisation of a singular matrix needs some damping, the multiplier converges the faster the
    # less there is.
    damping = 84 * eps if ball is None else 8.4 * eps * max(1.0, k / 16)

    def judge(z, s, multiplier) -> Found:
        undecided = jnp.max(jnp.minimum(z, s))
        # A coordinate closer to its bound than to its constraint is at its bound.
        z = jnp.where(z < s, 0.0, z)
        product = matvec(cosine, z)
        total = jnp.sum(z)
        size = jnp.maximum(magnitude + total, 1e-30)
        slack = product + shift - multiplier * lower
        # Rounding limits how well slacks can vanish, but not how well coordinates are decided.
        residual = jnp.maximum(jnp.max(jnp.abs(jnp.minimum(z, slack))), 30 * undecided) / size
        if ball is not None:
            # The ridge is of the size of rounding; it matters where C z is nothing else.
            square = dot(z, product) + ridge(dtype) * dot(z, z)
            off = jnp.abs(square - ball.radius**2)
            terms = jnp.minimum(size * total, 0.12 / eps * ball.radius**2)
            residual = jnp.maximum(residual, off / jnp.maximum(terms, 1e-30))
        return Found(z, residual)

    def step(it: _Iterate) -> _Iterate:
        z, s = it.z, it.s
        rest = matvec(curvature, z) + shift - it.multiplier * lower - s
        gap = dot(z, s) / k
        ratio = s / z
        newton = cosine + diagonal_matrix(ratio + damping)
        factor = factorise(newton)
        highest = it.highest
        by_multiplier = bent = jnp.zeros(k, dtype)
        if ball is not None:
            by_multiplier = solve(factor, lower)
            bent = matvec(curvature, by_multiplier)
            length = jnp.sqrt(jnp.maximum(dot(z, matvec(curvature, z)), 0.0))
            bound = dot(shift, z) + ball.radius * length
            highest = jnp.minimum(highest, bound / jnp.maximum(dot(lower, z), 1e-30))

        def direction(target):
            """Newton step towards ``z * s = target + z * s``."""
            dz = solve(factor, target / z - rest)
            change = jnp.zeros((), dtype)
            if ball is not None:
                # Move the multiplier so that the full step lands on the sphere: a quadratic
                # equation. No step needs to be longer than the sphere's radius.
                end = z + dz
                a = jnp.maximum(dot(by_multiplier, bent), 1e-20)
                b = dot(end, bent)
                c = dot(end, matvec(curvature, end)) - ball.radius**2
                change = (jnp.sqrt(jnp.maximum(b * b - a * c, 0.0)) - b) / a
                limit = ball.radius / jnp.sqrt(a)
                change = jnp.clip(change, -limit, limit)
                change = jnp.clip(change, ball.multiplier - it.multiplier, highest - it.multiplier)
                dz = dz + change * by_multiplier
            return dz, target / z - ratio * dz, change

        dz, ds, _ = direction(-z * s)
        reach = jnp.minimum(1.0, jnp.minimum(_longest_step(z, dz), _longest_step(s, ds)))
        ahead = dot(z + reach * dz, s + reach * ds) / k
        # Every second of the late steps only half closes the gap, which breaks cycles.
        careful = (it.steps >= 9) & (it.steps % 2 == 0)
        centring = jnp.where(careful, 0.5, (ahead / gap) ** 3)
        # The second-order term is that of the step which was possible.
        dz, ds, change = direction(centring * gap - z * s - reach * dz * ds)
        # Should rounding defeat even the damped factorisation, the best point stands.
        solved = all_finite(dz) & all_finite(ds)
        dz, ds = jnp.where(solved, dz, 0.0), jnp.where(solved, ds, 0.0)
        change = jnp.where(solved, change, 0.0)
        reach = jnp.minimum(1.0, 0.99 * jnp.minimum(_longest_step(z, dz), _longest_step(s, ds)))
        z = jnp.maximum(z + reach * dz, floor)
        s = jnp.maximum(s + reach * ds, floor)
        multiplier = it.multiplier + reach * change
        here = judge(z, s, multiplier)
        better = here.residual < it.best.residual
        return _Iterate(
            z=z,
            s=s,
            multiplier=multiplier,
            highest=highest,
            best=Found(*(jnp.where(better, x, y) for x, y in zip(here, it.best, strict=True))),
            steps=it.steps + 1,
            stuck=~solved,
        )

    if known is None:
        known = Found(jnp.zeros(k, dtype), jnp.full((), jnp.inf, dtype))
    z = jnp.ones(k, dtype)
    if ball is None:
        multiplier = jnp.ones((), dtype)
        z, slack = z * k**-0.5, 1.0
    else:
        multiplier = ball.multiplier
        slack = jnp.maximum(ball.radius, 1e-6)
        # The sum of unit gradients, which may cancel.
        z = z * slack / jnp.sqrt(jnp.maximum(dot(z, matvec(curvature, z)), 1.0))
    first = _Iterate(
        z=z,
        s=jnp.maximum(matvec(cosine, z) + shift - multiplier * lower, slack),
        multiplier=multiplier,
        highest=jnp.full((), jnp.inf, dtype),
        best=known,
        steps=jnp.zeros((), jnp.int32),
        stuck=jnp.zeros((), bool),
    )

    def unfinished(it: _Iterate) -> jax.Array:
        return (it.best.residual > tolerance(dtype)) & ~it.stuck & (it.steps < most_steps)

    return lax.while_loop(unfinished, step, varying(first, cosine)).best.point

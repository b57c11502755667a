"""The equations of fair bargaining, which FairGrad and Nash-MTL share."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.aggregators.solvers.cosines import equilibrate
from jaxmoo.aggregators.solvers.interior_point import ridge
from jaxmoo.kernels.launch import in_one_launch
from jaxmoo.kernels.linear import (
    all_of,
    diagonal_matrix,
    dot,
    factorise,
    identity,
    matvec,
    pairs,
    solve,
)
from jaxmoo.sharding import varying


def fair_shares(
    cosine: jax.Array, log_target: jax.Array, alpha: float | jax.Array, iterations: int
) -> jax.Array:
    """Solve ``(C z)_i = target_i z_i^(-1/alpha)`` for ``z > 0``.

    The solution is unique: it is where a strictly convex function of z is least. A primal-dual
    Newton method on the logarithms of the equations finds it in about 8 steps.

    Args:
      cosine: ``[K, K]`` cosines between gradients, positive semi-definite with unit diagonal.
      log_target: ``[K]`` natural logarithms of the targets.
      alpha: exponent, positive.
      iterations: most Newton steps to take.

    Returns:
      ``[K]`` z.

    Example:
      >>> import jax.numpy as jnp
      >>> fair_shares(jnp.eye(2), jnp.log(jnp.array([4.0, 1.0])), 1.0, 20).round(4).tolist()
      [2.0, 1.0]
    """
    k, eps = cosine.shape[0], float(jnp.finfo(cosine.dtype).eps)
    tiny = float(jnp.finfo(cosine.dtype).tiny)
    curvature = cosine + ridge(cosine.dtype) * identity(k, cosine.dtype)
    damping = 17 * eps * max(1.0, k / 16)  # more slows Newton's method, less defeats rounding
    # Start at the solution for orthogonal gradients.
    z = jnp.exp(log_target / (1 + 1 / alpha))

    def errors(z, s):
        return log_target - jnp.log(z) / alpha - jnp.log(s), s - matvec(curvature, z)

    def unfinished(carry):
        _, _, error, steps = carry
        return (error > 8.4 * eps) & (steps < iterations)

    def step(carry):
        z, s, _, steps = carry
        imbalance, slack = errors(z, s)
        ratio = s / (alpha * z)
        newton = curvature + diagonal_matrix(ratio + damping)
        factor = factorise(newton)
        dz = solve(factor, slack + s * imbalance)
        ds = s * imbalance - ratio * dz
        reach = jnp.maximum(jnp.max(-dz / z), jnp.max(-ds / s))
        reach = jnp.minimum(1.0, 0.9 / jnp.maximum(reach, 1e-30))
        ahead = (z + reach * dz, s + reach * ds)
        # Should rounding defeat even the damped factorisation, or the equations have no solution
        # and the numbers leave their range, the last point stands.
        solved = functools.reduce(
            operator.and_, (all_of((x > tiny) & (x < 1 / tiny)) for x in ahead)
        )
        z, s = (jnp.where(solved, x, old) for x, old in zip(ahead, (z, s), strict=True))
        imbalance, slack = errors(z, s)
        size = jnp.max(s) + jnp.max(z)
        error = jnp.maximum(jnp.max(jnp.abs(imbalance)), jnp.max(jnp.abs(slack)) / size)
        return z, s, jnp.where(solved, error, 0.0), steps + 1

    # Strictly feasible in s whatever the signs of C z.
    s = jnp.maximum(matvec(curvature, z), jnp.exp(log_target - jnp.log(z) / alpha))
    first = (z, s, jnp.asarray(jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    return lax.while_loop(unfinished, step, varying(first, curvature))[0]


@in_one_launch
def fair_weights(
    gram: jax.Array,
    active: jax.Array,
    preference: jax.Array,
    alpha: float | jax.Array,
    *,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """Solve ``(G w)_i = (K p_i / w_i)^(1/alpha)`` for ``w > 0``.

    Args:
      gram: ``[K, K]`` with a positive diagonal on active rows and zeros elsewhere.
      active: ``[K]`` bool.
      preference: ``[K]``, sums to 1 over active.
      alpha: exponent, positive.
      iterations: most Newton steps to take.

    Returns:
      ``(weights [K], length [])``, ``length`` the norm of ``J^T weights``, or more where that is
      little else than rounding.
    """
    cosine, norm = equilibrate(gram, active)
    share = preference * jnp.sum(active)
    heard = active & (share > 0)
    share = jnp.where(heard, share, 1.0)
    # In variables z = w * norm.
    log_target = jnp.log(share) / alpha + (1 / alpha - 1) * jnp.log(norm)
    cosine = jnp.where(pairs(heard) | identity(active.shape[0], bool), cosine, 0.0)
    z = jnp.where(heard, fair_shares(cosine, log_target, alpha, iterations), 0.0)
    # With the ridge, which bounds the weights where the gradients' hull reaches the origin and the
    # equations have no solution. Near there d is the difference of large terms, down to rounding,
    # which must not be blown up to the size of a gradient.
    square = jnp.maximum(dot(z, matvec(cosine, z)), 0.0)
    # |d|^2 relative to its terms, below which its direction is not to be trusted.
    noise = 20 * jnp.finfo(gram.dtype).eps * jnp.square(jnp.sum(z)) / jnp.maximum(square, 1e-30)
    length = jnp.sqrt(square + ridge(gram.dtype) * dot(z, z)) * (1 + noise**2)
    return z / norm, jnp.where(length > 0, length, 1.0)

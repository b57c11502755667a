"""Block principal pivoting: most quadratic programs here in two to five factorisations.

For ``0 <= z``, ``0 <= s = C z - b``, ``z_i s_i = 0`` guess which z are positive, solve ``C z = b``
for them, and exchange all that have the wrong sign, as long as that gets the number of wrong signs
down (Júdice and Pires, *A block principal pivoting algorithm for large-scale strictly monotone
linear complementarity problems*, Computers & Operations Research 21, 1994; Kim and Park 2011,
`doi:10.1137/110821172 <https://doi.org/10.1137/110821172>`_). Where it does not, they exchange
single signs, which takes many steps; here
:func:`~jaxmoo.aggregators.solvers.interior_point.interior_point` takes over.

Where gradients are dependent the systems are singular and the signs mean nothing. So a point counts
only by how well it satisfies the conditions.

All problems of a batch lie along the last axis, which is what a CPU computes side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.scipy.linalg import cho_solve

from jaxmoo.aggregators.solvers.interior_point import Found, tolerance
from jaxmoo.sharding import varying

_MAX_STEPS = 10
_CHANCES = 3  # exchanges that may fail to reduce the number of wrong signs, one after another
_UNROLLED = 8  # the largest K whose elimination is written out: fast to run, slow to compile
# Relative to the terms that b is made of. Larger solutions are those of nearly singular systems.
_LARGEST = 1e3


class Guess(NamedTuple):
    """Where a batch of problems stands."""

    positive: jax.Array  # bool [K, N], which z are positive
    fewest: jax.Array  # int32 [N], wrong signs so far
    chances: jax.Array  # int32 [N], that are left
    found: Found
    steps: jax.Array  # int32 []


def pivot(cosine: jax.Array, lower: jax.Array, magnitude: float | jax.Array = 1.0) -> Found:
    """Solve ``0 <= z``, ``0 <= C z - b``, complementary, or come as near as pivoting does.

    Args:
      cosine: ``[K, K]`` positive semi-definite with a diagonal of about 1.
      lower: ``[K]`` b.
      magnitude: as for :func:`~jaxmoo.aggregators.solvers.interior_point.interior_point`.

    Returns:
      The best point, and its residual as
      :func:`~jaxmoo.aggregators.solvers.interior_point.interior_point` reckons it: infinite if
      there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> found = pivot(jnp.array([[1.0, -0.5], [-0.5, 1.0]]), jnp.array([1.0, -1.0]))
      >>> found.point.tolist(), found.residual.item()
      ([1.0, 0.0], 0.0)
    """
    magnitude = jnp.asarray(magnitude, lower.dtype)
    found = _pivot(cosine[..., None], lower[..., None], magnitude[None])
    return Found(found.point[..., 0], found.residual[0])


@custom_vmap
def _pivot(c_KKN: jax.Array, b_KN: jax.Array, magnitude_N: jax.Array) -> Found:
    return exchange(c_KKN, b_KN, magnitude_N).found


def exchange(c_KKN: jax.Array, b_KN: jax.Array, magnitude_N: jax.Array) -> Guess:
    """Exchange signs until every problem of a batch is solved or given up.

    Args:
      c_KKN: cosines of every problem.
      b_KN: bounds.
      magnitude_N: as for :func:`pivot`.

    Returns:
      The last guess, with the best points and the number of systems that were solved.
    """
    k, n = b_KN.shape

    def hopeful(guess: Guess) -> jax.Array:
        return (guess.found.residual > tolerance(b_KN.dtype)) & (guess.chances >= 0)

    def step(guess: Guess) -> Guess:
        positive = guess.positive
        z = _solve_some(c_KKN, b_KN, positive)
        s = jnp.sum(c_KKN * z, 1) - b_KN
        wrong = jnp.where(positive, ~(z >= 0), s < 0)
        point = jnp.maximum(z, 0.0)
        total = jnp.sum(point, 0)
        size = jnp.maximum(magnitude_N + total, 1e-30)
        slack = jnp.sum(c_KKN * point, 1) - b_KN
        residual = jnp.max(jnp.abs(jnp.minimum(point, slack)), 0) / size
        # No problem's solution depends on how long others in the batch take.
        better = hopeful(guess) & (residual < guess.found.residual)
        better &= total <= _LARGEST * jnp.maximum(magnitude_N, jnp.sum(jnp.abs(b_KN), 0))
        count = jnp.sum(wrong, 0, jnp.int32)
        return Guess(
            positive=positive ^ wrong,
            fewest=jnp.minimum(guess.fewest, count),
            chances=jnp.where(count < guess.fewest, _CHANCES, guess.chances - 1),
            found=Found(
                jnp.where(better, point, guess.found.point),
                jnp.where(better, residual, guess.found.residual),
            ),
            steps=guess.steps + 1,
        )

    def unfinished(guess: Guess) -> jax.Array:
        return jnp.any(hopeful(guess)) & (guess.steps < _MAX_STEPS)

    first = Guess(
        positive=b_KN > 0,
        fewest=jnp.full(n, k + 1, jnp.int32),
        chances=jnp.full(n, _CHANCES, jnp.int32),
        found=Found(jnp.zeros((k, n), b_KN.dtype), jnp.full(n, jnp.inf, b_KN.dtype)),
        steps=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(unfinished, step, varying(first, b_KN))


@_pivot.def_vmap
def _(size: int, batched: list[bool], *problem: jax.Array) -> tuple[Found, Any]:
    """More problems along the last axis."""

    def fold(x: jax.Array, is_batched: bool) -> jax.Array:
        x = jnp.moveaxis(x, 0, -2) if is_batched else jnp.repeat(x[..., None, :], size, -2)
        return x.reshape(*x.shape[:-2], -1)

    found = _pivot(*map(fold, problem, batched))

    def unfold(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:-1], size, -1), -2, 0)

    return Found(*map(unfold, found)), jax.tree.map(lambda _: True, found)


def _solve_some(c_KKN: jax.Array, b_KN: jax.Array, some: jax.Array) -> jax.Array:
    """Solve ``C z = b`` for some of the coordinates, the others being 0."""
    k = b_KN.shape[0]
    identity = jnp.eye(k, dtype=c_KKN.dtype)[..., None]
    a = jnp.where(some[:, None] & some, c_KKN, identity)
    b = jnp.where(some, b_KN, 0.0)
    z = _eliminate(a, b) if k <= _UNROLLED else _factorise(a, b)
    return jnp.where(some, z, 0.0)


def _factorise(a_KKN: jax.Array, b_KN: jax.Array) -> jax.Array:
    def solve(a: jax.Array, b: jax.Array) -> jax.Array:
        return cho_solve((jnp.linalg.cholesky(a, symmetrize_input=False), True), b)

    return jax.vmap(solve, in_axes=-1, out_axes=-1)(a_KKN, b_KN)


def _eliminate(a_KKN: jax.Array, b_KN: jax.Array) -> jax.Array:
    """Gaussian elimination, which needs no pivots where a matrix is positive definite."""
    rest = jnp.concatenate([a_KKN, b_KN[:, None]], 1)
    rows = []
    for _ in range(len(b_KN)):
        rows.append(rest[0, 1:] / rest[0, 0])
        # Without the barrier the compiler computes what is left again for each of its uses.
        rest = lax.optimization_barrier(rest[1:, 1:] - rest[1:, :1] * rows[-1])
    z: list[jax.Array] = []
    for *row, right in reversed(rows):
        z.insert(0, right - sum(x * y for x, y in zip(row, z, strict=True)))
    return jnp.stack(z)

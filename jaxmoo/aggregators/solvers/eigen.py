"""Eigenvalues of Gram matrices.

Library routines are accurate relative to the *largest* eigenvalue: with gradients 1,000 times
larger than others, whose Gram entries differ by a million, nothing is left of the small ones.
Jacobi's method keeps the accuracy of each gradient's own scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.kernels.linear import matvec
from jaxmoo.sharding import varying

_MAX_SWEEPS = 12
_REGULAR = 1e3  # of an inverse: eigenvalues below it cannot be mistaken for rounding


def _next_round(x: jax.Array, axis: int) -> jax.Array:
    """Move to the next pairing of a round-robin tournament.

    Index i of the first half meets index i of the second. The first stays, all others move on by
    one seat; ``size - 1`` rounds pair everyone with everyone and end where they began.
    """
    half = x.shape[axis] // 2

    def seats(start, stop):
        return lax.slice_in_dim(x, start, stop, axis=axis)

    if half == 1:
        return x
    upper = [seats(0, 1), seats(half, half + 1), seats(1, half - 1)]
    lower = [seats(half + 1, 2 * half), seats(half - 1, half)]
    return jnp.concatenate([*upper, *lower], axis)


def eigh_graded(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues and vectors of a Gram matrix whose rows differ in scale.

    Two-sided Jacobi, all disjoint pairs of a round at once, as two halves of the matrix.

    Args:
      gram: ``[K, K]`` float32 or float64, symmetric, positive semi-definite up to rounding.

    Returns:
      ``(values [K], vectors [K, K], significant [K])``: vectors in columns, in no particular
      order; ``significant`` is False for an eigenvalue that rounding of the Gram matrix alone
      could produce, which is how rank is decided for rows of unequal scale.

    Example:
      >>> import jax.numpy as jnp
      >>> values, _, significant = eigh_graded(jnp.array([[1e6, 1e6], [1e6, 1e6]]))
      >>> values.max().round().item(), significant.sum().item()
      (2000000.0, 1)
    """
    k = gram.shape[0]
    size, eps = k + k % 2, jnp.finfo(gram.dtype).eps
    a = jnp.pad(gram, ((0, size - k), (0, size - k)))
    identity = jnp.eye(size, dtype=gram.dtype)
    if k == 1:
        return jnp.diagonal(gram), jnp.ones((1, 1), gram.dtype), jnp.diagonal(gram) > 0
    half = size // 2
    opposite = jnp.roll(identity, half, axis=0) > 0  # who meets whom

    def turn(x, cos, sin, axis):
        first, second = jnp.split(x, 2, axis)
        return jnp.concatenate([cos * first - sin * second, sin * first + cos * second], axis)

    def rotate(_, carry):
        a, vectors = carry
        app, aqq = jnp.split(jnp.diagonal(a), 2)
        apq = jnp.diagonal(a[:half, half:])
        # The angle that zeroes a[p, q]; none when it is zero already.
        nothing = apq == 0
        ratio = (aqq - app) / (2 * jnp.where(nothing, 1.0, apq))
        tangent = jnp.where(ratio < 0, -1.0, 1.0) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio**2))
        tangent = jnp.where(nothing, 0.0, tangent)
        cos = 1 / jnp.sqrt(1 + tangent**2)
        sin = tangent * cos
        a = turn(turn(a, cos[:, None], sin[:, None], 0), cos, sin, 1)
        a = jnp.where(opposite, 0.0, a)
        a = _next_round(_next_round(a, 0), 1)
        return a, _next_round(turn(vectors, cos, sin, 1), 1)

    def unfinished(carry):
        a, _, sweeps = carry
        diagonal = jnp.abs(jnp.diagonal(a))
        scale = jnp.sqrt(diagonal[:, None] * diagonal[None, :])
        off = jnp.abs(a) > eps * scale
        return (sweeps < _MAX_SWEEPS) & jnp.any(off & (identity == 0))

    def sweep(carry):
        a, vectors, sweeps = carry
        a, vectors = lax.fori_loop(0, size - 1, rotate, (a, vectors))
        return a, vectors, sweeps + 1

    start = varying((a, identity, jnp.zeros((), jnp.int32)))
    a, vectors, _ = lax.while_loop(unfinished, sweep, start)
    values = jnp.diagonal(a)[:k]
    vectors = vectors[:k, :k]
    # Independent rounding errors of the entries, relative to |g_i| |g_j|, move the eigenvalue of v
    # by about eps * sum_i v_i^2 |g_i|^2; sums over many parameters and the rotations add to it.
    squares = vectors**2
    noise = eps * jnp.matmul(jnp.diagonal(gram), squares, precision=lax.Precision.HIGHEST)
    return values, vectors, values > (16 + k) * noise


def pseudo_solve(gram: jax.Array, right: jax.Array) -> jax.Array:
    """Shortest least-squares solution of ``gram @ x = right``.

    Args:
      gram: ``[K, K]`` float32 or float64, symmetric, positive semi-definite up to rounding.
      right: ``[K]``.

    Returns:
      ``gram^+ right``, ``[K]``, by a Cholesky factor where that proves the matrix well-conditioned,
      else with the rank of :func:`eigh_graded`; there a component of ``right`` that rounding alone
      could produce counts as zero, so that nothing is found where nothing is.

    Example:
      >>> import jax.numpy as jnp
      >>> pseudo_solve(jnp.ones((2, 2)), jnp.array([1.0, 1.0])).round(4).tolist()
      [0.5, 0.5]
    """
    inverse = lax.linalg.triangular_solve(
        jnp.linalg.cholesky(gram, symmetrize_input=False),
        jnp.eye(gram.shape[0], dtype=gram.dtype),
        left_side=True,
        lower=True,
    )
    # The trace of the inverse, which bounds its largest eigenvalue; NaN where there is no inverse.
    regular = jnp.sum(inverse**2) < _REGULAR / jnp.max(jnp.diagonal(gram))
    quick = matvec(inverse.T, matvec(inverse, right))

    def decompose(carry):
        gram, right, _ = carry
        done = varying(jnp.ones((), bool), gram)
        return jnp.zeros_like(gram), _decomposed_solve(gram, right), done

    # A loop of at most one step: a batch takes it only if one of its matrices must. What it reads
    # it also changes, or the compiler would compute it beforehand.
    first = (gram, jnp.where(regular, quick, right), regular)
    return lax.while_loop(lambda carry: ~carry[2], decompose, varying(first))[1]


def _decomposed_solve(gram: jax.Array, right: jax.Array) -> jax.Array:
    values, vectors, significant = eigh_graded(gram)
    along = matvec(vectors.T, right)
    terms = matvec(jnp.abs(vectors.T), jnp.abs(right))
    significant &= jnp.abs(along) > 16 * jnp.finfo(gram.dtype).eps * terms
    along = jnp.where(significant, along / jnp.where(significant, values, 1.0), 0.0)
    return matvec(vectors, along)

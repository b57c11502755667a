"""Eigenvalues of Gram matrices.

Library routines are accurate relative to the *largest* eigenvalue: with gradients 1,000 times
larger than others, whose Gram entries differ by a million, nothing is left of the small ones.
Jacobi's method keeps the accuracy of each gradient's own scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.kernels.launch import in_one_launch
from jaxmoo.kernels.linear import (
    any_of,
    diagonal,
    diagonal_matrix,
    identity,
    in_kernel,
    matmul,
    matvec,
    one_hot,
    places,
    vecmat,
)
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


def _rotation(app: jax.Array, aqq: jax.Array, apq: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles that zero entries a[p, q]; none where they are zero."""
    nothing = apq == 0
    ratio = (aqq - app) / (2 * jnp.where(nothing, 1.0, apq))
    tangent = jnp.where(ratio < 0, -1.0, 1.0) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio**2))
    tangent = jnp.where(nothing, 0.0, tangent)
    cos = 1 / jnp.sqrt(1 + tangent**2)
    return cos, tangent * cos


def _by_halves(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """One round on matrices of even size, in which the halves meet; then all change seats."""
    a, vectors = carry
    half = a.shape[0] // 2
    opposite = jnp.roll(jnp.eye(2 * half, dtype=bool), half, axis=0)  # who meets whom

    def turn(x, cos, sin, axis):
        first, second = jnp.split(x, 2, axis)
        return jnp.concatenate([cos * first - sin * second, sin * first + cos * second], axis)

    app, aqq = jnp.split(jnp.diagonal(a), 2)
    cos, sin = _rotation(app, aqq, jnp.diagonal(a[:half, half:]))
    a = turn(turn(a, cos[:, None], sin[:, None], 0), cos, sin, 1)
    a = jnp.where(opposite, 0.0, a)
    a = _next_round(_next_round(a, 0), 1)
    return a, _next_round(turn(vectors, cos, sin, 1), 1)


def _by_masks(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The same in elementary operations, where everyone keeps their seat."""
    a, vectors = carry
    last = a.shape[0] - 1
    seat, turn = places(last + 1), turn.astype(jnp.float32)
    # Seats that add up to the number of the round meet, around a table of all but the last; who
    # would meet themselves meets the last.
    other = turn - seat
    other = jnp.where(other < 0, other + last, other)
    middle = turn * ((last + 1) // 2)
    middle = middle - last * jnp.floor((middle + 0.5) / last)
    other = jnp.where(other == seat, float(last), other)
    other = jnp.where(seat == last, middle, other)
    meets = one_hot(other, a.dtype)
    mine, its = diagonal(a), matvec(meets, diagonal(a))
    first = seat < other
    cos, sin = _rotation(
        jnp.where(first, mine, its), jnp.where(first, its, mine), jnp.sum(meets * a, axis=1)
    )
    turned = diagonal_matrix(cos) - jnp.where(first, sin, -sin)[:, None] * meets
    back = diagonal_matrix(cos) + jnp.where(first, sin, -sin)[:, None] * meets  # transposed
    a = jnp.where(meets > 0, 0.0, matmul(matmul(turned, a), back))
    return a, matmul(vectors, back)


@in_one_launch
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
    size, eps = k + k % 2, float(jnp.finfo(gram.dtype).eps)
    if k == 1:
        return diagonal(gram), identity(1, gram.dtype), diagonal(gram) > 0
    a = gram if size == k else jnp.pad(gram, ((0, size - k), (0, size - k)))
    units = identity(size, gram.dtype)
    rotate = _by_masks if in_kernel() else _by_halves

    def unfinished(carry):
        a, _, sweeps = carry
        size = jnp.abs(diagonal(a))
        off = jnp.abs(a) > eps * jnp.sqrt(size[:, None] * size[None, :])
        return (sweeps < _MAX_SWEEPS) & any_of(off & (units == 0))

    def sweep(carry):
        a, vectors, sweeps = carry
        a, vectors = lax.fori_loop(0, size - 1, rotate, (a, vectors))
        return a, vectors, sweeps + 1

    start = varying((a, units, jnp.zeros((), jnp.int32)))
    a, vectors, _ = lax.while_loop(unfinished, sweep, start)
    values = diagonal(a)
    if size > k:
        values, vectors = values[:k], vectors[:k, :k]
    # Independent rounding errors of the entries, relative to |g_i| |g_j|, move the eigenvalue of v
    # by about eps * sum_i v_i^2 |g_i|^2; sums over many parameters and the rotations add to it.
    noise = eps * vecmat(diagonal(gram), vectors**2)
    return values, vectors, values > (16 + k) * noise


@in_one_launch
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
    if in_kernel():  # where a problem waits for no other's decomposition
        return _decomposed_solve(gram, right)
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
    along = vecmat(right, vectors)
    terms = vecmat(jnp.abs(right), jnp.abs(vectors))
    significant &= jnp.abs(along) > 16 * float(jnp.finfo(gram.dtype).eps) * terms
    along = jnp.where(significant, along / jnp.where(significant, values, 1.0), 0.0)
    return matvec(vectors, along)

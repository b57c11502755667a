"""The linear algebra of small matrices that solvers are made of.

Every function has two forms: the library's, and one of elementary operations on whole [K, K]
tiles, for kernels, which know neither factorisations nor single entries. See
:mod:`~jaxmoo.kernels.launch`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from jaxmoo.platforms import like_gpu

_elementary: contextvars.ContextVar[str | None] = contextvars.ContextVar("elementary", default=None)


@contextlib.contextmanager
def elementary(platform: str) -> Iterator[None]:
    """Within it, only operations are used that kernels of a platform have."""
    token = _elementary.set(platform)
    try:
        yield
    finally:
        _elementary.reset(token)


def in_kernel() -> bool:
    """Whether only elementary operations may be used."""
    return _elementary.get() is not None


def matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix times vector without the reduced precision accelerators default to."""
    if in_kernel():
        return jnp.sum(matrix * vector[None, :], axis=1)
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)


def vecmat(vector: jax.Array, matrix: jax.Array) -> jax.Array:
    """Vector times matrix, as :func:`matvec`."""
    if in_kernel():
        return jnp.sum(vector[:, None] * matrix, axis=0)
    return jnp.matmul(vector, matrix, precision=lax.Precision.HIGHEST)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of matrices [K, K], as :func:`matvec`."""
    # On a GPU a kernel has no smaller product than of 16 rows.
    if like_gpu(_elementary.get()) and a.shape[0] < 16:
        return jnp.sum(a[:, :, None] * b[None, :, :], axis=1)
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def column(matrix: jax.Array, number: jax.Array) -> jax.Array:
    """One column of a matrix, [K]."""
    if in_kernel():
        columns = lax.broadcasted_iota(jnp.int32, matrix.shape, 1)
        return jnp.sum(jnp.where(columns == number, matrix.astype(jnp.float32), 0.0), axis=1)
    return lax.dynamic_index_in_dim(matrix, number, axis=1, keepdims=False)


def one_hot(numbers: jax.Array, dtype: Any) -> jax.Array:
    """Matrix [K, K] with a one in every row, where a number says; none for a number of -1."""
    k = numbers.shape[0]
    columns = lax.broadcasted_iota(jnp.int32, (k, k), 1).astype(dtype)
    return (columns == numbers.astype(dtype)[:, None]).astype(dtype)


def places(k: int) -> jax.Array:
    """The numbers from 0 on, float32 [K]."""
    if in_kernel():
        return diagonal(lax.broadcasted_iota(jnp.int32, (k, k), 0).astype(jnp.float32))
    return jnp.arange(k, dtype=jnp.float32)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner product of vectors."""
    return jnp.sum(a * b) if in_kernel() else jnp.dot(a, b)


def diagonal(matrix: jax.Array) -> jax.Array:
    """Diagonals of matrices, [..., K] of [..., K, K]."""
    # Kernels cannot gather; elsewhere jnp.diagonal traces some twenty operations (jax 0.10).
    return jnp.sum(jnp.where(_on_diagonal(matrix.shape[-1]), matrix, 0), axis=-1)


def diagonal_matrix(vector: jax.Array) -> jax.Array:
    """Matrix [K, K] with a diagonal."""
    if in_kernel():
        return jnp.where(_on_diagonal(vector.shape[0]), vector[:, None], 0.0)
    return jnp.diag(vector)


def identity(k: int, dtype: Any) -> jax.Array:
    """Identity matrix [K, K]; may be bool."""
    if in_kernel():
        return _on_diagonal(k).astype(dtype)
    return jnp.eye(k, dtype=dtype)


def pairs(x: jax.Array) -> jax.Array:
    """Of which pairs of entries of a bool vector [K] both are true, bool [K, K]."""
    if in_kernel():  # on a TPU only numbers can be turned into columns
        x = x.astype(jnp.float32)
        return x[:, None] * x[None, :] > 0
    return x[:, None] & x[None, :]


def any_of(x: jax.Array) -> jax.Array:
    """Whether any entry of a bool array is true."""
    return jnp.max(x.astype(jnp.float32)) > 0 if in_kernel() else jnp.any(x)


def all_of(x: jax.Array) -> jax.Array:
    """Whether all entries of a bool vector are true."""
    return jnp.min(x.astype(jnp.float32)) > 0 if in_kernel() else jnp.all(x)


def all_finite(x: jax.Array) -> jax.Array:
    """Whether all entries of a vector are finite."""
    return all_of(jnp.abs(x) < jnp.inf)


class Factor(NamedTuple):
    """A positive definite matrix, ready for solving."""

    matrix: jax.Array
    factor: jax.Array  # Cholesky's; in a kernel the inverse


def factorise(matrix: jax.Array) -> Factor:
    """Prepare for :func:`solve` with a positive definite matrix.

    Args:
      matrix: ``[K, K]``; only its lower triangle counts.

    Returns:
      The factor; not finite where the matrix is not positive definite to within rounding.
    """
    if in_kernel():
        return Factor(matrix, _inverse(matrix))
    return Factor(matrix, jnp.linalg.cholesky(matrix, symmetrize_input=False))


def solve(factor: Factor, right: jax.Array) -> jax.Array:
    """Solve ``matrix @ x = right``, [K]."""
    if in_kernel():
        x = matvec(factor.factor, right)
        # One step of refinement makes it as accurate as two triangular solves.
        return x + matvec(factor.factor, right - matvec(factor.matrix, x))
    return cho_solve((factor.factor, True), right)


def _on_diagonal(k: int) -> jax.Array:
    row, column = (lax.broadcasted_iota(jnp.int32, (k, k), axis) for axis in (0, 1))
    return row == column


def _inverse(matrix: jax.Array) -> jax.Array:
    """Gauss and Jordan's, without pivoting, which a positive definite matrix does not need."""
    k = matrix.shape[0]
    rows, columns = (lax.broadcasted_iota(jnp.int32, (k, k), axis) for axis in (0, 1))

    def eliminate(j: jax.Array, a: jax.Array) -> jax.Array:
        in_row, in_column = rows == j, columns == j
        row = jnp.sum(jnp.where(in_row, a, 0.0), axis=0)
        column = jnp.sum(jnp.where(in_column, a, 0.0), axis=1)
        scale = 1.0 / jnp.sum(jnp.where(in_row & in_column, a, 0.0))
        new = a - (column * scale)[:, None] * row[None, :]
        new = jnp.where(in_row, (row * scale)[None, :], new)
        new = jnp.where(in_column, -(column * scale)[:, None], new)
        return jnp.where(in_row & in_column, scale, new)

    return lax.fori_loop(0, k, eliminate, matrix)

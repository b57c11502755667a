"""Eigenvalues of graded Gram matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators.families import families
from jaxmoo.aggregators.solvers.eigen import eigh_graded, pseudo_solve

DECOMPOSE = jax.jit(eigh_graded)
SOLVE = jax.jit(pseudo_solve)
INDEPENDENT = ("random", "correlated", "imbalanced", "imbalanced correlated")


@pytest.mark.parametrize("k", [1, 7, 16])
def test_every_eigenvalue_is_accurate_on_its_own_scale(k):
    """Relative errors, also of eigenvalues a million times smaller than the largest."""
    for name in INDEPENDENT:
        j = families(k, 2 * k + 8)[name]
        g = (j @ j.T).astype(np.float32)
        values, vectors, significant = (np.asarray(x) for x in DECOMPOSE(g))
        np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(j @ j.T), rtol=5e-5)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-5)
        assert significant.all(), name


@pytest.mark.parametrize("family", ["low-rank", "imbalanced low-rank", "duplicates", "opposed"])
def test_rank_is_told_from_rounding(family):
    for seed in range(5):
        j = families(8, 24, seed)[family]
        _, _, significant = DECOMPOSE(jnp.asarray(j @ j.T, jnp.float32))
        rank = np.linalg.matrix_rank(j / np.linalg.norm(j, axis=1, keepdims=True), tol=1e-4)
        assert int(significant.sum()) == rank


def test_zero_matrix_has_no_significant_eigenvalue():
    assert not np.any(DECOMPOSE(jnp.zeros((8, 8)))[2])


def test_pseudo_solve_equals_pinv():
    for family in (*INDEPENDENT, "low-rank", "duplicates"):
        j = families(6, 16)[family]
        j /= np.linalg.norm(j, axis=1, keepdims=True)
        right = np.arange(1.0, 7.0)
        found = SOLVE(jnp.asarray(j @ j.T, jnp.float32), jnp.asarray(right, jnp.float32))
        exact = np.linalg.pinv(j @ j.T, rcond=1e-5) @ right
        np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max())


def test_pseudo_solve_finds_nothing_where_nothing_is():
    """Opposed rows cannot both be improved: the least-squares solution is zero, not rounding."""
    row = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    j = np.stack([row, -row, 3 * row, -3 * row, 0.1 * row, -row])
    j /= np.linalg.norm(j, axis=1, keepdims=True)
    assert not np.any(SOLVE(jnp.asarray(j @ j.T), jnp.ones(6)))

"""The quadratic programs, judged by their optimality conditions in float64.

Residuals are relative to the sizes of the terms that cancel in them, ``|g_i| sum_j |w_j| |g_j|``:
relative to less, no float32 solution could be told from the exact one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators import oracles
from aggregators.families import families
from jaxmoo.aggregators import solvers

SIZES = (2, 8, 64)
TOLERANCE = 1e-6
SKIPPED = ("zero-row", "single-row", "all-zero")  # rows are positive where the solvers are called
# The hull of these reaches the origin to within what a float32 Gram matrix can tell.
STATIONARY = ("low-rank", "imbalanced low-rank", "opposed")


def problems(k: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, float64 matrices and float32 Gram matrices of all families, normalised."""
    names, matrices = [], []
    for seed in range(3):
        for name, matrix in families(k, 2 * k + 8, seed).items():
            if name not in SKIPPED:
                names.append(name)
                matrices.append(matrix / np.linalg.norm(matrix, axis=1).max())
    stack = np.stack(matrices)
    return names, stack, np.einsum("mkn,mln->mkl", stack, stack).astype(np.float32)


def norms_of(stack: np.ndarray) -> np.ndarray:
    return np.linalg.norm(stack, axis=2)


@pytest.mark.parametrize("k", SIZES)
def test_min_norm_satisfies_its_optimality_conditions(k):
    """``<g_i, d> >= |d|^2`` for all i; equality where w_i > 0 follows from the weights' sum."""
    names, stack, grams = problems(k)
    solve = jax.jit(jax.vmap(lambda g: solvers.min_norm(g, jnp.ones(k, bool))))
    w = np.asarray(solve(grams), np.float64)
    assert (w >= 0).all()
    np.testing.assert_allclose(w.sum(1), 1, rtol=1e-6)
    products = np.einsum("mkl,ml->mk", np.einsum("mkn,mln->mkl", stack, stack), w)
    value = np.einsum("mk,mk->m", w, products)
    norm = norms_of(stack)
    scale = norm * np.einsum("mk,mk->m", w, norm)[:, None]
    residual = np.maximum(value[:, None] - products, 0) / scale
    for name, worst in zip(names, residual.max(1), strict=True):
        assert worst <= TOLERANCE, name


def test_min_norm_equals_exact_solutions():
    for k in (2, 5):
        names, stack, grams = problems(k)
        solve = jax.jit(jax.vmap(lambda g, k=k: solvers.min_norm(g, jnp.ones(k, bool))))
        for name, matrix, w in zip(names, stack, np.asarray(solve(grams), np.float64), strict=True):
            if name in STATIONARY:
                continue
            d = w @ matrix
            by_support = oracles.min_norm_by_enumeration(matrix @ matrix.T) @ matrix
            by_nnls = oracles.min_norm(matrix) @ matrix
            length = w @ np.linalg.norm(matrix, axis=1)
            np.testing.assert_allclose(by_support, by_nnls, atol=1e-7 * length, err_msg=name)
            np.testing.assert_allclose(d, by_nnls, atol=1e-5 * length, err_msg=name)


@pytest.mark.parametrize("k", SIZES)
def test_dual_cone_projection_satisfies_its_optimality_conditions(k):
    """``z >= 0``, ``<g_i, d + J^T z> >= 0``, and not both positive."""
    names, stack, grams = problems(k)

    def project(gram):
        cosine, _ = solvers.equilibrate(gram, jnp.ones(k, bool))
        targets = jnp.eye(k)[:3]  # single gradients, and their mean
        targets = jnp.concatenate([targets, jnp.full((1, k), 1.0 / k)])
        return targets, jax.vmap(
            lambda t: solvers.project_on_dual_cone(cosine, jnp.ones(k, bool), t)
        )(targets)

    targets, z = (np.asarray(x, np.float64) for x in jax.jit(jax.vmap(project))(grams))
    assert (z >= 0).all()
    unit = stack / norms_of(stack)[:, :, None]
    updates = np.einsum("mrk,mkn->mrn", targets + z, unit)
    products = np.einsum("mrn,mkn->mrk", updates, unit)
    scale = (targets + z).sum(2, keepdims=True)
    violation = np.maximum(-products, 0) / scale
    slackness = np.minimum(z, np.maximum(products, 0)) / scale
    for i, name in enumerate(names):
        assert violation[i].max() <= TOLERANCE, name
        assert slackness[i].max() <= TOLERANCE, name


def test_dual_cone_projection_equals_nnls():
    k = 8
    names, stack, grams = problems(k)
    solve = jax.jit(
        jax.vmap(
            lambda g: solvers.project_on_dual_cone(
                solvers.equilibrate(g, jnp.ones(k, bool)).cosine, jnp.ones(k, bool), jnp.eye(k)[0]
            )
        )
    )
    z = np.asarray(solve(grams), np.float64)
    unit = stack / norms_of(stack)[:, :, None]
    for i, name in enumerate(names):
        if name in STATIONARY:
            continue
        expected = oracles.project_on_dual_cone(unit[i], unit[i, 0])
        np.testing.assert_allclose(unit[i, 0] + z[i] @ unit[i], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("c", [0.1, 0.5, 0.95])
def test_best_worst_case_has_no_duality_gap(k, c):
    """``min_i <g_i, d>`` of any d in the ball is at most the dual objective of any w.

    So a d in the ball and a w at which the two agree are both optimal.
    """
    names, stack, grams = problems(k)
    y = np.asarray(_best_worst_case(k)(grams, c), np.float64)
    assert (y >= 0).all()
    centre = np.full(k, 1 / k)
    for name, matrix, yi in zip(names, stack, y, strict=True):
        if name in (*STATIONARY, "nearly opposed"):
            continue
        norm = np.linalg.norm(matrix, axis=1)
        mean, correction = centre @ matrix, yi @ matrix
        radius = c * np.linalg.norm(mean)
        assert np.linalg.norm(correction) <= radius * (1 + 1e-4), name
        w = yi / yi.sum()
        dual = w @ matrix @ mean + radius * np.linalg.norm(w @ matrix)
        short = (dual - matrix @ (mean + correction)) / (norm * ((centre + yi) @ norm))
        assert short.max() <= 2e-6, name


def _best_worst_case(k, compiled={}):  # noqa: B006 - one program for every radius
    if k not in compiled:
        compiled[k] = jax.jit(
            jax.vmap(
                lambda g, c: solvers.best_worst_case(g, jnp.ones(k, bool), jnp.full(k, 1.0 / k), c),
                in_axes=(0, None),
            )
        )
    return compiled[k]


@pytest.mark.parametrize("c", [0.1, 0.5, 0.95])
def test_best_worst_case_stays_in_the_ball_where_no_direction_exists(c):
    """The correction fades out instead of turning into rounding."""
    names, stack, grams = problems(8)
    y = np.asarray(_best_worst_case(8)(grams, c), np.float64)
    for name, matrix, yi in zip(names, stack, y, strict=True):
        mean = np.linalg.norm(matrix.mean(0))
        # Relative to what a float32 Gram matrix knows of a sum that cancels.
        noise = 3e-3 * np.linalg.norm(matrix, axis=1).mean()
        assert np.linalg.norm(yi @ matrix) <= c * mean * 1.2 + noise, name


def test_inactive_rows_take_no_part():
    names, stack, grams = problems(5)
    active = jnp.array([True, True, False, True, True])
    masked = jnp.where(active[:, None] & active, grams, 0)
    solve = jax.jit(
        jax.vmap(
            lambda g: (
                solvers.min_norm(g, active),
                solvers.best_worst_case(g, active, jnp.where(active, 0.25, 0.0), 0.5),
            )
        )
    )
    w, y = (np.asarray(x, np.float64) for x in solve(masked))
    assert (w[:, 2] == 0).all() and (y[:, 2] == 0).all()
    for name, matrix, wi in zip(names, stack, w, strict=True):
        if name not in STATIONARY:
            rest = np.delete(matrix, 2, axis=0)
            length = wi @ np.linalg.norm(matrix, axis=1)
            np.testing.assert_allclose(
                wi @ matrix, oracles.min_norm(rest) @ rest, atol=1e-5 * length, err_msg=name
            )


def test_nothing_active_gives_zeros():
    @jax.jit
    def solve(active):
        zeros = jnp.zeros((3, 3))
        return (
            solvers.min_norm(zeros, active),
            solvers.best_worst_case(zeros, active, jnp.zeros(3), 0.5),
            solvers.project_on_dual_cone(jnp.eye(3), active, jnp.zeros(3)),
        )

    assert not np.any(solve(jnp.zeros(3, bool)))

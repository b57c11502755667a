"""The quadratic programs, judged by their optimality conditions in float64.

Residuals are relative to the sizes of the terms that cancel in them, ``|g_i| sum_j |w_j| |g_j|``:
relative to less, no float32 solution could be told from the exact one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators import oracles
from aggregators.families import families
from jaxmoo.aggregators import solvers
from jaxmoo.aggregators.solvers.interior_point import interior_point, tolerance
from jaxmoo.aggregators.solvers.pivoting import exchange

SIZES = (2, 8, pytest.param(64, marks=pytest.mark.slow))
TOLERANCE = 1e-6
GOOD_ENOUGH = tolerance(np.float32)
RADII = (0.02, 0.5, 0.97)
SKIPPED = ("zero-row", "single-row", "all-zero")  # rows are positive where the solvers are called
REGULAR = ("random", "correlated", "imbalanced", "imbalanced correlated")  # independent gradients
# The hull of these reaches the origin to within what a float32 Gram matrix can tell.
STATIONARY = ("low-rank", "imbalanced low-rank", "opposed", "few columns", "copies")


def copies(k: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """A few gradients and their opposites, again and again, with norms from 1 to 1000."""
    rows = rng.integers(0, max(1, k // 3), k)
    factors = rng.choice([-1.0, 1.0], k) * 10 ** rng.uniform(0, 3, k)
    return rng.standard_normal((k, n))[rows] * factors[:, None]


@functools.cache
def problems(k: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, float64 matrices and float32 Gram matrices of all families, normalised."""
    names, matrices = [], []
    columns, few = 2 * k + 8, max(2, k // 2)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        made = families(k, columns, seed)
        narrow = families(k, few, seed)["imbalanced correlated"]
        made["few columns"] = np.pad(narrow, ((0, 0), (0, columns - few)))
        for _ in range(4):
            made["copies"] = copies(k, columns, rng).astype(np.float32).astype(np.float64)
            for name, matrix in made.items():
                if name not in SKIPPED:
                    names.append(name)
                    matrices.append(matrix / np.linalg.norm(matrix, axis=1).max())
            made.clear()
    stack = np.stack(matrices)
    return names, stack, np.einsum("mkn,mln->mkl", stack, stack).astype(np.float32)


def norms_of(stack: np.ndarray) -> np.ndarray:
    return np.linalg.norm(stack, axis=2)


@functools.cache
def min_norms(k: int):
    """Names, matrices and solutions [M, K]."""
    names, stack, grams = problems(k)
    w = jax.jit(jax.vmap(lambda g: solvers.min_norm(g, jnp.ones(k, bool))))(grams)
    return names, stack, np.asarray(w, np.float64)


@pytest.mark.parametrize("k", SIZES)
def test_min_norm_satisfies_its_optimality_conditions(k):
    """``<g_i, d> >= |d|^2`` for all i; equality where w_i > 0 follows from the weights' sum."""
    names, stack, w = min_norms(k)
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
    for k in (2, 8):
        for name, matrix, w in zip(*min_norms(k), strict=True):
            if name in STATIONARY:
                continue
            d = w @ matrix
            by_support = oracles.min_norm_by_enumeration(matrix @ matrix.T) @ matrix
            by_nnls = oracles.min_norm(matrix) @ matrix
            length = w @ np.linalg.norm(matrix, axis=1)
            np.testing.assert_allclose(by_support, by_nnls, atol=1e-7 * length, err_msg=name)
            np.testing.assert_allclose(d, by_nnls, atol=1e-5 * length, err_msg=name)


@functools.cache
def projections(k: int):
    """Names, matrices of unit rows, targets [R, K] and corrections [M, R, K]."""
    names, stack, grams = problems(k)
    # Single gradients, and their mean.
    targets = np.vstack([np.eye(k)[:3], np.full((1, k), 1.0 / k)]).astype(np.float32)

    def project(gram):
        active = jnp.ones(k, bool)
        cosine, _ = solvers.equilibrate(gram, active)
        return jax.vmap(lambda t: solvers.project_on_dual_cone(cosine, active, t))(targets)

    z = np.asarray(jax.jit(jax.vmap(project))(grams), np.float64)
    return names, stack / norms_of(stack)[:, :, None], targets.astype(np.float64), z


@pytest.mark.parametrize("k", SIZES)
def test_dual_cone_projection_satisfies_its_optimality_conditions(k):
    """``z >= 0``, ``<g_i, d + J^T z> >= 0``, and not both positive."""
    names, unit, targets, z = projections(k)
    assert (z >= 0).all()
    updates = np.einsum("mrk,mkn->mrn", targets + z, unit)
    products = np.einsum("mrn,mkn->mrk", updates, unit)
    scale = (targets + z).sum(2, keepdims=True)
    violation = np.maximum(-products, 0) / scale
    slackness = np.minimum(z, np.maximum(products, 0)) / scale
    for i, name in enumerate(names):
        assert violation[i].max() <= TOLERANCE, name
        assert slackness[i].max() <= TOLERANCE, name


def test_dual_cone_projection_equals_nnls():
    names, unit, _, z = projections(8)
    for name, rows, zi in zip(names, unit, z[:, 0], strict=True):
        if name not in STATIONARY:
            expected = oracles.project_on_dual_cone(rows, rows[0])
            np.testing.assert_allclose(rows[0] + zi @ rows, expected, atol=1e-5, err_msg=name)


@jax.jit
def pivot_alone(grams):
    """Cosines [M, K, K], bounds [M, K] of projecting the first gradient, and the last guess."""
    cosines = jax.vmap(lambda g: solvers.equilibrate(g, jnp.ones(g.shape[0], bool))[0])(grams)
    bounds = -cosines[:, :, 0]
    return cosines, bounds, exchange(cosines.transpose(1, 2, 0), bounds.T, jnp.ones(len(grams)))


@functools.cache
def by_either_method(k: int):
    """Names, cosines, bounds, pivoting's points and residuals, and the other method's points."""
    names, _, grams = problems(k)
    cosines, bounds, guess = pivot_alone(grams)
    within = jax.jit(jax.vmap(interior_point))(cosines, bounds)
    arrays = (cosines, bounds, guess.found.point.T, guess.found.residual, within)
    return names, *(np.asarray(x, np.float64) for x in arrays)


@pytest.mark.parametrize("k", (*SIZES, 9))
def test_pivoting_alone_solves_what_is_regular_as_the_interior_point_does(k):
    for name, _, _, point, residual, within in zip(*by_either_method(k), strict=True):
        if name in REGULAR:
            assert residual <= GOOD_ENOUGH, name
            np.testing.assert_allclose(point, within, atol=1e-5 * (1 + within.sum()), err_msg=name)


@pytest.mark.parametrize("k", SIZES)
def test_pivoting_needs_at_most_five_systems_where_gradients_are_independent(k):
    names, _, grams = problems(k)
    regular = np.flatnonzero(np.isin(names, REGULAR))
    _, _, guess = pivot_alone(grams[np.resize(regular, len(grams))])
    assert (np.asarray(guess.found.residual) <= GOOD_ENOUGH).all()
    assert guess.steps <= 5


@pytest.mark.parametrize("k", SIZES)
def test_pivoting_does_not_claim_what_it_has_not_found(k):
    """However singular the systems it meets."""
    for name, cosine, bound, point, residual, _ in zip(*by_either_method(k), strict=True):
        if np.isfinite(residual):
            assert (point >= 0).all()
            off = np.abs(np.minimum(point, cosine @ point - bound)).max() / (1 + point.sum())
            assert off <= residual + TOLERANCE / 2, name


@functools.cache
def best_worst_cases(k: int):
    """Names, matrices, and solutions [R, M, K] for all radii."""
    names, stack, grams = problems(k)
    over_matrices = jax.vmap(
        lambda g, c: solvers.best_worst_case(g, jnp.ones(k, bool), jnp.full(k, 1.0 / k), c),
        in_axes=(0, None),
    )
    y = jax.jit(jax.vmap(over_matrices, in_axes=(None, 0)))(grams, jnp.array(RADII))
    return names, stack, np.asarray(y, np.float64)


@pytest.mark.parametrize("k", SIZES)
def test_best_worst_case_satisfies_its_optimality_conditions(k):
    """``<g_i, d> >= m``, equal where ``y_i > 0``, for some m; and d on the sphere.

    Together they are sufficient. The square of the radius is relative to its own terms.
    """
    names, stack, solutions = best_worst_cases(k)
    norm = norms_of(stack)
    mean = stack.mean(1)
    assert (solutions >= 0).all()
    for c, y in zip(RADII, solutions, strict=True):
        change = np.einsum("mk,mkn->mn", y, stack)
        products = np.einsum("mkn,mn->mk", stack, mean + change)
        size = ((1 / k + y) * norm).sum(1)
        low, high = products.min(1), products.max(1)
        for _ in range(60):  # violations grow with m, slackness falls
            middle = (low + high) / 2
            slack = (products - middle[:, None]) / norm
            off = np.maximum(-slack, 0).max(1) / size
            loose = np.minimum(y * norm, np.maximum(slack, 0)).max(1) / size
            low, high = np.where(off < loose, middle, low), np.where(off < loose, high, middle)
        sphere = abs((change**2).sum(1) - c**2 * (mean**2).sum(1)) / size**2
        for name, *values in zip(names, off, loose, sphere, strict=True):
            assert max(values) <= TOLERANCE, (name, c)


@pytest.mark.parametrize("k", SIZES)
def test_best_worst_case_has_no_duality_gap(k):
    """``min_i <g_i, d>`` of any d in the ball is at most the dual objective of any w.

    So a d in the ball and a w at which the two agree are both optimal.
    """
    names, stack, solutions = best_worst_cases(k)
    for c, y in zip(RADII, solutions, strict=True):
        for name, matrix, yi in zip(names, stack, y, strict=True):
            if name in (*STATIONARY, "nearly opposed"):
                continue
            norm = np.linalg.norm(matrix, axis=1)
            mean, correction = matrix.mean(0), yi @ matrix
            radius = c * np.linalg.norm(mean)
            assert np.linalg.norm(correction) <= radius * (1 + 1e-4), name
            w = yi / yi.sum()
            dual = w @ matrix @ mean + radius * np.linalg.norm(w @ matrix)
            short = (dual - matrix @ (mean + correction)) / (norm * ((1 / k + yi) @ norm))
            assert short.max() <= 2e-6, (name, c)


def test_best_worst_case_stays_in_the_ball_where_no_direction_exists():
    """The correction fades out instead of turning into rounding."""
    names, stack, solutions = best_worst_cases(8)
    for c, y in zip(RADII, solutions, strict=True):
        for name, matrix, yi in zip(names, stack, y, strict=True):
            mean = np.linalg.norm(matrix.mean(0))
            # Relative to what a float32 Gram matrix knows of a sum that cancels.
            noise = 3e-3 * np.linalg.norm(matrix, axis=1).mean()
            assert np.linalg.norm(yi @ matrix) <= c * mean * 1.2 + noise, name


@functools.cache
def solve_some(k: int):
    """Compiled: (grams [M, K, K], active [K]) to the solutions of all problems."""

    def solve(gram, active):
        centre = active / jnp.maximum(jnp.sum(active), 1)
        cosine, _ = solvers.equilibrate(gram, active)
        return (
            solvers.min_norm(gram, active),
            solvers.best_worst_case(gram, active, centre, 0.5),
            solvers.project_on_dual_cone(cosine, active, centre),
        )

    return jax.jit(jax.vmap(solve, in_axes=(0, None)))


def test_inactive_rows_take_no_part():
    names, stack, grams = problems(5)
    active = jnp.array([True, True, False, True, True])
    masked = jnp.where(active[:, None] & active, grams, 0)
    solutions = [np.asarray(x, np.float64) for x in solve_some(5)(masked, active)]
    assert all((x[:, 2] == 0).all() for x in solutions)
    for name, matrix, wi in zip(names, stack, solutions[0], strict=True):
        if name not in STATIONARY:
            rest = np.delete(matrix, 2, axis=0)
            length = wi @ np.linalg.norm(matrix, axis=1)
            np.testing.assert_allclose(
                wi @ matrix, oracles.min_norm(rest) @ rest, atol=1e-5 * length, err_msg=name
            )


def test_nothing_active_gives_zeros():
    _, _, grams = problems(5)
    for solution in solve_some(5)(jnp.zeros_like(grams), jnp.zeros(5, bool)):
        assert not np.any(solution)

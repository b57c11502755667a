"""FairGrad and Nash-MTL: the equations themselves, and the restored norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators.families import LABELS, STACK, families, resolve
from jaxmoo import aggregators
from jaxmoo.aggregators import aggregate
from jaxmoo.aggregators.solvers.fair import fair_shares
from jaxmoo.errors import ConfigError

STATIONARY = ("low-rank", "imbalanced low-rank", "opposed", "all-zero")


@pytest.mark.parametrize(
    ("name", "alpha"),
    [("fairgrad", 1.0), ("fairgrad 2", 2.0), ("fairgrad 0.5", 0.5), ("nash_mtl", 1.0)],
)
def test_improvements_satisfy_the_equations(name, alpha):
    """``w_i (G w)_i^alpha`` is the same for all i, up to the restored norm."""
    weights, updates = resolve(name, STACK)
    for i, (family, seed) in enumerate(LABELS):
        if family in STATIONARY or family == "nearly opposed":
            continue
        rows = np.any(STACK[i] != 0, axis=1)
        gains = STACK[i][rows] @ updates[i]
        assert gains.min() > 0
        product = weights[i][rows] * gains**alpha
        np.testing.assert_allclose(product, product[0], rtol=1e-3, err_msg=f"{family} {seed}")


@pytest.mark.parametrize("name", ["fairgrad", "fairgrad 2", "nash_mtl"])
def test_the_norm_is_that_of_the_mean_gradient(name):
    _, updates = resolve(name, STACK)
    for i, (family, seed) in enumerate(LABELS):
        if family not in STATIONARY:
            rows = STACK[i][np.any(STACK[i] != 0, axis=1)]
            expected = np.linalg.norm(rows.mean(0))
            found = np.linalg.norm(updates[i])
            assert found == pytest.approx(expected, rel=1e-3), (family, seed)


def test_published_scales():
    """``G w = w^(-1/alpha)`` with the true Gram matrix; Nash's update has norm ``max_norm``."""
    for i in (0, 1):
        j = STACK[i] * 1e-3
        stack = np.resize(j, STACK.shape)
        weights, updates = resolve("fairgrad published", stack)
        np.testing.assert_allclose(j @ updates[0], weights[0] ** -0.5, rtol=1e-4)
        _, updates = resolve("nash_mtl published", stack)
        assert np.linalg.norm(updates[0]) == pytest.approx(1.0, rel=1e-5)


def test_a_wide_bound_leaves_the_bargaining_solution():
    j = jnp.asarray(STACK[0], jnp.float32)
    weights, _ = aggregators.weigh_block(
        aggregators.nash_mtl(max_norm=100.0, scale="published"), aggregators.gram(j)
    )
    gains = np.asarray(j @ (weights @ j))
    np.testing.assert_allclose(np.asarray(weights) * gains, 1, rtol=1e-4)


def test_nash_does_not_see_the_norms():
    """Its direction is that for unit gradients."""
    _, updates = resolve("nash_mtl", STACK)
    norms = np.linalg.norm(STACK, axis=2, keepdims=True)
    _, unit = resolve("nash_mtl", STACK / np.where(norms > 0, norms, 1))
    for i, (family, _) in enumerate(LABELS):
        if family in ("random", "imbalanced", "correlated"):
            cosine = updates[i] @ unit[i] / np.linalg.norm(updates[i]) / np.linalg.norm(unit[i])
            assert cosine > 1 - 1e-6


def test_preferences_are_bargaining_powers():
    preference = np.arange(1.0, STACK.shape[1] + 1)
    weights, updates = resolve("nash_mtl", STACK, preference=preference)
    power = weights[0] * (STACK[0] @ updates[0])
    np.testing.assert_allclose(power / power[0], preference, rtol=1e-3)


@pytest.mark.parametrize("k", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_newton_needs_few_steps(k):
    """For every family and exponent the solution after 20 steps is the one after 60."""
    names = [n for n in families(k, 2 * k + 8) if n not in ("zero-row", "single-row", "all-zero")]
    unit = []
    for name in names:
        j = families(k, 2 * k + 8)[name]
        unit.append(j / np.linalg.norm(j, axis=1, keepdims=True))
    cosines = jnp.asarray(np.stack([u @ u.T for u in unit]), jnp.float32)
    solve = jax.jit(
        jax.vmap(
            jax.vmap(fair_shares, in_axes=(None, None, 0, None)), in_axes=(0, None, None, None)
        )
    )
    alphas = jnp.array([0.5, 1.0, 2.0, 5.0])
    few, many = (np.asarray(solve(cosines, jnp.zeros(k), alphas, n)) for n in (20, 60))
    assert np.isfinite(few).all()
    for i, name in enumerate(names):
        d, e = few[i] @ unit[i], many[i] @ unit[i]
        np.testing.assert_allclose(d, e, atol=1e-4 * np.abs(few[i]).sum(1).max(), err_msg=name)


@pytest.mark.parametrize(
    ("make", "alphas"),
    [
        (lambda alpha: aggregators.fairgrad(alpha, iterations=400), (0.02, 0.2, 1.0, 20.0, 100.0)),
        (lambda alpha: aggregators.nash_mtl(iterations=400), (1.0,)),
    ],
)
def test_weights_are_finite_at_any_exponent_after_any_number_of_steps(make, alphas):
    """Traced exponents are not refused, and weights grow and grow where there is no solution."""
    active = jnp.asarray(np.any(STACK != 0, axis=2))
    stack = jnp.asarray(STACK, jnp.float32)

    @jax.jit
    def solve(alpha):
        grams = jax.vmap(aggregators.gram)(stack)
        return aggregators.weigh_blocks(make(alpha), grams, active=active)[0]

    for alpha in alphas:
        assert np.isfinite(solve(alpha)).all(), alpha


@pytest.mark.parametrize("k", [6, pytest.param(32, marks=pytest.mark.slow)])
def test_fairgrad_keeps_its_promise_at_the_ends_of_its_range(k):
    """Non-conflict everywhere, the equations where they have a solution."""
    names = [n for n in families(k, 2 * k + 8) if n not in ("zero-row", "single-row", "all-zero")]
    stack = np.stack([families(k, 2 * k + 8, seed)[n] for seed in (0, 1) for n in names])
    norms = np.linalg.norm(stack, axis=2)
    grams = jnp.asarray(np.einsum("mkn,mln->mkl", stack, stack))

    @jax.jit
    def weigh(alpha):
        return aggregators.weigh_blocks(aggregators.fairgrad(alpha), grams)[0]

    for alpha in (0.5, 5.0):
        weights = np.asarray(weigh(alpha), float)
        gains = np.einsum("mkn,mn->mk", stack, np.einsum("mk,mkn->mn", weights, stack))
        assert ((gains / norms).min(1) >= -1e-4 * norms.mean(1)).all()
        for name, w, gain in zip(names * 2, weights, gains, strict=True):
            if name not in STATIONARY and name != "nearly opposed":
                product = w * gain**alpha
                np.testing.assert_allclose(product, product[0], rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("alpha", [0.02, 0.4, 6.0, 100.0, np.nan])
def test_exponents_that_float32_cannot_solve_are_refused(alpha):
    with pytest.raises(ConfigError, match=r"alpha to be a number in \[0.5, 5\]"):
        aggregators.fairgrad(alpha)


def test_opposed_gradients_do_not_explode():
    """There is no solution: the weights stay bounded and the update vanishes."""
    for name in ("fairgrad published", "nash_mtl published", "nash_mtl"):
        weights, updates = resolve(name, STACK)
        for i, (family, _) in enumerate(LABELS):
            if family == "opposed":
                assert np.abs(weights[i]).max() < 1e5
                assert np.linalg.norm(updates[i]) < 1e-2


@pytest.mark.parametrize("name", ["fairgrad", "fairgrad 2", "fairgrad 0.5", "nash_mtl"])
def test_hardly_any_objective_is_opposed_where_there_is_no_solution(name):
    """Relative to the gradients, not to the large weights that cancel there."""
    rng = np.random.default_rng(0)
    stack = STACK.copy()
    for i in range(len(stack) // 2):  # the same gradients and their opposites, norms 1 to 1000
        rows, signs = rng.integers(0, 3, stack.shape[1]), rng.choice([-1.0, 1.0], stack.shape[1])
        stack[i] = STACK[0][rows] * (signs * 10 ** rng.uniform(0, 3, stack.shape[1]))[:, None]
    stack = stack.astype(np.float32).astype(np.float64)
    _, updates = resolve(name, stack)
    norms = np.linalg.norm(stack, axis=2)
    gains = np.einsum("mkn,mn->mk", stack, updates) / np.where(norms > 0, norms, 1)
    assert (gains.min(1) >= -1e-4 * norms.mean(1)).all()


def test_k_equal_gradients_of_published_nash():
    j = jnp.tile(jnp.array([3.0, 4.0]), (4, 1))
    d = aggregate(aggregators.nash_mtl(max_norm=10.0, scale="published"), j)
    np.testing.assert_allclose(d, jnp.array([0.6, 0.8]) * 2, rtol=1e-5)

"""CAGrad: the exact direction, its ball and its scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from aggregators.families import LABELS, STACK, resolve
from jaxmoo import aggregators
from jaxmoo.aggregators import aggregate

J = jnp.asarray(STACK[0], jnp.float32)


def dual_objective(j: np.ndarray, c: float):
    g, p = j @ j.T, np.full(len(j), 1 / len(j))
    radius = c * np.sqrt(p @ g @ p)
    return lambda w: w @ g @ p + radius * np.sqrt(max(w @ g @ w, 0.0))


@pytest.mark.parametrize(("name", "c"), [("cagrad", 0.5), ("cagrad 0.9", 0.9)])
def test_worst_improvement_equals_the_dual_optimum(name, c):
    """Found by SciPy's SLSQP over the simplex."""
    weights, updates = resolve(name, STACK)
    for i, (family, seed) in enumerate(LABELS):
        if family not in ("random", "correlated", "imbalanced", "duplicates"):
            continue
        j = STACK[i] / np.linalg.norm(STACK[i], axis=1).max()
        k = len(j)
        scale = np.linalg.norm(j, axis=1)
        # In variables of one scale: w = v / |g|, on the simplex.
        found = minimize(
            lambda v, j=j, scale=scale: dual_objective(j, c)(v / scale) / (v / scale).sum(),
            np.full(k, 1 / k),
            bounds=[(0, None)] * k,
            method="SLSQP",
            options={"ftol": 1e-16, "maxiter": 1000},
        )
        gains = j @ updates[i] * (1 + c) / np.linalg.norm(STACK[i], axis=1).max()
        # Relative to each gradient and to the terms of the update.
        short = (found.fun - gains) / (scale * (weights[i] @ scale) * (1 + c))
        assert short.max() <= 1e-6, (family, seed)


def test_update_lies_on_the_ball():
    weights, _ = resolve("cagrad", STACK)
    for i, (family, seed) in enumerate(LABELS):
        if family in ("random", "correlated", "imbalanced", "duplicates", "equal"):
            mean = STACK[i].mean(0)
            radius = np.linalg.norm(1.5 * weights[i] @ STACK[i] - mean) / np.linalg.norm(mean)
            assert radius == pytest.approx(0.5, abs=1e-4), (family, seed)


@jax.jit
def update(c):
    scales = ("none", "1+c", "1+c^2")
    return [aggregate(aggregators.cagrad(c, rescale=rescale), J) for rescale in scales]


def test_rescalings():
    plain, divided, squared = update(0.4)
    np.testing.assert_allclose(divided, plain / 1.4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(squared, plain / 1.16, rtol=1e-5, atol=1e-6)


def test_no_radius_is_the_mean_and_a_large_one_mgda():
    np.testing.assert_allclose(update(0.0)[0], J.mean(0), rtol=1e-6)
    far, direction = np.asarray(update(1e4)[0]), np.asarray(aggregate("mgda", J))
    cosine = far @ direction / np.linalg.norm(far) / np.linalg.norm(direction)
    assert cosine > 1 - 1e-6


def test_descends_on_the_mean_loss():
    _, updates = resolve("cagrad 0.9", STACK)
    mean = STACK.mean(1)
    norm = np.linalg.norm(mean, axis=1)
    inner = np.einsum("mn,mn->m", mean, updates) / np.where(norm > 0, norm, 1)
    largest = np.linalg.norm(STACK, axis=2).max(1)
    assert (inner >= -1e-6 * largest).all()


def test_opposed_gradients_give_their_mean():
    """The formula is 0/0 there; others return 0 even when the mean is not."""
    stack = np.zeros_like(STACK)
    stack[:, 0, 0], stack[:, 1, 0], stack[:, 2, 1] = 1.0, -1.0, 1.0
    _, updates = resolve("cagrad", stack)
    np.testing.assert_allclose(updates[0][:2], [0, 1 / 3 / 1.5], atol=1e-3)
